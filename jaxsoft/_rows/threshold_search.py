"""The threshold of rows of entmax, by Newton's method in a fixed number of steps, without a sort.

The step. With S = Σp and s = -∂p/∂λ = p^(2-α), Newton's method for (S^a - 1) / a = 0 moves λ by

    S (1 - S^-a) / (a Σs),

in one step to the end if all entries of the support are equal, or if a → 0 (softmax). For α ≤ 2
S^a is a norm, convex in λ: from below the threshold the steps climb and never pass it.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.sizes import known
from jaxsoft._rows import thresholds
from jaxsoft._rows.logits import Logits, divisor
from jaxsoft._rows.thresholds import Order, Threshold

_GROUPS = range(16, 7, -1)  # so many entries of a long row are represented by the largest of them
_LONG = 256  # entries: a row with as many or more is long

# Steps after which λ has converged, for numbers of so many bytes: for α ≤ 2 from 0, and from where
# Σp is 16 or less, as it is for the λ of groups; and for any α.
_FROM_ZERO = {4: 12, 8: 14}
_FROM_FEW = {4: 7, 8: 8}
_ANY = {4: 30, 8: 60}


def solution(
    logits: Logits, order: Order, axis: ClassAxis
) -> tuple[Float[Array, "..."], Threshold]:
    """P and λ of each row: constants."""
    z, top, order = lax.stop_gradient((logits.z, logits.top, order))
    zeros = jnp.zeros_like(top) * order.excess
    if order.is_convex:
        threshold = Threshold(top, _climbed(z, top, zeros, order, axis), zeros)
    else:
        threshold = _enclosed(z, top, zeros, order, axis)
    if order.root is None:
        p = thresholds.probabilities(z, order, threshold, axis)
    else:
        p, _ = _roughly(z, top, threshold.high, order, axis)
    # The last step moves p itself. It takes entries that are about an eps out of the support, of
    # which a long row may have so many that one more step is needed.
    most = int(0.5 * float(jnp.finfo(z.dtype).eps) ** -0.5)
    for _ in range(1 if known(lambda: axis.count(z) < most, False) else 2):
        s = thresholds.slopes(p, order, axis)
        step = _step(_excess(p, axis), axis.sum(s), order)
        p = jnp.maximum(p - s * axis.expand(step), 0)
        threshold = threshold._replace(low=threshold.low + step)
    if order.is_convex:
        return p, threshold
    # Where the slope is so large that λ has too few digits, the sum is still 1.
    total = 1 + _excess(p, axis)
    return p / axis.expand(divisor(total)), threshold


# The λ of some entries alone lies below that of all: here of the largest of each group.
def _climbed(z: Array, top: Array, zeros: Array, order: Order, axis: ClassAxis) -> Array:
    """λ from below, to its rounding, for α ≤ 2."""
    size, eps, at = z.dtype.itemsize, float(jnp.finfo(z.dtype).eps), axis.position

    def climbed(z: Array, start: Array, steps: int) -> Array:
        def step(_: Any, level: Array) -> Array:
            sums = _rough_sums(z, top, level, order, axis)
            return level + jnp.maximum(_step(*sums, order), 0)

        level = lax.fori_loop(0, steps, step, start)
        # From below, so that rounding has lost no entry of the support.
        return jnp.maximum(level - 2 * eps * (1 + level), 0)

    if group := _group(z, axis):
        groups = z.reshape(*z.shape[:at], group, -1, *z.shape[at + 1 :])
        start = climbed(jnp.max(groups, at), zeros, _FROM_ZERO[size])
        return climbed(z, start, _FROM_FEW[size])
    is_short = known(lambda: z.shape[at] <= max(_GROUPS), False)
    return climbed(z, zeros, (_FROM_FEW if is_short else _FROM_ZERO)[size])


def _group(z: Array, axis: ClassAxis) -> int | None:
    """How many entries one is to represent in a row that can be divided so."""
    n = z.shape[axis.position]
    divides = lambda k: known(lambda: n >= _LONG and n % k == 0, False)
    return next(filter(divides, _GROUPS), None)


# For α > 2 the slope at the edge of the support is infinite: a step that leaves the bracket, or
# that is not half of the one before, is replaced by a bisection; and the slopes are so large that λ
# needs the digits of a double word.
def _enclosed(z: Array, top: Array, zeros: Array, order: Order, axis: ClassAxis) -> Threshold:
    """λ between bounds, for any α."""
    n, eps = jnp.asarray(axis.count(z), z.dtype), float(jnp.finfo(z.dtype).eps)
    most = zeros - jnp.expm1(-order.excess * jnp.log(n)) / order.excess
    steps = _ANY[z.dtype.itemsize]

    def roughly(level: Array) -> tuple[Array, Array]:
        return _rough_sums(z, top, level, order, axis)

    high = _bracketed(roughly, order, zeros, zeros, most * (1 + 4 * eps), steps)

    def exactly(low: Array) -> tuple[Array, Array]:
        p = thresholds.probabilities(z, order, Threshold(top, high, low), axis)
        return _excess(p, axis), axis.sum(thresholds.slopes(p, order, axis))

    width = 64 * eps * (1 + high)
    return Threshold(top, high, _bracketed(exactly, order, zeros, -width, width, steps))


def _bracketed(
    sums: Callable[[Array], tuple[Array, Array]],
    order: Order,
    start: Array,
    low: Array,
    high: Array,
    steps: int,
) -> Array:
    """Where Σp is 1, between two bounds, given Σp - 1 and Σs at a place."""

    def step(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        current, low, high, last, best, least = state
        excess, slope = sums(current)
        move = _step(excess, slope, order)
        low, high = jnp.where(excess >= 0, current, low), jnp.where(excess <= 0, current, high)
        moved, error = current + move, jnp.where(excess == -1, jnp.inf, jnp.abs(excess))
        best = jnp.where(error < least, current, best)
        fast = (low <= moved) & (moved <= high) & (2 * jnp.abs(move) <= last) & (excess > -1)
        moved = jnp.where(fast, moved, (low + high) / 2)
        return moved, low, high, jnp.abs(moved - current), best, jnp.minimum(error, least)

    infinite = jnp.full_like(start, jnp.inf)
    state = start, low, high, infinite, start, infinite
    *_, best, error = lax.fori_loop(0, steps, step, state)
    return jnp.where(jnp.isnan(error), error, best)


def _step(excess: Array, slope: Array, order: Order) -> Array:
    """The step, given Σp - 1 and Σs; 0 where Σp is 0."""
    a, logarithm = order.excess, jnp.log1p(jnp.where(excess == -1, 0, excess))
    return (1 + excess) * (-jnp.expm1(-a * logarithm) / a) / divisor(slope)


# A part of each number is a multiple of the rounding of 1, so that a sum below 2 of these is exact;
# the remainders are so small that the rounding of their sum does not matter.
def _excess(p: Array, axis: ClassAxis) -> Array:
    """Σp - 1."""
    unit = float(jnp.finfo(p.dtype).eps)
    multiples = jnp.round(p / unit) * unit
    return (axis.sum(multiples) - 1) + axis.sum(p - multiples)


def _rough_sums(
    z: Array, top: Array, level: Array, order: Order, axis: ClassAxis
) -> tuple[Array, Array]:
    """Σp - 1 and Σs for a λ, to their rounding."""
    p, s = _roughly(z, top, level, order, axis)
    return axis.sum(p) - 1, axis.sum(s)


def _roughly(
    z: Array, top: Array, current: Array, order: Order, axis: ClassAxis
) -> tuple[Array, Array]:
    """p and s for a λ, to the rounding of z - m."""
    a = axis.expand(order.excess)
    t = a * ((z - axis.expand(top)) - axis.expand(current))
    u = jnp.maximum(1 + t, 0)
    if order.root is not None:
        p = u**order.root
        return p, jnp.sign(u) if order.root == 1 else u ** (order.root - 1)
    p = jnp.where(u > 0, jnp.exp(jnp.log1p(jnp.where(u > 0, t, 0)) / a), 0)
    return p, p / divisor(u)


# Σp - 1 as the difference of two small numbers: the sum of the others, and 1 - p of the label.
def confident(
    z: Float[Array, "..."],
    label: Int[Array, "..."],
    order: Order,
    given: Threshold,
    axis: ClassAxis,
) -> Threshold:
    """λ to its last digits also where it is small, for the label has nearly all of the sum."""
    z, order = lax.stop_gradient((z, order))
    a, at_label = order.excess, axis.one_hot(label, z)

    def step(_: Any, low: Array) -> Array:
        threshold = given._replace(low=low)
        p = thresholds.probabilities(z, order, threshold, axis, relative=True)
        of_label, of_label_low = thresholds.gap(axis.take(z, label), threshold)
        t = jnp.minimum(a * (of_label + of_label_low), 1)
        rest = jnp.where(t == 1, 1, -jnp.expm1(jnp.log1p(-jnp.where(t == 1, 0, t)) / a))
        excess = axis.sum(jnp.where(at_label, 0, p)) - rest
        step = excess / divisor(axis.sum(thresholds.slopes(p, order, axis)))
        return low + jnp.where(rest < 0.125, step, 0)  # elsewhere λ has all its digits

    return given._replace(low=lax.fori_loop(0, 2, step, given.low))
