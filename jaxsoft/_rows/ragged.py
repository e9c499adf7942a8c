"""Rows of any length in one array: which entries of the first axis make a row, and their logits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._rows.logits import Logits, compute_dtype, gap, positive, scaled


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=["count", "is_sorted"]
)
@dataclasses.dataclass(frozen=True)
class Segments:
    """In place of the axis of the classes: which entries of the first axis are one row.

    Entries of no segment make a segment before the others and one behind them, whose results are
    not those of any segment: to mask these entries before they are summed would take longer than
    all the rest (XLA:CPU, jax 0.10).

    Attributes:
        ids: the number of the segment of each entry, counted with the one before.
        count: how many segments there are, with these two.
        is_sorted: whether the numbers ascend.
    """

    ids: Any  # Int[Array, " n"], or what JAX puts into a tree in its place
    count: int
    is_sorted: bool

    def outside(self, x: Array) -> Array:
        """Which entries of the first axis of x are of no segment, to be broadcast."""
        outside = (self.ids == 0) | (self.ids == self.count - 1)
        return jnp.expand_dims(outside, tuple(range(1, x.ndim)))

    def sum(self, terms: Array) -> Array:
        """The sum over each segment."""
        return self._reduced(jax.ops.segment_sum, terms)

    def largest(self, x: Array) -> Array:
        """The largest entry of each segment; the lowest finite number without one."""
        lowest = float(jnp.finfo(x.dtype).min)
        return jnp.maximum(self._reduced(jax.ops.segment_max, x), lowest)

    def expand(self, of_segment: Array) -> Array:
        """What a segment has, for each of its entries."""
        return of_segment.at[self.ids].get(
            indices_are_sorted=self.is_sorted, mode="promise_in_bounds"
        )

    def _reduced(self, reduce: Any, x: Array) -> Array:
        return reduce(
            x,
            self.ids,
            self.count,
            indices_are_sorted=self.is_sorted,
            mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )


def prepared(
    x: Array, ids: Array, temperature: Array | None, count: int, is_sorted: bool
) -> tuple[Logits, Segments, Array]:
    """The logits, what is a row of them, and m / T of each segment."""
    dtype = compute_dtype(x.dtype)
    segments = Segments(jnp.clip(ids, -1, count) + 1, count + 2, is_sorted)
    x = x.astype(dtype)
    top = segments.largest(lax.stop_gradient(x))
    if temperature is None:
        return Logits(x, top), segments, top
    beside = [(1, 1)] + [(0, 0)] * (temperature.ndim - 1)
    temperature = jnp.pad(positive(temperature, dtype), beside, constant_values=1)
    z = gap(x, segments.expand(top), segments.expand(temperature))
    shift = jnp.where(top == jnp.inf, top, scaled(top, temperature))
    return Logits(z, jnp.zeros_like(top)), segments, shift
