"""Factors of C(s, s0): square root, rank factor and Cholesky factor, applied in O(n)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsoft._simplex import centred, complement, dominant, fractions, quotient


def root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """√x with the derivative 0 at 0: a weight of 0 is a mask, and it stays 0."""
    positive = x != 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


# B = diag(√s) - κ s √sᵀ has B Bᵀ = diag(s) - (2κ - κ² Σs) s sᵀ, and that is C for
#     κ = (1 - √a0) / Σs = 1 / (t (1 + √a0)).
# The diagonal is √s (1 - a / (1 + √a0)) = √s (1 - a + √a0) / (1 + √a0), which has no difference.
@jax.jit
def root_product(
    s: Float[Array, "*b n"], s0: Float[Array, "*b"], v: Float[Array, "*b n"]
) -> Float[Array, "*b n"]:
    """B v."""
    _, a, a0 = fractions(s, s0)
    extra = root(a0)[..., None]
    top, scaled = dominant(a), root(s) * v
    rest = jnp.sum(jnp.where(top, 0, scaled), -1, keepdims=True)
    of_top = scaled * (complement(a, a0) + extra) - a * rest
    of_others = scaled * (1 + extra) - a * jnp.sum(scaled, -1, keepdims=True)
    return jnp.where(top, of_top, of_others) / (1 + extra)


@jax.jit
def root_transposed_product(
    s: Float[Array, "*b n"], s0: Float[Array, "*b"], v: Float[Array, "*b n"]
) -> Float[Array, "*b n"]:
    """Bᵀ v = √s (v - ⟨a, v⟩ + √a0 v) / (1 + √a0)."""
    _, a, a0 = fractions(s, s0)
    extra = root(a0)[..., None]
    u, _ = centred(a, a0, v)
    return root(s) * (u + extra * v) / (1 + extra)


# F = diag(√s) H without its column k, for the Householder reflection H that sends q = √a to -e_k:
# then F Fᵀ = diag(√s) (I - q qᵀ) diag(√s) = C. With k the largest weight, H_ij is -q_j in row k and
# δ_ij - q_i q_j / (1 + q_k) in the others: where a weight is near 1 nothing cancels.
@jax.jit
def rank_factor(s: Float[Array, "*b n"], s0: Float[Array, "*b"]) -> Float[Array, "*b n m"]:
    """F of n - 1 columns; NaN with a sink, for C then has the rank n."""
    _, a, _ = fractions(s, s0)
    q = root(a)
    shape = (*s.shape, s.shape[-1] - 1)
    top = jnp.argmax(a, -1, keepdims=True)
    column = lax.broadcasted_iota(top.dtype, (*s.shape[:-1], shape[-1]), s.ndim - 1)
    column += (column >= top).astype(top.dtype)  # the classes other than k
    i, j = lax.broadcasted_iota(top.dtype, shape, s.ndim - 1), column[..., None, :]
    of_top, of_column = jnp.take_along_axis(q, top, -1), jnp.take_along_axis(q, column, -1)
    others = (i == j).astype(s.dtype) - q[..., None] * (of_column / (1 + of_top))[..., None, :]
    reflection = jnp.where(i == top[..., None], -of_column[..., None, :], others)
    return jnp.where((s0 == 0)[..., None, None], root(s)[..., None] * reflection, jnp.nan)


# C = L D Lᵀ with unit lower triangular L, L_ij = -s_i / q_j, and D_j = s_j q_j / q_{j-1}, where
# q_j = Σ_{k>j} s_k + s0 are the tails (Tanabe & Sagae 1992; the sink comes last).
@jax.jit
def cholesky_product(
    s: Float[Array, "*b n"], s0: Float[Array, "*b"], v: Float[Array, "*b n"]
) -> Float[Array, "*b n"]:
    """L √D v."""
    masses = jnp.concatenate([s, s0[..., None]], -1)
    tails = jnp.cumsum(masses[..., ::-1], -1)[..., ::-1]
    before, after = tails[..., :-1], tails[..., 1:]
    # √D_j = √(s_j / q_{j-1}) √q_j and √D_j / q_j: neither product of tails can underflow.
    share = root(quotient(s, jnp.where(before == 0, 1, before))) * v
    after_root = root(after)
    scaled = quotient(share, jnp.where(after == 0, 1, after_root))
    scaled = jnp.where(after == 0, 0, scaled)
    sums = jnp.cumsum(scaled, -1)
    below = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    return share * after_root - s * below
