"""The softmax of segments: its time against the formula of segment operations."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

import jaxsoft
from benchmarks import candidates
from benchmarks.candidates import Arguments, Candidate, Result, Sizes, jitted
from benchmarks.sparse import QUANTITIES
from benchmarks.tables import Grid

SHAPES: tuple[Sizes, ...] = ((100_000,), (1_000_000,), (100_000, 8))
QUICK_SHAPES: tuple[Sizes, ...] = ((10_000,),)
ENTRIES = 10  # of a segment, on average

CAPTION = (
    f"Softmax of segments of {ENTRIES} entries on average, along the first axis of all entries, as "
    "above. The peer is the formula that jraph had: jax.ops.segment_max, gather, exp, "
    "jax.ops.segment_sum, gather, divide. The last row of each size is the same with a maximum "
    "that is not differentiated. Sorted: indices_are_sorted=True for all."
)

PEER, OWN, CONSTANT = "formula", "jaxsoft.segment_softmax", "formula, constant maximum"


@dataclasses.dataclass(frozen=True)
class Case(candidates.Case):
    """The shape and dtype of the entries, and whether the numbers of their segments ascend."""

    is_sorted: bool = False

    @property
    def title(self) -> str:
        """What it is called."""
        return f"{super().title}{', sorted' if self.is_sorted else ''}"

    @property
    def count(self) -> int:
        """How many segments there are."""
        return max(1, self.shape[0] // ENTRIES)


def cases(*, quick: bool) -> list[Case]:
    """All that is measured of each quantity, in the order of the table."""
    return [
        Case(shape, "float32", is_sorted)
        for shape in (QUICK_SHAPES if quick else SHAPES)
        for is_sorted in (True, False)
    ]


def arguments(case: Case, seed: int) -> Arguments:
    """Random entries, a cotangent, and the number of the segment of each entry."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x, g = (jax.random.normal(key, case.shape, case.dtype) for key in keys[:2])
    ids = jax.random.randint(keys[2], case.shape[:1], 0, case.count, jnp.int32)
    return 2 * x, g, jnp.sort(ids) if case.is_sorted else ids


# --------------------------------------------------------------------------------- candidates


def _formula(case: Case, *, constant: bool) -> Callable[[Array, Array], Array]:
    def softmax(x: Array, ids: Array) -> Array:
        options = {"num_segments": case.count, "indices_are_sorted": case.is_sorted}
        top = jax.ops.segment_max(lax.stop_gradient(x) if constant else x, ids, **options)
        exponentials = jnp.exp(x - top[ids])
        return exponentials / jax.ops.segment_sum(exponentials, ids, **options)[ids]

    return softmax


def _own(case: Case) -> Callable[[Array, Array], Array]:
    return lambda x, ids: jaxsoft.segment_softmax(
        x, ids, case.count, indices_are_sorted=case.is_sorted
    )


def chosen(name: str, case: Case) -> tuple[Candidate, ...]:
    """All who compute a quantity at one size, the peer first."""
    functions = {
        PEER: _formula(case, constant=False),
        OWN: _own(case),
        CONSTANT: _formula(case, constant=True),
    }
    return tuple(
        Candidate(who, jitted(QUANTITIES[name](function))) for who, function in functions.items()
    )


# ------------------------------------------------------------------------------- measurement


def measure(name: str, case: Case, seconds: float, seed: int) -> Result:
    """Times all who compute a quantity, for about `seconds`."""
    return candidates.measure(case, chosen(name, case), arguments(case, seed), seconds)


def grid(name: str, results: Sequence[Result]) -> Grid:
    """The table of a quantity."""
    lines = [candidates.cells(result, who) for result in results for who in result.measured]
    return Grid(candidates.columns(f"{name} of segments", PEER, "entries"), tuple(lines))
