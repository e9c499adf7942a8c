"""How queries and keys are divided into chunks, and the pairs of chunks that see each other."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxsoft._core import slices
from jaxsoft._core.sizes import Size, known

# The numbers of a chunk of queries and of a chunk of keys.
Pair = tuple[Int[Array, ""] | int, Int[Array, ""] | int]


# An argument of a rule that is no tree: JAX_CUSTOM_VJP3 would wrap its leaves.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Division:
    """What is known of the scores before any of them is computed.

    Attributes:
        query_chunk: how many queries make a chunk; it divides the number of queries.
        key_chunk: how many keys make a chunk; it divides the number of keys.
        key_count: how many keys there are; those after them only fill the last chunk.
        left: how far a query sees back; None for no limit.
        right: how far a query sees ahead; None for no limit.
    """

    query_chunk: Size
    key_chunk: Size
    key_count: Size
    left: int | None
    right: int | None


def over_pairs(
    step: Callable[[Any, Pair], tuple[Any, None]], carry: Any, q: Array, division: Division
) -> Any:
    """Goes over the pairs of chunks that see anything of each other."""
    pairs = _pairs(division, q.shape[1])
    if len(pairs) == 1:
        return step(carry, pairs[0])[0]
    queries, keys = jnp.asarray(pairs, jnp.int32).reshape(-1, 2).T
    return lax.scan(step, carry, (queries, keys))[0]


def _pairs(division: Division, query_count: Size) -> list[tuple[int, int]]:
    t, s = division.query_chunk, division.key_chunk
    return [
        (i, j)
        for i, j in itertools.product(
            range(_count(query_count, t)), range(_count(division.key_count, s))
        )
        if (division.right is None or j * s <= i * t + t - 1 + division.right)
        and (division.left is None or j * s + s - 1 >= i * t - division.left)
    ]


def _count(length: Size, size: Size) -> int:
    """How many chunks there are; 1 if the size is symbolic."""
    return 1 if known(lambda: length <= size, True) else math.ceil(length / size)


def cut(x: Array, i: Array | int, size: Size, axis: int) -> Array:
    """Chunk i along an axis, or an array that all chunks share."""
    if known(lambda: x.shape[axis] in (1, size), True):
        return x
    return lax.dynamic_slice_in_dim(x, i * size, size, axis)


def query_chunk(tree: Any, i: Array | int, division: Division) -> Any:
    """The arrays of chunk i of the queries."""
    return jax.tree.map(lambda x: cut(x, i, division.query_chunk, 1), tree)


def put(total: Array, part: Array, *along: tuple[int, Array | int]) -> Array:
    """An array with a chunk replaced, given the axes of which this is a chunk and its numbers."""
    if known(lambda: total.shape == part.shape, True):
        return part
    return lax.dynamic_update_slice(total, part, _starts(total, part, along))


def add(total: Array | None, part: Array | None, *along: tuple[int, Array | int]) -> Any:
    """An array with a part added to a chunk; as it is, if there is no part."""
    if total is None or part is None:
        return total
    return slices.added(total, part, _starts(total, part, along))


def _starts(total: Array, part: Array, along: tuple[tuple[int, Array | int], ...]) -> list[Array]:
    """Where a part begins in a total, given the axes of which it is a chunk and its numbers."""

    def start(size: Size, of_part: Size, i: Array | int) -> Array:
        whole = known(lambda: size == of_part, True)
        return jnp.asarray(0 if whole else i * of_part, jnp.int32)

    sizes = zip(total.shape, part.shape, strict=True)
    return [start(*both, dict(along).get(axis, 0)) for axis, both in enumerate(sizes)]
