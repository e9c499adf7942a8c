"""Rows of entmax: the threshold at which the probabilities of a row sum to 1.

With a = α - 1, the maximum m of a row and y = z - m - λ,

    p = [1 + a y]₊^(1/a),    Σ p = 1,

which is exp(y) for a → 0: there λ is log Z, and entmax is softmax. λ is 0 where the maximum is
alone, and at most (1 - n^-a) / a, where all n entries are equal. Entries with a y ≤ -1 are 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft._core import double_word
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.sizes import known
from jaxsoft._rows.jacobian_product import Probabilities, Vector, flatness, jacobian_product
from jaxsoft._rows.logits import Logits, divisor, nan_unless

_GROUPS = range(16, 7, -1)  # so many entries of a long row are represented by the largest of them
_LONG = 256  # entries: a row with as many or more is long

# Steps after which λ has converged, for numbers of so many bytes: for α ≤ 2 from 0, and from where
# Σp is 16 or less, as it is for the λ of groups; and for any α.
_FROM_ZERO = {4: 12, 8: 14}
_FROM_FEW = {4: 7, 8: 8}
_ANY = {4: 30, 8: 60}


class Order(NamedTuple):
    """α of rows.

    Attributes:
        excess: a = α - 1, without the axis; more than 0, for α = 1 by less than the rounding.
        number: α, if it is a number that all rows have, known before the program runs.
    """

    excess: Float[Array, "..."]
    number: float | None

    @property
    def root(self) -> int | None:
        """1 / a, if it is known to be 1, 2, 4 or 8: then no logarithm is needed, and a is exact."""
        roots = {1 + 1 / k: k for k in (1, 2, 4, 8)}
        return None if self.number is None else roots.get(self.number)

    @property
    def is_convex(self) -> bool:
        """Whether α is known to be at most 2."""
        return self.number is not None and self.number <= 2


def order(alpha: Float[Array, "..."], number: float | None) -> Order:
    """Of α without the axis, of the compute type: less than 1 makes a row NaN."""
    excess = nan_unless((alpha >= 1) & (alpha < jnp.inf), alpha - 1)
    least = jnp.asarray(float(jnp.finfo(alpha.dtype).eps) ** 2, alpha.dtype)
    return Order(excess + lax.stop_gradient(jnp.maximum(least - excess, 0)), number)


class Threshold(NamedTuple):
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


# The step. With S = Σp and s = -∂p/∂λ = p^(2-α), Newton's method for (S^a - 1) / a = 0 moves λ by
#
#     S (1 - S^-a) / (a Σs),
#
# in one step to the end if all entries of the support are equal, or if a → 0 (softmax). For α ≤ 2
# S^a is a norm, convex in λ: from below the threshold the steps climb and never pass it. It lies
# above that of some of the entries alone: here of the largest of each group.
def solution(
    logits: Logits, order: Order, axis: ClassAxis
) -> tuple[Float[Array, "..."], Threshold]:
    """P and λ of each row: constants."""
    z, top = lax.stop_gradient((logits.z, logits.top))
    order = order._replace(excess=lax.stop_gradient(order.excess))
    a, zeros = order.excess, jnp.zeros_like(top) * order.excess
    size, eps = z.dtype.itemsize, float(jnp.finfo(z.dtype).eps)

    def roughly(z: Array) -> Callable[[Array], tuple[Array, Array]]:
        def evaluate(current: Array) -> tuple[Array, Array]:
            p, s = _roughly(z, top, current, order, axis)
            return _step(axis.sum(p) - 1, axis.sum(s), a)

        return evaluate

    def climbed(z: Array, start: Array, steps: int) -> Array:
        evaluate = roughly(z)
        higher = lambda _, high: high + jnp.maximum(evaluate(high)[1], 0)
        # From below, so that rounding has lost no entry of the support.
        high = lax.fori_loop(0, steps, higher, start)
        return jnp.maximum(high - 2 * eps * (1 + high), 0)

    def exactly(low: Array) -> tuple[Array, Array]:
        p = probabilities(z, order, Threshold(top, high, low), axis)
        return _step(_excess(p, axis), axis.sum(slopes(p, order, axis)), a)

    low = zeros
    if not order.is_convex:
        n = jnp.asarray(axis.count(z), z.dtype)
        most = zeros - jnp.expm1(-a * jnp.log(n)) / a
        high = _bracketed(roughly(z), zeros, zeros, most * (1 + 4 * eps), _ANY[size])
        width = 64 * eps * (1 + high)
        low = _bracketed(exactly, zeros, -width, width, _ANY[size])
    elif group := _group(z, axis):
        at = axis.position
        groups = z.reshape(*z.shape[:at], group, -1, *z.shape[at + 1 :])
        few = climbed(jnp.max(groups, at), zeros, _FROM_ZERO[size])
        high = climbed(z, few, _FROM_FEW[size])
    else:
        few = known(lambda: axis.count(z) <= max(_GROUPS), False)
        high = climbed(z, zeros, (_FROM_FEW if few else _FROM_ZERO)[size])
    if order.root is None:
        p = probabilities(z, order, Threshold(top, high, low), axis)
    else:
        p, _ = _roughly(z, top, high, order, axis)
    p = lax.optimization_barrier(p)
    for _ in range(1 if known(lambda: 4 * eps * axis.count(z) ** 2 < 1, False) else 2):
        s = slopes(p, order, axis)
        _, step = _step(_excess(p, axis), axis.sum(s), a)
        p, low = jnp.maximum(p - s * axis.expand(step), 0), low + step
    return p, Threshold(top, high, low)


def _group(z: Array, axis: ClassAxis) -> int | None:
    """How many entries one is to represent in a row that can be divided so."""
    n = z.shape[axis.position]
    divides = lambda k: known(lambda: n >= _LONG and n % k == 0, False)
    return next(filter(divides, _GROUPS), None)


# Σp - 1 as the difference of two small numbers: the sum of the others, and 1 - p of the label.
def confident(
    z: Float[Array, "..."],
    label: Int[Array, "..."],
    order: Order,
    given: Threshold,
    axis: ClassAxis,
) -> Threshold:
    """λ to its last digits also where it is small, for the label has nearly all of the sum."""
    z = lax.stop_gradient(z)
    a, at_label = lax.stop_gradient(order.excess), axis.one_hot(label, z)
    order = order._replace(excess=a)

    def step(_: Any, low: Array) -> Array:
        threshold = given._replace(low=low)
        p = probabilities(z, order, threshold, axis, relative=True)
        of_label, of_label_low = gap(axis.take(z, label), threshold)
        t = jnp.minimum(a * (of_label + of_label_low), 1)
        rest = jnp.where(t == 1, 1, -jnp.expm1(jnp.log1p(-jnp.where(t == 1, 0, t)) / a))
        excess = axis.sum(jnp.where(at_label, 0, p)) - rest
        return low + excess / divisor(axis.sum(slopes(p, order, axis)))

    return given._replace(low=lax.fori_loop(0, 2, step, given.low))


# For α > 2 the slope at the edge of the support is infinite: a step that leaves the bracket, or
# that is not half of the one before, is replaced by a bisection.
def _bracketed(
    evaluate: Callable[[Array], tuple[Array, Array]],
    start: Array,
    low: Array,
    high: Array,
    steps: int,
) -> Array:
    """Where Σp is 1, between two bounds, given Σp - 1 at a place and the step from there."""

    def step(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        current, low, high, last, best, least = state
        excess, move = evaluate(current)
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


def _step(excess: Array, slope: Array, a: Array) -> tuple[Array, Array]:
    """Σp - 1 and the step from there, 0 where Σp is 0."""
    logarithm = jnp.log1p(jnp.where(excess == -1, 0, excess))
    return excess, (1 + excess) * (-jnp.expm1(-a * logarithm) / a) / divisor(slope)


# A part of each number is a multiple of the rounding of 1, so that a sum below 2 of these is exact;
# what is left of them is too small for the rounding of its sum to matter.
def _excess(p: Array, axis: ClassAxis) -> Array:
    """Σp - 1."""
    unit = float(jnp.finfo(p.dtype).eps)
    multiples = jnp.round(p / unit) * unit
    return (axis.sum(multiples) - 1) + axis.sum(p - multiples)


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


def gap(
    z: Float[Array, "..."], threshold: Threshold
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """-y of an entry of each row as a double word, exact in the logits: 0 or more."""
    absent = z == -jnp.inf
    of_top, of_top_low = double_word.sum_of(threshold.top, -jnp.where(absent, 0, z))
    gap, low = double_word.sum_of(of_top, threshold.high)
    return jnp.where(absent, jnp.inf, gap), low + (of_top_low + threshold.low)


def gaps(
    z: Float[Array, "..."], threshold: Threshold, axis: ClassAxis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The same of all entries."""
    return gap(z, Threshold(*map(axis.expand, threshold)))


