"""`python -m benchmarks`: the time of jaxsoft against jax.nn and optax, in turns in one process."""

import argparse
import dataclasses
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import jaxsoft

Shape = tuple[int, int]
Computation = Callable[[Array, Array, Array], Any]  # of logits, a cotangent and labels

SHAPES: tuple[Shape, ...] = (
    (200_000, 10),
    (50_000, 128),
    (4096, 1000),
    (1024, 16_384),
    (512, 50_304),
)
QUICK_SHAPES: tuple[Shape, ...] = ((20_000, 10), (256, 1000), (16, 50_304))
EAGER_SHAPE: Shape = (8, 10)
DTYPES = ("float32", "bfloat16")

_SAMPLE_SECONDS = 1e-3  # shorter samples would measure the clock
_WIDTH = 160  # in a narrower console rich would cut the ratios
_LEAST_ROUNDS = 6  # even, so that each candidate goes first equally often


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is timed: one quantity at one size, under `jax.jit` or without it."""

    quantity: str
    shape: Shape
    dtype: str
    jitted: bool = True


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of jaxsoft and of its peer in one cell.

    The ratio is that of jaxsoft to the peer, the median over the rounds; `low` and `high` are its
    quartiles. Below 1 jaxsoft is faster.
    """

    cell: Cell
    seconds: float
    peer_seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


# ----------------------------------------------------------------------------------- quantities


def _forward(function: Callable[[Array], Array]) -> Computation:
    return lambda x, g, labels: function(x)


def _forward_and_vjp(function: Callable[[Array], Array]) -> Computation:
    def both(x: Array, g: Array, labels: Array) -> tuple[Array, Array]:
        out, pullback = jax.vjp(function, x)
        return out, pullback(g)[0]

    return both


def _loss(loss: Callable[[Array, Array], Array]) -> Computation:
    return lambda x, g, labels: loss(x, labels)


def _loss_and_gradient(loss: Callable[[Array, Array], Array]) -> Computation:
    def both(x: Array, g: Array, labels: Array) -> tuple[Array, Array]:
        losses, pullback = jax.vjp(lambda x: loss(x, labels), x)
        return losses, pullback(jnp.ones_like(losses))[0]

    return both


