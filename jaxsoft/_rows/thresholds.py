"""Rows of entmax: the probabilities of a row, given the threshold at which they sum to 1.

With a = α - 1, the maximum m of a row and y = z - m - λ,

    p = [1 + a y]₊^(1/a),    Σ p = 1,

which is exp(y) for a → 0: there λ is log Z, and entmax is softmax. λ is 0 where the maximum is
alone, and at most (1 - n^-a) / a, where all n entries are equal. Entries with a y ≤ -1 are 0.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsoft._core import double_word, powers
from jaxsoft._core.axes import ClassAxis
from jaxsoft._rows.jacobian_product import Probabilities, Vector, flatness, jacobian_product
from jaxsoft._rows.logits import divisor, nan_unless


@functools.partial(jax.tree_util.register_dataclass, data_fields=["excess"], meta_fields=["number"])
@dataclasses.dataclass(frozen=True)
class Order:
    """α of rows.

    Attributes:
        excess: a = α - 1, without the axis; more than 0, for α = 1 by less than the rounding.
        number: α, if it is a number that all rows have, known before the program runs.
    """

    excess: Any  # Float[Array, "..."], or what JAX puts into a tree in its place
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
    if order.root == 2:
        return jnp.sqrt(p)
    return jnp.exp(-axis.expand(order.excess) * powers.surprisal(p))


def slopes(p: Float[Array, "..."], order: Order, axis: ClassAxis) -> Float[Array, "..."]:
    """s = p^(2-α) on the support, else 0."""
    return jnp.sign(p) if order.root == 1 else p / roots(p, order, axis)


def shares(s: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """s / Σs; 0 where Σs is 0."""
    return s / axis.expand(divisor(axis.sum(s)))


# C(s, 0) is Σs times the Jacobian of softmax at the fractions s / Σs.
def product(s: Float[Array, "..."], v: Float[Array, "..."], axis: ClassAxis) -> Array:
    """C(s, 0) v = s ∘ (v - ⟨s, v⟩ / Σs)."""
    fractions = shares(s, axis)
    largest = lax.stop_gradient(jnp.max(fractions, axis.position, initial=0))
    p = Probabilities(fractions, None, flatness(largest))
    return axis.expand(axis.sum(s)) * jacobian_product(p, Vector(v, None), axis).classes
