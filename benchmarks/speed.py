"""The time of every function against jax.nn and optax, in turns in one process."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import forms
from benchmarks.quantities import FROM_P, QUANTITIES, Axis, Computation
from benchmarks.tables import Grid
from jaxsoft._demo.timing import Timing, timings

LAST = (
    (1_000_000, 2),
    (200_000, 10),
    (50_000, 128),
    (4096, 1000),
    (2048, 4096),
    (1024, 16_384),
    (512, 50_304),
    (64, 262_144),
)
QUICK_LAST = ((20_000, 10), (256, 1000))
PRIME = (512, 49_999)  # no number divides the length
FEW = ((200_000, 10), (4096, 1000), (16_384, 1000), PRIME, (512, 50_304))
ELSEWHERE: tuple[tuple[tuple[int, ...], Axis], ...] = (
    ((1000, 4096), 0),
    ((64, 1000, 64), 1),
    ((4096, 32, 32), (1, 2)),
)
EAGER = (8, 10)
DTYPES = ("float32", "bfloat16", "float16")

CAPTION = (
    "Time of jaxsoft divided by that of jax.nn, or of optax for the loss (of the textbook formula "
    "p∘(g − ⟨p, g⟩) for the VJP from p): the median over rounds that time both in turn, and its "
    "quartiles. Below 1 jaxsoft is faster."
)

PORTABLE_CAPTION = (
    "Time with the portable forms over that with the forms of this platform: what the latter buy."
)

_LEAST_ROUNDS = 6


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is timed: one quantity at one size, under `jax.jit` or without it."""

    quantity: str
    shape: tuple[int, ...]
    axis: Axis
    dtype: str
    jitted: bool = True

    @property
    def place(self) -> str:
        """The sizes, and the axis if it is not the last."""
        sizes = "×".join(map(str, self.shape))
        return sizes if self.axis == -1 else f"{sizes}, axis {self.axis}"

    @property
    def table(self) -> str:
        """Which table it stands in."""
        if not self.jitted:
            return f"{self.dtype}, without jax.jit"
        if QUANTITIES[self.quantity].few or self.shape == PRIME:
            return f"{self.dtype}, more quantities and a prime length"
        return f"{self.dtype}, {'last' if self.axis == -1 else 'other'} axis"


class Measured(NamedTuple):
    """The time of one cell against the peer, of the bare formula, and with portable forms."""

    own: Timing
    bare: Timing | None = None
    portable: Timing | None = None


# ---------------------------------------------------------------------------------- measurement


def cells(*, quick: bool) -> list[Cell]:
    """All that is timed, in the order of the tables."""
    places: list[tuple[tuple[int, ...], Axis]] = [(s, -1) for s in (QUICK_LAST if quick else LAST)]
    many = [name for name, quantity in QUANTITIES.items() if not quantity.few]
    compiled = [
        Cell(name, shape, axis, dtype)
        for chosen in (places, [] if quick else ELSEWHERE)
        for dtype in DTYPES
        for name in many
        for shape, axis in chosen
        if QUANTITIES[name].tuples or isinstance(axis, int)
    ]
    compiled += [
        Cell(name, shape, -1, dtype)
        for dtype in DTYPES[: 1 if quick else 2]
        for name in QUANTITIES
        for shape in (QUICK_LAST[:1] if quick else FEW)
        if QUANTITIES[name].few or shape == PRIME
    ]
    return compiled + [Cell(name, EAGER, -1, "float32", jitted=False) for name in many]


def measure(cell: Cell, seconds: float, seed: int, *, portable: bool = False) -> Measured:
    """Times one cell for about `seconds` a program, after compilation."""
    quantity, args = QUANTITIES[cell.quantity], arguments(cell, seed)

    def at(computation: Computation) -> Callable[..., Any]:
        program = lambda x, g, labels: computation(x, g, labels, cell.axis)
        return jax.jit(program).lower(*args).compile() if cell.jitted else program

    programs = {"own": at(quantity.own)}
    if quantity.bare is not None and cell.jitted:
        programs["bare"] = at(quantity.bare)
    if portable and cell.jitted:
        with forms.portable():
            programs["portable"] = at(quantity.own)
    seconds *= (len(programs) + 1) / 2
    peer, own = at(quantity.peer), list(programs.values())
    timed = timings(own, peer, args, rounds=_LEAST_ROUNDS, seconds=seconds)
    return Measured(**dict(zip(programs, timed, strict=True)))


