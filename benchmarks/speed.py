"""The time of every function against jax.nn and optax, in turns in one process."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxsoft
from benchmarks.tables import Grid
from jaxsoft._demo.timing import Timing, timings

Axis = int | tuple[int, ...]
Computation = Callable[[Array, Array, Array, Axis], Any]  # of logits, a cotangent, labels, an axis

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

_LEAST_ROUNDS = 6


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is computed.

    Attributes:
        own: how jaxsoft computes it.
        peer: how jax.nn, optax or the textbook does.
        arrays: how many arrays of the size of the logits it reads and writes at least.
        tuples: whether the peer takes several axes.
        bare: the shortest formula, which loses the digits of what is nearly certain; to tell what
            the others cost.
    """

    own: Computation
    peer: Computation
    arrays: int
    tuples: bool = True
    bare: Computation | None = None


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
        return f"{self.dtype}, {'last' if self.axis == -1 else 'other'} axis"


class Measured(NamedTuple):
    """The time of one cell, and that of the bare formula, if there is one, against the peer."""

    own: Timing
    bare: Timing | None = None


# ----------------------------------------------------------------------------------- quantities


def _forward(function: Callable[..., Array]) -> Computation:
    return lambda x, g, labels, axis: function(x, axis)


def _forward_and_vjp(function: Callable[..., Array]) -> Computation:
    def both(x: Array, g: Array, labels: Array, axis: Axis) -> tuple[Array, Array]:
        out, pullback = jax.vjp(lambda x: function(x, axis), x)
        return out, pullback(g)[0]

    return both


def _loss(loss: Callable[..., Array]) -> Computation:
    return lambda x, g, labels, axis: loss(x, labels, axis)


def _loss_and_gradient(loss: Callable[..., Array]) -> Computation:
    def both(x: Array, g: Array, labels: Array, axis: Axis) -> tuple[Array, Array]:
        losses, pullback = jax.vjp(lambda x: loss(x, labels, axis), x)
        return losses, pullback(jnp.ones_like(losses))[0]

    return both


def _textbook(p: Array, g: Array, axis: Axis) -> Array:
    return p * (g - jnp.sum(p * g, axis, keepdims=True))


def _product(product: Callable[..., Array]) -> Computation:
    return lambda p, g, labels, axis: product(p, g, axis)


def _bare_softmax_and_vjp(x: Array, g: Array, labels: Array, axis: Axis) -> tuple[Array, Array]:
    p = jax.nn.softmax(x, axis)
    product = _textbook(p.astype(jnp.float32), g.astype(jnp.float32), axis)
    return p, product.astype(x.dtype)


def _bare_loss(x: Array, g: Array, labels: Array, axis: Axis) -> Array:
    return _bare_loss_and_exponentials(x, labels, axis)[0]


def _bare_loss_and_gradient(x: Array, g: Array, labels: Array, axis: Axis) -> tuple[Array, Array]:
    loss, exponentials, total = _bare_loss_and_exponentials(x, labels, axis)
    p = exponentials / total
    return loss, (p - jax.nn.one_hot(labels, x.shape[axis], axis=axis)).astype(x.dtype)


def _bare_loss_and_exponentials(x: Array, labels: Array, axis: Axis) -> tuple[Array, Array, Array]:
    z = x.astype(jnp.float32)
    top = jnp.max(z, axis, keepdims=True)
    exponentials = jnp.exp(z - top)
    total = jnp.sum(exponentials, axis, keepdims=True)
    at_label = jnp.take_along_axis(z, jnp.expand_dims(labels, axis), axis)
    return ((top - at_label) + jnp.log(total)).squeeze(axis), exponentials, total


_peer_loss = optax.softmax_cross_entropy_with_integer_labels
_own_loss = jaxsoft.cross_entropy
FROM_P = "VJP from p"

QUANTITIES = {
    "softmax": Quantity(_forward(jaxsoft.softmax), _forward(jax.nn.softmax), 2),
    "log_softmax": Quantity(_forward(jaxsoft.log_softmax), _forward(jax.nn.log_softmax), 2),
    "logsumexp": Quantity(_forward(jaxsoft.logsumexp), _forward(jax.nn.logsumexp), 1),
    "softmax + VJP": Quantity(
        _forward_and_vjp(jaxsoft.softmax),
        _forward_and_vjp(jax.nn.softmax),
        4,
        bare=_bare_softmax_and_vjp,
    ),
    "log_softmax + VJP": Quantity(
        _forward_and_vjp(jaxsoft.log_softmax), _forward_and_vjp(jax.nn.log_softmax), 4
    ),
    FROM_P: Quantity(_product(jaxsoft.softmax_vjp), _product(_textbook), 3),
    "loss": Quantity(_loss(_own_loss), _loss(_peer_loss), 1, tuples=False, bare=_bare_loss),
    "loss + gradient": Quantity(
        _loss_and_gradient(_own_loss),
        _loss_and_gradient(_peer_loss),
        2,
        tuples=False,
        bare=_bare_loss_and_gradient,
    ),
}

# ---------------------------------------------------------------------------------- measurement


def cells(*, quick: bool) -> list[Cell]:
    """All that is timed, in the order of the tables."""
    places: list[tuple[tuple[int, ...], Axis]] = [(s, -1) for s in (QUICK_LAST if quick else LAST)]
    compiled = [
        Cell(name, shape, axis, dtype)
        for chosen in (places, [] if quick else ELSEWHERE)
        for dtype in DTYPES
        for name, quantity in QUANTITIES.items()
        for shape, axis in chosen
        if quantity.tuples or isinstance(axis, int)
    ]
    return compiled + [Cell(name, EAGER, -1, "float32", jitted=False) for name in QUANTITIES]


def measure(cell: Cell, seconds: float, seed: int) -> Measured:
    """Times one cell for about `seconds`, after compilation."""
    quantity = QUANTITIES[cell.quantity]

    def at(computation: Computation) -> Callable[..., Any]:
        program = lambda x, g, labels: computation(x, g, labels, cell.axis)
        return jax.jit(program) if cell.jitted else program

    programs = [at(quantity.own)]
    if quantity.bare is not None and cell.jitted:
        programs.append(at(quantity.bare))
        seconds *= 1.5
    peer, args = at(quantity.peer), arguments(cell, seed)
    timed = timings(programs, peer, args, rounds=_LEAST_ROUNDS, seconds=seconds)
    return Measured(*timed)


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
