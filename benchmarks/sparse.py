"""sparsemax, entmax and their loss: the time against softmax, the digits against the exact ones."""

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxsoft
from benchmarks import candidates
from benchmarks.accuracy import in_eps, in_torch, relative
from benchmarks.candidates import Candidate, Case, Result, Sizes, jitted
from benchmarks.tables import Grid
from jaxsoft._demo import timing
from jaxsoft.testing import error_in_eps
from tests.exact import EPS
from tests.exact import rows as exact_rows

Computation = Callable[..., Any]  # of logits, a cotangent, and what else the function takes

SHAPES: tuple[Sizes, ...] = ((50_000, 10), (4096, 1000), (512, 50_304))
QUICK_SHAPES: tuple[Sizes, ...] = ((2000, 10), (128, 1000))
DTYPES = ("float32", "bfloat16")
LEADS, OFFSETS = (-2.0, 0.5, 0.9375, 1.0), (0.0, 1e4, 1e6)

CAPTION = (
    "Sparse probabilities along the last axis, and with them the product with the Jacobian, under "
    "jit. The first row of each size is the peer, jaxsoft.softmax. Time divided by that of the "
    "peer: the median over rounds that time all in turn in one process, and its quartiles. "
    "temporary: what the compiled program needs besides arguments and results, by XLA's "
    "memory_analysis. time / jax.nn: that ratio over the one of jax.nn.softmax. optax and jaxopt: "
    "their projection_simplex, which sorts, under vmap; both are the same algorithm, and jaxopt is "
    "not timed at the largest size."
)
ACCURACY_CAPTION = (
    "The largest error of an entry of sparsemax of one row of 1000 in float32, and the error of "
    "the sum of the row, both in eps of 1, against exact rational arithmetic. narrow: the random "
    "row, divided by 20, so that more classes are in the support."
)
LOSS_CAPTION = (
    "The largest relative error of the loss of sparsemax among 16 examples in float32, against "
    "exact rational arithmetic: jaxsoft.entmax_loss with alpha = 2, and multiclass_sparsemax_loss "
    "of the others. The logit of the label is ahead of 7 others by the number and more, and all "
    "have the offset; as float32 numbers they are exact. Ahead by 1 the loss is exactly 0. “all”: "
    "no digit is right."
)

# --------------------------------------------------------------------------------- quantities


def _forward(function: Callable[..., Array]) -> Computation:
    return lambda x, g, *others: function(x, *others)


def _forward_and_vjp(function: Callable[..., Array]) -> Computation:
    def both(x: Array, g: Array, *others: Array) -> tuple[Array, Array]:
        out, pullback = jax.vjp(lambda x: function(x, *others), x)
        return out, pullback(g)[0]

    return both


VJP = "forward + VJP"
QUANTITIES: Mapping[str, Callable[[Callable[..., Array]], Computation]] = {
    "forward": _forward,
    VJP: _forward_and_vjp,
}

# --------------------------------------------------------------------------------- candidates


def _optax(x: Array) -> Array:
    return jax.vmap(optax.projections.projection_simplex)(x)


def _jaxopt(x: Array) -> Array:
    return jax.vmap(importlib.import_module("jaxopt.projection").projection_simplex)(x)


PEER, FLOOR = "jaxsoft.softmax", "jax.nn.softmax"
OWN = ("jaxsoft.sparsemax", "jaxsoft.entmax")
FUNCTIONS: Mapping[str, Callable[[Array], Array]] = {
    PEER: jaxsoft.softmax,
    FLOOR: jax.nn.softmax,
    OWN[0]: jaxsoft.sparsemax,
    OWN[1]: jaxsoft.entmax,
}
# In float32 alone.
OTHERS: Mapping[str, Callable[[Array], Array]] = {
    "jaxsoft.entmax, alpha=1.25": functools.partial(jaxsoft.entmax, alpha=1.25),
    "jaxsoft.entmax, alpha=1.3": functools.partial(jaxsoft.entmax, alpha=1.3),
    "optax": _optax,
    "jaxopt": _jaxopt,
}
OPTIONAL = ("optax", "jaxopt")  # the former has no VJP in float32 where JAX computes in 64 bits


def chosen(name: str, case: Case) -> tuple[Candidate, ...]:
    """All who compute a quantity at one size, the peer first."""
    functions = dict(FUNCTIONS)
    if case.dtype == "float32":
        functions |= OTHERS
    if case.shape == SHAPES[-1]:
        functions.pop("jaxopt", None)
    return tuple(
        Candidate(who, jitted(QUANTITIES[name](function)), who if who in OPTIONAL else None)
        for who, function in functions.items()
    )


# ------------------------------------------------------------------------------- measurement


def cases(*, quick: bool) -> list[Case]:
    """All that is measured of each quantity, in the order of the table."""
    return [Case(shape, dtype) for dtype in DTYPES for shape in (QUICK_SHAPES if quick else SHAPES)]


def measure(name: str, case: Case, seconds: float, seed: int) -> Result:
    """Times all who compute a quantity, for about `seconds`."""
    rows, n = case.shape
    x, g, _ = timing.arguments((rows, n), case.dtype, seed)
    return candidates.measure(case, chosen(name, case), (x, g), seconds)