def _peer_loss(x: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


# For each quantity jaxsoft's computation and the peer's.
QUANTITIES: dict[str, tuple[Computation, Computation]] = {
    "forward": (_forward(jaxsoft.softmax), _forward(jax.nn.softmax)),
    "forward + VJP": (_forward_and_vjp(jaxsoft.softmax), _forward_and_vjp(jax.nn.softmax)),
    "loss": (_loss(jaxsoft.cross_entropy), _loss(_peer_loss)),
    "loss + gradient": (_loss_and_gradient(jaxsoft.cross_entropy), _loss_and_gradient(_peer_loss)),
}

# ---------------------------------------------------------------------------------- measurement


def cells(*, quick: bool) -> list[Cell]:
    """All that is timed, in the order of the tables."""
    shapes = QUICK_SHAPES if quick else SHAPES
    compiled = [Cell(q, shape, dtype) for dtype in DTYPES for q in QUANTITIES for shape in shapes]
    return compiled + [Cell(q, EAGER_SHAPE, "float32", jitted=False) for q in QUANTITIES]


def measure(cell: Cell, seconds: float, seed: int) -> Timing:
    """Times one cell for about `seconds`, after compilation."""
    keys = jax.random.split(jax.random.key(seed), 3)
    args = (
        (2 * jax.random.normal(keys[0], cell.shape, jnp.float32)).astype(cell.dtype),
        jax.random.normal(keys[1], cell.shape, jnp.float32).astype(cell.dtype),
        jax.random.randint(keys[2], cell.shape[:1], 0, cell.shape[1], jnp.int32),
    )
    computations = QUANTITIES[cell.quantity]
    programs = [jax.jit(c) for c in computations] if cell.jitted else computations
    own, peer = interleaved(programs, args, seconds)
    ratios = [a / b for a, b in zip(own, peer, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(
        cell=cell,
        seconds=statistics.median(own),
        peer_seconds=statistics.median(peer),
        ratio=ratio,
        low=low,
        high=high,
        rounds=len(ratios),
    )


# Every round times each program once, and the first of one round is the last of the next: what
# else runs on the machine, and what the caches hold, falls on both alike.
def interleaved(
    programs: Sequence[Callable[..., Any]], args: tuple[Array, ...], seconds: float
) -> list[list[float]]:
    """Returns the seconds per call of each program, round by round."""

    def sample(program: Callable[..., Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(program(*args))
        return (time.perf_counter() - start) / calls

    for program in programs:
        sample(program, 1)  # compiles
    calls = math.ceil(_SAMPLE_SECONDS / min(sample(program, 1) for program in programs))
    samples: list[list[float]] = [[] for _ in programs]
    order = list(range(len(programs)))
    end = time.perf_counter() + seconds
    while len(samples[0]) < _LEAST_ROUNDS or len(samples[0]) % 2 or time.perf_counter() < end:
        for i in order:
            samples[i].append(sample(programs[i], calls))
        order.reverse()
    return samples


# -------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table: its title, the headings of its columns and the text of its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(timings: Sequence[Timing]) -> list[Grid]:
    """One table for each dtype under `jax.jit`, with the geometric means, and one without it."""
    tables = []
    for jitted, dtype in dict.fromkeys((t.cell.jitted, t.cell.dtype) for t in timings):
        chosen = [t for t in timings if (t.cell.jitted, t.cell.dtype) == (jitted, dtype)]
        shapes = dict.fromkeys(t.cell.shape for t in chosen)
        rows = []
        for quantity in dict.fromkeys(t.cell.quantity for t in chosen):
            line = [t for t in chosen if t.cell.quantity == quantity]
            by_shape = {t.cell.shape: _ratio(t) for t in line}
            mean = statistics.geometric_mean(t.ratio for t in line)
            ratios = (by_shape[shape] for shape in shapes)
            if jitted:
                rows.append((quantity, *ratios, f"{mean:.2f}"))
            else:
                times = (f"{t * 1e6:.0f}" for t in (line[0].seconds, line[0].peer_seconds))
                rows.append((quantity, *ratios, *times))
        last = ("geometric mean",) if jitted else ("jaxsoft, µs", "peer, µs")
        title = f"{dtype}, under jax.jit" if jitted else f"{dtype}, without jax.jit"
        columns = (title, *(f"{size}×{n}" for size, n in shapes), *last)
        tables.append(Grid(title, columns, tuple(rows)))
    return tables


def _ratio(timing: Timing) -> str:
    return f"{timing.ratio:.2f} ({timing.low:.2f}–{timing.high:.2f})"


def markdown(grid: Grid) -> str:
    """The table in Markdown."""
    ruler = ("---", *("---:" for _ in grid.columns[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (grid.columns, ruler, *grid.rows))


def plain(grid: Grid) -> str:
    """The table as aligned text."""
    lines = (grid.columns, *grid.rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def header() -> str:
    """The device and the versions, in one line."""
    device = jax.devices()[0]
    kind = f"CPU, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
    python = platform.python_version()
    return f"{kind}; jaxsoft {jaxsoft.__version__}, {packages}, Python {python}"


_CAPTION = (
    "Time of jaxsoft divided by that of its peer, jax.nn.softmax (forward) or "
    "optax.softmax_cross_entropy_with_integer_labels (loss): the median over rounds that time "
    "both in turn, and its quartiles. Below 1 jaxsoft is faster."
)

# ------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(argv)
    seconds = options.seconds or (0.2 if options.quick else 2.0)
    chosen = cells(quick=options.quick)
    rich = importlib.util.find_spec("rich") is not None
    show = markdown if options.markdown else _as_rich if rich else plain
    steps: Iterable[Cell] = _tracked(chosen) if rich else chosen
    print(header())
    print(_CAPTION, flush=True)
    timings = [measure(cell, seconds, options.seed) for cell in steps]
    for grid in grids(timings):
        print()
        print(show(grid))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=_CAPTION)
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    parser.add_argument(
        "--seconds",
        type=_positive,
        help="time spent on each cell (default: 2, with --quick 0.2)",
    )
    parser.add_argument("--markdown", action="store_true", help="print tables for the README")
    parser.add_argument("--seed", type=int, default=0, help="of the logits (default: 0)")
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return number


def _tracked(steps: Sequence[Cell]) -> Iterator[Cell]:
    """Yields the steps; meanwhile a terminal shows a progress bar."""
    # Inside the function, for rich is optional.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import track  # noqa: PLC0415

    console = Console(stderr=True)
    yield from track(
        steps, "timing", console=console, transient=True, disable=not console.is_terminal
    )


def _as_rich(grid: Grid) -> str:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(grid.columns):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


if __name__ == "__main__":
    sys.exit(main())
