"""Rows of entmax for α > 2: the probability w of the smallest entry z_k of the support.

There the slopes p^(2-α) have no bound, and no threshold has digits enough. With z_k known, and
b_i = [a (z_i - z_k)]^(1/a) of the entries above it,

    p_i = (w^a + b_i^a)^(1/a),

in which nothing cancels; ∂p_i/∂w = (w / p_i)^(a-1) is at most 1; and Σp is convex in w: from above
the steps of Newton's method descend and never pass the solution.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from jaxsoft._core import double_word
from jaxsoft._core.axes import ClassAxis
from jaxsoft._rows import orders
from jaxsoft._rows.logits import divisor, nan_unless
from jaxsoft._rows.orders import Order

_STEPS = {4: 8, 8: 10}  # after which w has converged, for numbers of so many bytes


class Smallest(NamedTuple):
    """The smallest entry of the support of each row.

    Attributes:
        z: z_k; NaN in a row without a number.
        p: w, with all its digits also where the largest entry has nearly all of the sum.
    """

    z: Float[Array, "..."]
    p: Float[Array, "..."]


def gap(z: Float[Array, "..."], order: Order, smallest: Smallest) -> Float[Array, "..."]:
    """(1 - p^a) / a of an entry of each row that is in the support: 0 or more."""
    a, absent = order.excess, z == -jnp.inf
    distance = smallest.z - jnp.where(absent, 0, z)
    depth = (1 - lax.pow(smallest.p, jnp.broadcast_to(a, smallest.p.shape))) / a
    return jnp.where(absent, jnp.inf, jnp.maximum(depth + distance, 0))


def probabilities(
    z: Float[Array, "..."], order: Order, smallest: Smallest, axis: ClassAxis
) -> Float[Array, "..."]:
    """P, small entries with all their digits; 0 in a row of -inf alone."""
    of_smallest, a = axis.expand(smallest.z), axis.expand(order.excess)
    b = _distances(z, of_smallest, a)
    return jnp.where(z < of_smallest, 0, _norm(axis.expand(smallest.p), b, a))


def solution(
    z: Float[Array, "..."], top: Float[Array, "..."], order: Order, axis: ClassAxis
) -> tuple[Float[Array, "..."], Smallest]:
    """P, and the smallest entry."""
    is_top = axis.one_hot(jnp.argmax(z, axis.position), z)
    of_smallest = _smallest_entry(z, top, is_top, order, axis)
    a, absent = axis.expand(order.excess), z < axis.expand(of_smallest)
    b = _distances(z, axis.expand(of_smallest), a)

    def at(w: Array) -> tuple[Array, Array, Array]:
        of_row = axis.expand(w)
        p = jnp.where(absent, 0, _norm(of_row, b, a))
        slope = lax.pow(of_row / divisor(p), jnp.broadcast_to(a - 1, p.shape))
        slope = jnp.where(absent, 0, slope)
        excess = _excess(p, top, is_top, order, Smallest(of_smallest, w), axis)
        return p, slope, excess / divisor(axis.sum(slope))

    def step(_: Any, w: Array) -> Array:
        return jnp.clip(w - at(w)[2], 0, 1)

    w = lax.fori_loop(0, _STEPS[z.dtype.itemsize], step, jnp.clip(1 - axis.sum(b), 0, 1))
    p, slope, change = at(w)
    # The last step moves p itself.
    p = jnp.maximum(p - slope * axis.expand(change), 0)
    return p, Smallest(of_smallest, jnp.clip(w - change, 0, 1))


# Σb < 1 for a threshold at z_k, and no longer for the next entry below it. The bisection is one of
# the order of floating-point numbers: it ends at one of them, however close to 0.
def _smallest_entry(z: Array, top: Array, is_top: Array, order: Order, axis: ClassAxis) -> Array:
    """z_k of each row."""
    a = axis.expand(order.excess)

    def step(_: Any, between: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = between
        middle = (low & high) + ((low ^ high) >> 1)
        threshold = _of_rank(middle, z.dtype)
        b = _distances(z, axis.expand(threshold), a)
        nothing = Smallest(threshold, jnp.zeros_like(threshold))
        is_below = (_excess(b, top, is_top, order, nothing, axis) >= 0) | (middle == low)
        return jnp.where(is_below, middle, low), jnp.where(is_below, high, middle)

    # In a row of -inf alone the maximum is the lowest number, and no threshold is below that.
    lowest = _rank(jnp.full_like(top, jnp.finfo(z.dtype).min))
    low = jnp.maximum(_rank(top - 1 / order.excess) - 1, lowest)
    _, high = lax.fori_loop(0, 8 * z.dtype.itemsize, step, (low, _rank(top + 0 * order.excess)))
    support = z >= axis.expand(_of_rank(high, z.dtype))
    smallest = jnp.min(jnp.where(support, z, axis.expand(top)), axis.position)
    return nan_unless(jnp.isfinite(top) & jnp.isfinite(order.excess), smallest)


def _rank(x: Array) -> Array:
    """Whole numbers in the order of the floating-point ones."""
    return _in_order(lax.bitcast_convert_type(x, np.dtype(f"int{8 * x.dtype.itemsize}")))


def _of_rank(rank: Int[Array, "..."], dtype: DTypeLike) -> Array:
    """The number of a rank."""
    return lax.bitcast_convert_type(_in_order(rank), dtype)


def _in_order(bits: Array) -> Array:
    """Ranks of the bits of numbers, and bits of ranks: negative numbers are in reverse order."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _distances(z: Array, smallest: Array, a: Array) -> Array:
    """B of the entries above the smallest one, else 0."""
    distance = jnp.maximum(a * (z - smallest), 0)
    above = jnp.where(distance == 0, 1, distance)
    return jnp.where(distance == 0, 0, orders.inverse_power(above, a))


def _norm(w: Array, b: Array, a: Array) -> Array:
    """(w^a + b^a)^(1/a)."""
    larger = jnp.maximum(w, b)
    ratio = jnp.minimum(w, b) / divisor(larger)
    power = lax.pow(ratio, jnp.broadcast_to(a, ratio.shape))
    return larger * lax.pow(1 + power, jnp.broadcast_to(1 / a, ratio.shape))


# The sum of the others less 1 - p of the largest: for a confident row, of two small numbers.
def _excess(
    p: Array, top: Array, is_top: Array, order: Order, smallest: Smallest, axis: ClassAxis
) -> Array:
    """Σp - 1."""
    a = order.excess
    distance, distance_low = double_word.sum_of(top, -smallest.z)
    t, t_low = double_word.product_of(a, distance)
    u, u_low = double_word.sum_of(jnp.ones_like(t), -t)
    u += (u_low - (t_low + a * distance_low)) - lax.pow(smallest.p, a)  # 1 - p^a of the largest
    is_small = u < 0.25
    by_root = 1 - axis.sum(jnp.where(is_top, p, 0))
    rest = jnp.where(is_small, orders.rest(jnp.where(is_small, u, 0), a), by_root)
    high, low = orders.exact_sum(jnp.where(is_top, 0, p), axis)
    return (high - rest) + low
