"""Factors of C(s, s0): square root, rank factor and Cholesky factor, applied in O(n)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import programs, validation
from jaxsoft._core.devices import Mesh
from jaxsoft._rows.logits import divisor
from jaxsoft._simplex import formulas
from jaxsoft._simplex.formulas import PerClass, PerRow, fractions, jit, quotient, total


def root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """√x with the derivative 0 at 0: a weight of 0 is a mask, and it stays 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(divisor(x)))


# B = diag(√s) - κ s √sᵀ has B Bᵀ = diag(s) - (2κ - κ² Σs) s sᵀ, and that is C for
#     κ = (1 - √a0) / Σs = 1 / (t (1 + √a0)).
# The diagonal is √s (1 - a / (1 + √a0)) = √s (1 - a + √a0) / (1 + √a0), which has no difference.
@jit
def root_product(s: PerClass, s0: PerRow, v: PerClass, mesh: Mesh | None = None) -> PerClass:
    """B v."""
    _, a, a0 = fractions(s, s0, mesh)
    extra = root(a0)[..., None]
    top, scaled = formulas.dominant(a), root(s) * v
    rest = total(jnp.where(top, 0, scaled), mesh, keepdims=True)
    of_top = scaled * (formulas.complement(a, a0, mesh) + extra) - a * rest
    of_others = scaled * (1 + extra) - a * total(scaled, mesh, keepdims=True)
    return jnp.where(top, of_top, of_others) / (1 + extra)


# Bᵀ v = √s (v - ⟨a, v⟩ / (1 + √a0)). With u = v - ⟨a, v⟩, and u0 that of the sink, this is
# √s (u - u0 √a0 / (1 + √a0)), which a common offset of v and v0 leaves as it is.
@jit
def root_transposed_product(
    s: PerClass, s0: PerRow, v: PerClass, v0: PerRow | float = 0.0, mesh: Mesh | None = None
) -> PerClass:
    """Bᵀ v - √a √s0 v0: the transposed factor of all classes, that of the sink included."""
    _, a, a0 = fractions(s, s0, mesh)
    extra = root(a0)
    u, u0 = formulas.centred(a, a0, v, v0, mesh)
    return root(s) * (u - (u0 * extra / (1 + extra))[..., None])


# A Householder reflection H = I - u uᵀ / (1 + √a_n) with u = √a + e_n takes √a to -e_n. Without a
# sink C = diag(√s) (I - √a √aᵀ) diag(√s), so F is diag(√s) H without its last column: above, the
# square root B for which the last class is the sink, and -√s_n √a below.
class RankFactor(NamedTuple):
    """F of shape [..., n, n - 1] with F Fᵀ = diag(s) - s sᵀ / Σs, from n ≥ 2 numbers.

    Attributes:
        weights: s, shape [..., n].
    """

    weights: Float[Array, "*batch n"]

    def mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """F v, shape [..., n], of v broadcastable to [..., n - 1]."""
        *batch, n = self.weights.shape
        v = self._vector("mv", v, (*batch, n - 1), "a number for each column")
        return _factor_product(self.weights, v)

    def T_mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch m"]:
        """Fᵀ v, shape [..., n - 1], of v broadcastable to [..., n]."""
        v = self._vector("T_mv", v, self.weights.shape, "the shape of the weights")
        head, last = self.weights[..., :-1], self.weights[..., -1]
        return root_transposed_product(head, last, v[..., :-1], v[..., -1])

    def as_matrix(self) -> Float[Array, "*batch n m"]:
        """F itself, shape [..., n, n - 1]."""
        unit_vectors = jnp.eye(self.weights.shape[-1] - 1, dtype=self.weights.dtype)
        return jax.vmap(self.mv, 0, -1)(unit_vectors)

    def _vector(self, method: str, v: Any, shape: tuple[int, ...], wanted: str) -> Array:
        function = f"RankFactor.{method}"
        v = validation.floating(function, "v", v)
        return validation.broadcast(function, "v", v, shape, wanted).astype(self.weights.dtype)


# A program that returns such a factor can be written to a file (`jax.export`).
export.register_namedtuple_serialization(RankFactor, serialized_name="jaxsoft.RankFactor")


@jax.jit
def _factor_product(s: PerClass, v: Float[Array, "*b m"]) -> PerClass:
    head, last = s[..., :-1], s[..., -1]
    _, a, _ = fractions(head, last)
    below = -root(last) * jnp.sum(root(a) * v, -1)
    return jnp.concatenate([root_product(head, last, v), below[..., None]], -1)


# C = L D Lᵀ with unit lower triangular L, L_ij = -s_i / q_j, and D_j = s_j q_j / q_{j-1}, where
# q_j = Σ_{k>j} s_k + s0 are the tails (Tanabe & Sagae 1992; the sink comes last).
@programs.program(places=programs.as_given)
def cholesky_product(s: PerClass, s0: PerRow, v: PerClass) -> PerClass:
    """L √D v."""
    masses = jnp.concatenate([s, s0[..., None]], -1)
    tails = jnp.cumsum(masses[..., ::-1], -1)[..., ::-1]
    before, after = tails[..., :-1], tails[..., 1:]
    # √D_j = √(s_j / q_{j-1}) √q_j and √D_j / q_j: neither product of tails can underflow.
    share, after_root = root(quotient(s, divisor(before))) * v, root(after)
    scaled = jnp.where(after == 0, 0, quotient(share, divisor(after_root)))
    sums = jnp.cumsum(scaled, -1)
    below = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    return share * after_root - s * below
