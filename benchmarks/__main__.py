"""`python -m benchmarks`: jaxsoft against jax.nn and optax, in turns in one process."""

import argparse
import dataclasses
import importlib.util
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TypeVar

import jax

import jaxsoft
from benchmarks import jacobian, linear
from jaxsoft._demo.timing import QUANTITIES, Shape, Timing, arguments, timing

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

T = TypeVar("T")

_WIDTH = 160  # in a narrower console rich would cut the ratios
_LEAST_ROUNDS = 6
# Short names, for the tables are wide.
_LABELS = {
    "softmax": "forward",
    "softmax + VJP": "forward + VJP",
    "cross-entropy": "loss",
    "cross-entropy + gradient": "loss + gradient",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is timed: one quantity at one size, under `jax.jit` or without it."""

    quantity: str
    shape: Shape
    dtype: str
    jitted: bool = True


def cells(*, quick: bool) -> list[Cell]:
    """All that is timed, in the order of the tables."""
    shapes = QUICK_SHAPES if quick else SHAPES
    compiled = [Cell(q, shape, dtype) for dtype in DTYPES for q in QUANTITIES for shape in shapes]
    return compiled + [Cell(q, EAGER_SHAPE, "float32", jitted=False) for q in QUANTITIES]


def measure(cell: Cell, seconds: float, seed: int) -> Timing:
    """Times one cell for about `seconds`, after compilation."""
    quantity, args = QUANTITIES[cell.quantity], arguments(cell.shape, cell.dtype, seed)
    programs = (quantity.own, quantity.peers)
    own, peers = map(jax.jit, programs) if cell.jitted else programs
    return timing(own, peers, args, rounds=_LEAST_ROUNDS, seconds=seconds)


# -------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table: its title, the headings of its columns and the text of its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(timings: Mapping[Cell, Timing]) -> list[Grid]:
    """One table for each dtype under `jax.jit`, with the geometric means, and one without it."""
    tables = []
    for jitted, dtype in dict.fromkeys((cell.jitted, cell.dtype) for cell in timings):
        chosen = [cell for cell in timings if (cell.jitted, cell.dtype) == (jitted, dtype)]
        shapes = dict.fromkeys(cell.shape for cell in chosen)
        rows = []
        for quantity in dict.fromkeys(cell.quantity for cell in chosen):
            by_shape = {cell.shape: timings[cell] for cell in chosen if cell.quantity == quantity}
            line = [by_shape[shape] for shape in shapes]
            if jitted:
                last = (f"{statistics.geometric_mean(t.ratio for t in line):.2f}",)
            else:
                last = tuple(f"{t * 1e6:.0f}" for t in (line[0].seconds, line[0].peer_seconds))
            rows.append((_LABELS[quantity], *map(_ratio, line), *last))
        headings = ("geometric mean",) if jitted else ("jaxsoft, µs", "peer, µs")
        title = f"{dtype}, under jax.jit" if jitted else f"{dtype}, without jax.jit"
        columns = (title, *(f"{size}×{n}" for size, n in shapes), *headings)
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
    optional = [name for name in linear.OPTIONAL if importlib.util.find_spec(name) is not None]
    names = ("jax", "jaxlib", "optax", *optional)
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    python = platform.python_version()
    return f"{kind}; jaxsoft {jaxsoft.__version__}, {packages}, Python {python}"


_CAPTION = (
    "Time of jaxsoft divided by that of its peer, jax.nn.softmax (forward) or "
    "optax.softmax_cross_entropy_with_integer_labels (loss): the median over rounds that time "
    "both in turn, and its quartiles. Below 1 jaxsoft is faster. Last, how many times as fast the "
    "largest eigenvalue of the Jacobian is as the dense way."
)

# ------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(argv)
    seconds = options.seconds or (0.2 if options.quick else 2.0)
    rich = importlib.util.find_spec("rich") is not None
    show = markdown if options.markdown else _as_rich if rich else plain
    track = _tracked if rich else iter
    print(header())
    print(_CAPTION, flush=True)
    chosen, of_jacobian = cells(quick=options.quick), jacobian.cases(quick=options.quick)
    timings = {cell: measure(cell, seconds, options.seed) for cell in track(chosen)}
    norms = [jacobian.measure(case, options.seed) for case in track(of_jacobian)]
    for grid in (*grids(timings), Grid("Jacobian", jacobian.COLUMNS, tuple(norms))):
        print()
        print(show(grid))
    print()
    print(linear.CAPTION, flush=True)
    of_vocabulary = linear.cases(quick=options.quick)
    measured = [linear.measure(case, seconds, options.seed) for case in track(of_vocabulary)]
    rows = (row for result in measured for row in result.rows)
    print()
    print(show(Grid("large vocabulary", linear.COLUMNS, tuple(rows))))
    left_out = dict.fromkeys(line for result in measured for line in result.left_out)
    if left_out:
        print("", *left_out, sep="\n")
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


def _tracked(steps: Sequence[T]) -> Iterator[T]:
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
