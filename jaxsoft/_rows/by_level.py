"""Rows of entmax for α ≤ 2: the threshold λ, by Newton's method in a fixed number of steps.

The step. With S = Σp and s = -∂p/∂λ = p^(2-α), Newton's method for (S^a - 1) / a = 0 moves λ by

    S (1 - S^-a) / (a Σs),

in one step to the end if all entries of the support are equal, or if a → 0 (softmax). S^a is a
norm, convex in λ: from below the threshold the steps climb and never pass it. Nothing is sorted.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft._core import double_word
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.sizes import known
from jaxsoft._rows import orders
from jaxsoft._rows.logits import divisor
from jaxsoft._rows.orders import Order

_GROUPS = range(16, 7, -1)  # so many entries of a long row are represented by the largest of them
_LONG = 256  # entries: a row with as many or more is long

# Steps after which λ has converged, for numbers of so many bytes: from 0, and from where Σp is 16
# or less, as it is for the λ of groups.
_FROM_ZERO = {4: 12, 8: 14}
_FROM_FEW = {4: 7, 8: 8}


class Level(NamedTuple):
    """λ of rows, as a double word, and the maximum.

    An entry at the edge is the difference of numbers near 1, and in a row of many entries the
    rounding of λ adds up: 50,000 equal ones would sum to 1.001.

    Attributes:
        top: m, or a finite number for a row of -inf alone.
        high: λ to its rounding.
        low: what it lacks.
    """

    top: Float[Array, "..."]
    high: Float[Array, "..."]
    low: Float[Array, "..."]


def gap(z: Float[Array, "..."], level: Level) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """-y of an entry of each row as a double word, exact in the logits: 0 or more."""
    absent = z == -jnp.inf
    of_top, of_top_low = double_word.sum_of(level.top, -jnp.where(absent, 0, z))
    gap, low = double_word.sum_of(of_top, level.high)
    return jnp.where(absent, jnp.inf, gap), low + (of_top_low + level.low)


def gaps(
    z: Float[Array, "..."], level: Level, axis: ClassAxis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The same of all entries."""
    return gap(z, Level(*map(axis.expand, level)))


def probabilities(
    z: Float[Array, "..."],
    order: Order,
    level: Level,
    axis: ClassAxis,
) -> Float[Array, "..."]:
    """P for a λ, small entries with all their digits; 0 in a row of -inf alone."""
    a, top = axis.expand(order.excess), axis.expand(level.top)
    far = z - top < -2 / a  # infinite, perhaps; its p is 0
    gap, gap_low = gaps(jnp.where(far, top, z), level, axis)
    t, t_low = (a * gap, 0.0) if order.root is not None else double_word.product_of(a, gap)
    # XLA:CPU (jax 0.10) computes log1p(t) to 120 eps in float64: the logarithm is that of a sum.
    one = jnp.where(gap == gap, jnp.ones_like(gap), gap)  # no constant, as `double_word` says
    u, u_low = double_word.sum_of(one, -t)  # near the edge exact
    u, u_low = double_word.sum_of(u, u_low - (t_low + a * gap_low))
    u = jnp.where(far, 0, jnp.maximum(u, 0))
    if order.root is not None:
        return u**order.root
    inside = jnp.where(u == 0, 1, u)
    return jnp.where(u == 0, 0, orders.inverse_power(inside, a) * jnp.exp(u_low / inside / a))


def solution(
    z: Float[Array, "..."], top: Float[Array, "..."], order: Order, axis: ClassAxis
) -> tuple[Float[Array, "..."], Level]:
    """P and λ of each row."""
    zeros = jnp.zeros_like(top) * order.excess
    level = Level(top, _climbed(z, top, zeros, order, axis), zeros)
    if order.root is None:
        p = probabilities(z, order, level, axis)
    else:
        p, _ = _roughly(z, top, level.high, order, axis)
    # The last step moves p itself. It takes entries that are about an eps out of the support, of
    # which a long row may have so many that one more step is needed.
    most = int(0.5 * float(jnp.finfo(z.dtype).eps) ** -0.5)
    for _ in range(1 if known(lambda: axis.count(z) < most, False) else 2):
        s = orders.slopes(p, order, axis)
        step = _step(orders.excess(p, axis), axis.sum(s), order)
        p = jnp.maximum(p - s * axis.expand(step), 0)
        level = level._replace(low=level.low + step)
    return p, level


# The λ of some entries alone lies below that of all: here of the largest of each group.
def _climbed(z: Array, top: Array, zeros: Array, order: Order, axis: ClassAxis) -> Array:
    """λ from below, to its rounding, for α ≤ 2."""
    size, eps, at = z.dtype.itemsize, float(jnp.finfo(z.dtype).eps), axis.position

    def climbed(z: Array, start: Array, steps: int) -> Array:
        def step(_: Any, current: Array) -> Array:
            sums = _rough_sums(z, top, current, order, axis)
            return current + jnp.maximum(_step(*sums, order), 0)

        current = lax.fori_loop(0, steps, step, start)
        # From below, so that rounding has lost no entry of the support.
        return jnp.maximum(current - 2 * eps * (1 + current), 0)

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


def _step(excess: Array, slope: Array, order: Order) -> Array:
    """The step, given Σp - 1 and Σs; 0 where Σp is 0."""
    a, logarithm = order.excess, jnp.log1p(jnp.where(excess == -1, 0, excess))
    return (1 + excess) * (-jnp.expm1(-a * logarithm) / a) / divisor(slope)


def _rough_sums(
    z: Array, top: Array, current: Array, order: Order, axis: ClassAxis
) -> tuple[Array, Array]:
    """Σp - 1 and Σs for a λ, to their rounding."""
    p, s = _roughly(z, top, current, order, axis)
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
    given: Level,
    axis: ClassAxis,
) -> Level:
    """λ to its last digits also where it is small, for the label has nearly all of the sum."""
    a, at_label = order.excess, axis.one_hot(label, z)

    def step(_: Any, low: Array) -> Array:
        level = given._replace(low=low)
        p = probabilities(z, order, level, axis)
        of_label, of_label_low = gap(axis.take(z, label), level)
        t = jnp.minimum(a * (of_label + of_label_low), 1)
        rest = orders.rest(t, a)
        excess = axis.sum(jnp.where(at_label, 0, p)) - rest
        step = excess / divisor(axis.sum(orders.slopes(p, order, axis)))
        return low + jnp.where(rest < 0.125, step, 0)  # elsewhere λ has all its digits

    return given._replace(low=lax.fori_loop(0, 2, step, given.low))
