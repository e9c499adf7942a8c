"""α of rows of entmax, powers of their probabilities, and what slopes make of a vector.

With the maximum m of a row and y = z - m - λ,

    p = [1 + a y]₊^(1/a),    a = α - 1,    Σ p = 1,

which is exp(y) for a → 0: there λ is log Z, and entmax is softmax. λ is 0 where the maximum is
alone, and at most (1 - n^-a) / a, where all n entries are equal. Entries with a y ≤ -1 are 0.
"""

import dataclasses
import functools
from typing import Any

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

    @property
    def is_steep(self) -> bool:
        """Whether α is known to be more than 2."""
        return self.number is not None and self.number > 2


def order(alpha: Float[Array, "..."], number: float | None) -> Order:
    """Of α without the axis, of the compute type: less than 1 makes a row NaN."""
    excess = nan_unless((alpha >= 1) & (alpha < jnp.inf), alpha - 1)
    least = jnp.asarray(float(jnp.finfo(alpha.dtype).eps) ** 2, alpha.dtype)
    return Order(excess + lax.stop_gradient(jnp.maximum(least - excess, 0)), number)


def inverse_power(u: Float[Array, "..."], a: Float[Array, "..."]) -> Float[Array, "..."]:
    """u^(1/a) for u > 0, to its last digits."""
    high, low = reciprocal(a)
    return lax.pow(u, jnp.broadcast_to(high, u.shape)) * jnp.exp(low * jnp.log(u))


def rest(t: Float[Array, "..."], a: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 - (1 - t)^(1/a) for t ≤ 1, exact where it is small."""
    return -jnp.expm1(jnp.log1p(-t) / a)


def reciprocal(a: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """1 / a as a double word."""
    high = 1 / a
    product, low = double_word.product_of(high, a)
    return high, ((1 - product) - low) / a


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


def excess(p: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """Σp - 1."""
    high, low = exact_sum(p, axis)
    return (high - 1) + low


# A part of each number is a multiple of the rounding of 1, so that a sum below 2 of these is exact;
# the remainders are so small that the rounding of their sum does not matter.
def exact_sum(
    p: Float[Array, "..."], axis: ClassAxis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Σp in two parts."""
    unit = float(jnp.finfo(p.dtype).eps)
    multiples = jnp.round(p / unit) * unit
    return axis.sum(multiples), axis.sum(p - multiples)