def grid(name: str, results: Sequence[Result]) -> Grid:
    """The table of a quantity."""
    lines = []
    for result in results:
        # By the ratios, which are those of one round: of medians the rounds may differ.
        floor = result.of(FLOOR).timing.ratio
        for candidate, found in result.measured.items():
            ratio = f"{found.timing.ratio / floor:.2f}"
            # Without the share of the temporary memory: that of the peer is next to nothing.
            *cells, _ = candidates.cells(result, candidate)
            lines.append((*cells, ratio))
    *columns, _ = candidates.columns(name, "softmax", "rows×n")
    return Grid((*columns, "time / jax.nn"), tuple(lines))


# ------------------------------------------------------------------------------------- accuracy

LIBRARIES: Mapping[str, Callable[[Any], Any]] = {
    "jaxsoft": jaxsoft.sparsemax,
    "optax": optax.projections.projection_simplex,
    "jaxopt": lambda row: _jaxopt(row[None])[0],
    "entmax": in_torch(lambda torch, x, _: importlib.import_module("entmax").sparsemax(x, -1)),
}
LOSSES: Mapping[str, Callable[[Any, Any], Any]] = {
    "jaxsoft": functools.partial(jaxsoft.entmax_loss, alpha=2.0),
    "optax": optax.losses.multiclass_sparsemax_loss,
    "jaxopt": lambda logits, labels: jax.vmap(
        importlib.import_module("jaxopt.loss").multiclass_sparsemax_loss
    )(labels, logits),
}


def rows() -> dict[str, np.ndarray]:
    """The rows whose errors are measured."""
    table = exact_rows("float32")
    drawn = table["random n=1000"]
    return {
        "random": drawn,
        "tied": table["all tied"],
        **{f"narrow, offset {offset:g}": drawn / 20 + np.float32(offset) for offset in OFFSETS},
    }


def digits() -> Grid:
    """The errors of sparsemax in eps of 1, a row for each quantity and row of logits."""
    found = {name: errors(row) for name, row in rows().items()}
    lines = {
        f"{quantity}, {name}": {library: pair[i] for library, pair in pairs.items()}
        for i, quantity in enumerate(("p", "its sum"))
        for name, pairs in found.items()
    }
    return _table("error of sparsemax in eps", lines, lambda error: in_eps(error, "float32"))


def errors(row: np.ndarray) -> dict[str, tuple[float, float]]:
    """The largest error of an entry and that of the sum, of each library that is installed."""
    exact = [float(p) for p in probabilities(row)]
    found = {}
    for library, sparsemax in LIBRARIES.items():
        try:
            p = np.asarray(sparsemax(row))
        except ImportError:
            continue
        total = abs(math.fsum(map(float, p)) - 1) / EPS["float32"]
        found[library] = float(np.max(error_in_eps(p, exact, scale=1.0))), total
    return found


def loss_digits() -> Grid:
    """The relative errors of the loss, a row for each lead of the label and offset."""
    lines = {
        f"ahead by {lead:g}, offset {offset:g}": loss_errors(lead, offset)
        for lead in LEADS
        for offset in OFFSETS
    }
    return _table("relative error of the loss", lines, relative)


def loss_errors(lead: float, offset: float) -> dict[str, float]:
    """The largest relative error of each library that is installed."""
    examples, n = 16, 8
    rng = np.random.default_rng(0)
    # Sixteenths are exact in float32 up to the largest offset.
    logits = -rng.integers(0, 17, (examples, n)) / 16
    logits[:, 1], logits[:, 0] = 0, lead
    logits = (logits + offset).astype(np.float32)
    exact = [float(_loss(row)) for row in logits]
    found = {}
    for library, loss in LOSSES.items():
        try:
            losses = np.asarray(loss(logits, jnp.zeros(examples, jnp.int32)))
        except ImportError:
            continue
        found[library] = float(np.max(error_in_eps(losses, exact))) * EPS["float32"]
    return found


def probabilities(row: np.ndarray) -> list[Fraction]:
    """The exact sparsemax of a row."""
    x = [Fraction(float(entry)) for entry in row]
    sums = itertools.accumulate(sorted(x, reverse=True))
    threshold = max((total - 1) / count for count, total in enumerate(sums, 1))
    return [max(entry - threshold, Fraction(0)) for entry in x]


def _loss(row: np.ndarray) -> Fraction:
    """The exact loss of sparsemax of a row whose label is 0."""
    label = Fraction(float(row[0]))
    terms = [
        p * (Fraction(float(entry)) - label - p / 2)
        for p, entry in zip(probabilities(row), row, strict=True)
    ]
    return sum(terms, Fraction(1, 2))


def _table(
    title: str, lines: Mapping[str, Mapping[str, float]], text: Callable[[float], str]
) -> Grid:
    """A table of errors, with a column for each library that is installed."""
    libraries = next(iter(lines.values()))
    filled = [(name, *(text(found[one]) for one in libraries)) for name, found in lines.items()]
    return Grid((title, *libraries), tuple(filled))
