"""The probabilities of rows of entmax: for α ≤ 2 by the threshold, else by the smallest entry.

The forms meet at α = 2. Where α is an array both are computed, and each row takes its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft._core.axes import ClassAxis
from jaxsoft._rows import by_level, by_smallest
from jaxsoft._rows.by_level import Level
from jaxsoft._rows.by_smallest import Smallest
from jaxsoft._rows.logits import Logits
from jaxsoft._rows.orders import Order


class Threshold(NamedTuple):
    """What the rows' sums of 1 give.

    Attributes:
        level: λ; None if α is known to be more than 2.
        smallest: the smallest entry of the support; None if α is known to be at most 2.
    """

    level: Level | None
    smallest: Smallest | None


def solution(
    logits: Logits, order: Order, axis: ClassAxis
) -> tuple[Float[Array, "..."], Threshold]:
    """P, and from what it can be computed again: constants."""
    z, top, order = lax.stop_gradient((logits.z, logits.top, order))
    of_level = of_smallest = level = smallest = None
    if not order.is_steep:
        of_level, level = by_level.solution(z, top, _convex(order), axis)
    if not order.is_convex:
        of_smallest, smallest = by_smallest.solution(z, top, _steep(order), axis)
    p = _chosen(axis.expand(order.excess), of_level, of_smallest)
    return p, Threshold(level, smallest)


def probabilities(
    z: Float[Array, "..."], order: Order, threshold: Threshold, axis: ClassAxis
) -> Float[Array, "..."]:
    """P, small entries with all their digits; 0 in a row of -inf alone."""
    of_level = of_smallest = None
    if threshold.level is not None:
        of_level = by_level.probabilities(z, _convex(order), threshold.level, axis)
    if threshold.smallest is not None:
        of_smallest = by_smallest.probabilities(z, _steep(order), threshold.smallest, axis)
    return _chosen(axis.expand(order.excess), of_level, of_smallest)


def gap(z: Float[Array, "..."], order: Order, threshold: Threshold) -> Float[Array, "..."]:
    """-y of an entry of each row."""
    of_level = of_smallest = None
    if threshold.level is not None:
        high, low = by_level.gap(z, threshold.level)
        of_level = high + low
    if threshold.smallest is not None:
        of_smallest = by_smallest.gap(z, _steep(order), threshold.smallest)
    return _chosen(order.excess, of_level, of_smallest)


def gaps(
    z: Float[Array, "..."], order: Order, threshold: Threshold, axis: ClassAxis
) -> Float[Array, "..."]:
    """The same of all entries."""
    return gap(z, *jax.tree.map(axis.expand, (order, threshold)))


def confident(
    z: Float[Array, "..."],
    label: Int[Array, "..."],
    order: Order,
    threshold: Threshold,
    axis: ClassAxis,
) -> Threshold:
    """λ to its last digits also where it is small, for the label has nearly all of the sum."""
    if threshold.level is None:
        return threshold
    z, order = lax.stop_gradient((z, _convex(order)))
    return threshold._replace(level=by_level.confident(z, label, order, threshold.level, axis))


def _convex(order: Order) -> Order:
    """With α = 2 in the rows where it is more."""
    return order if order.is_convex else Order(jnp.minimum(order.excess, 1), None)


def _steep(order: Order) -> Order:
    """With α = 2 in the rows where it is less."""
    return order if order.is_steep else Order(jnp.maximum(order.excess, 1), None)


def _chosen(excess: Array, of_level: Array | None, of_smallest: Array | None) -> Array:
    if of_level is None or of_smallest is None:
        (known,) = (a for a in (of_level, of_smallest) if a is not None)
        return known
    return jnp.where(excess > 1, of_smallest, of_level)