def probabilities(
    z: Float[Array, "..."],
    order: Order,
    threshold: Threshold,
    axis: ClassAxis,
    *,
    relative: bool = False,
) -> Float[Array, "..."]:
    """P for a λ; 0 in a row of -inf alone.

    Args:
        z: the logits.
        order: α.
        threshold: λ.
        axis: the axis of the classes.
        relative: whether small entries are to have all their digits.
    """
    a, top = axis.expand(order.excess), axis.expand(threshold.top)
    far = z - top < -2 / a  # infinite, perhaps; its p is 0
    gap, gap_low = gaps(jnp.where(far, top, z), threshold, axis)
    t, t_low = (a * gap, 0.0) if order.root is not None else double_word.product_of(a, gap)
    # XLA:CPU (jax 0.10) computes log1p(t) to 120 eps in float64: the logarithm is that of a sum.
    one = jnp.where(gap == gap, jnp.ones_like(gap), gap)  # no constant, as `double_word` says
    u, u_low = double_word.sum_of(one, -t)  # near the edge exact
    u, u_low = double_word.sum_of(u, u_low - (t_low + a * gap_low))
    u = jnp.where(far, 0, jnp.maximum(u, 0))
    if order.root is not None:
        return u**order.root
    inside = jnp.where(u == 0, 1, u)
    if not relative:
        return jnp.where(u == 0, 0, jnp.exp((jnp.log(inside) + u_low / inside) / a))
    # The rounding of a logarithm, and of its quotient, is a relative error of p.
    high, low = double_word.plus_logarithm(jnp.zeros_like(u), double_word.parts(inside))
    high, low = double_word.sum_of(high, low + u_low / inside)
    exponent = high / a
    product, product_low = double_word.product_of(exponent, jnp.broadcast_to(a, u.shape))
    p = jnp.exp(exponent)
    return jnp.where(u == 0, 0, p + p * ((((high - product) - product_low) + low) / a))


def roots(p: Float[Array, "..."], order: Order, axis: ClassAxis) -> Float[Array, "..."]:
    """p^a, and 1 where p is 0."""
    p = jnp.where(p == 0, 1, p)
    if order.root == 1:
        return p
    return jnp.sqrt(p) if order.root == 2 else jnp.exp(axis.expand(order.excess) * jnp.log(p))


def slopes(p: Float[Array, "..."], order: Order, axis: ClassAxis) -> Float[Array, "..."]:
    """s = p^(2-α) on the support, else 0."""
    return jnp.sign(p) if order.root == 1 else p / roots(p, order, axis)


# C(s, 0) is Σs times the Jacobian of softmax at the fractions s / Σs.
def product(s: Float[Array, "..."], v: Float[Array, "..."], axis: ClassAxis) -> Array:
    """C(s, 0) v = s ∘ (v - ⟨s, v⟩ / Σs)."""
    total = axis.sum(s)
    fractions = s / axis.expand(divisor(total))
    largest = lax.stop_gradient(jnp.max(fractions, axis.position, initial=0))
    p = Probabilities(fractions, None, flatness(largest))
    return axis.expand(total) * jacobian_product(p, Vector(v, None), axis).classes