def arguments(cell: Cell, seed: int) -> tuple[Array, Array, Array]:
    """Random logits, or probabilities for the VJP from p; a cotangent; labels."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = 2 * jax.random.normal(keys[0], cell.shape, jnp.float32)
    if cell.quantity == FROM_P:
        x = jax.nn.softmax(x, cell.axis)
    labels = jnp.zeros((), jnp.int32)
    if isinstance(cell.axis, int):
        n = cell.shape[cell.axis]
        rows = tuple(size for a, size in enumerate(cell.shape) if a != cell.axis % x.ndim)
        labels = jax.random.randint(keys[2], rows, 0, n, jnp.int32)
    g = jax.random.normal(keys[1], cell.shape, jnp.float32)
    if QUANTITIES[cell.quantity].soft:
        g = jax.nn.softmax(g)
    if cell.quantity == "logsumexp":
        g = jnp.zeros(())  # it is not differentiated here
    return x.astype(cell.dtype), g.astype(cell.dtype), labels


def bandwidth(cell: Cell, timed: Timing) -> float:
    """Gigabytes per second of what has to be read and written at least."""
    size = math.prod(cell.shape) * jnp.dtype(cell.dtype).itemsize
    return QUANTITIES[cell.quantity].arrays * size / timed.seconds / 1e9


# -------------------------------------------------------------------------------------- tables


def grids(timings: Mapping[Cell, Timing]) -> list[Grid]:
    """The ratios, one table for each dtype and kind of axis, and one without `jax.jit`."""
    found = []
    for title in dict.fromkeys(cell.table for cell in timings):
        chosen = [cell for cell in timings if cell.table == title]
        places = dict.fromkeys(cell.place for cell in chosen)
        rows = []
        for quantity in dict.fromkeys(cell.quantity for cell in chosen):
            there = {cell.place: timings[cell] for cell in chosen if cell.quantity == quantity}
            line = [ratio(there[place]) if place in there else "–" for place in places]
            if chosen[0].jitted:
                line.append(f"{geometric_mean(there.values()):.2f}")
            else:
                only = next(iter(there.values()))
                line += [f"{t * 1e6:.0f}" for t in (only.seconds, only.peer_seconds)]
            rows.append((quantity, *line))
        last = ("geometric mean",) if chosen[0].jitted else ("jaxsoft, µs", "peer, µs")
        found.append(Grid((title, *places, *last), tuple(rows)))
    return found


def portable_grids(measured: Mapping[Cell, Measured]) -> list[Grid]:
    """The time with the portable forms over that with the chosen ones, where it was measured."""
    found = []
    for title in dict.fromkeys(cell.table for cell in measured):
        ratios: dict[str, dict[str, float]] = {}
        for cell, one in measured.items():
            if cell.table == title and one.portable is not None:
                bought = one.portable.seconds / one.own.seconds
                ratios.setdefault(cell.quantity, {})[cell.place] = bought
        places = dict.fromkeys(place for row in ratios.values() for place in row)
        rows = [
            (
                quantity,
                *(f"{row[place]:.2f}" if place in row else "–" for place in places),
                f"{statistics.geometric_mean(row.values()):.2f}",
            )
            for quantity, row in ratios.items()
        ]
        if rows:
            found.append(Grid((f"portable: {title}", *places, "geometric mean"), tuple(rows)))
    return found


def bandwidths(timings: Mapping[Cell, Timing]) -> Grid:
    """The bandwidth achieved along the last axis in float32."""
    chosen = [cell for cell in timings if cell.table == "float32, last axis"]
    places = dict.fromkeys(cell.place for cell in chosen)
    rows = []
    for quantity in dict.fromkeys(cell.quantity for cell in chosen):
        there = [bandwidth(cell, timings[cell]) for cell in chosen if cell.quantity == quantity]
        rows.append((quantity, *(f"{value:.1f}" for value in there)))
    return Grid(("GB/s, float32", *places), tuple(rows))


def ratio(timed: Timing) -> str:
    """The ratio with its quartiles."""
    return f"{timed.ratio:.2f} ({timed.low:.2f}–{timed.high:.2f})"


def geometric_mean(timings: Iterable[Timing]) -> float:
    """The geometric mean of the ratios."""
    return statistics.geometric_mean(timed.ratio for timed in timings)
