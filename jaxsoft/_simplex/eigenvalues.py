"""All eigenvalues of C(s, s0) by the secular equation, in O(n²) and without an n x n array."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft._core import programs
from jaxsoft._core.autodiff import transposable
from jaxsoft._core.sizes import known
from jaxsoft._simplex.formulas import Pair, PerClass, PerRow

# With the weights in descending order, p_1 ≥ ... ≥ p_n, the sink as one more pole p_{n+1} = 0 of
# weight s0, and w_i = p_i for the others, the eigenvalues are the roots of
#
#     F(λ) = Σ w_i / (p_i - λ) = 0,        p_k ≥ λ_k ≥ p_{k+1}.
#
# Between two poles F rises from -∞ to ∞. The unknown x is the distance of λ to the nearer one, in
# units of the gap between them, and near / x - far / (1 - x) + rest has the value, the slope and
# the curvature of F (up to its sign) at the last x when near and far are the sums, of one sign,
#
#     near = Σ w_i (x / e_i)³ b_i,    far = Σ w_i ((1 - x) / e_i)³ a_i,    e_i = a_i + x,
#
# with a_i and b_i the distances of pole i from the nearer and from the farther one (Borges & Gragg
# 1993). The root of that model comes out as near / (near + y) with a positive y: it cannot leave
# the gap. From any start the iterates go to the root from one side, their number of right digits
# trebling. All products are ordered so that no factor of them leaves the range of the type.

_BLOCK = 2**19  # entries of an intermediate array

# A number for each pole, beside each eigenvalue of a block.
PerPole: TypeAlias = Float[Array, "*b k m"]


@programs.program(places=programs.as_given)
def eigenvalues(s: PerClass, s0: PerRow) -> PerClass:
    """All eigenvalues, ascending."""
    descending = jnp.sort(s, -1, descending=True)
    return _eigenvalues(descending, s0)[0][..., ::-1] if s.size else s


def _in_blocks(fun: Callable[[Int[Array, " k"]], Array], like: PerClass) -> PerClass:
    """Calls `fun` with the numbers 0..n-1, some at a time, and joins its results."""
    n = like.shape[-1]
    # Of a symbolic size (`jax.export`), one at a time.
    counted = known(lambda: int(like.size) >= 0, False)
    size = max(1, min(n, _BLOCK // (like.size + 1))) if counted else 1
    count = -(-n // size)
    numbers = jnp.minimum(jnp.arange(count * size), n - 1).reshape(count, size)
    blocks = jnp.moveaxis(lax.map(fun, numbers), 0, -2)
    return blocks.reshape(*like.shape[:-1], count * size)[..., :n]


def _poles(p: PerClass) -> Float[Array, "*b m"]:
    """The weights, and 0 for the sink."""
    return jnp.concatenate([p, jnp.zeros_like(p[..., :1])], -1)


def _offsets(
    poles: Float[Array, "*b m"], weights: Float[Array, "*b m"], k: Int[Array, " k"]
) -> Float[Array, "*b k"]:
    """The distance of λ_k to the nearer pole, negative if that lies above it."""
    high, low = jnp.take(poles, k, -1), jnp.take(poles, k + 1, -1)
    # Between poles of 0, and above the pole of a sink without weight, λ is 0.
    zero = (high == 0) | ((low == 0) & (weights[..., -1:] == 0))
    gap = jnp.where(zero | (high == low), 1, high - low)
    from_high, from_low = (
        (poles[..., None, :] - end[..., None]) / gap[..., None] for end in (high, low)
    )
    weights = weights[..., None, :] / gap[..., None]
    x, y = _step(from_high, from_low, weights, jnp.full_like(gap, 0.5))
    rising = x > y  # the root is nearer to the pole below
    near = jnp.where(rising[..., None], -from_low, from_high)
    far = jnp.where(rising[..., None], -from_high, from_low)
    # A loop: in a straight program XLA rewrites a / (b / c) as a c / b, which can overflow.
    steps = 6 if poles.dtype.itemsize > 4 else 5
    x = lax.fori_loop(0, steps, lambda _, x: _step(near, far, weights, x)[0], jnp.minimum(x, y))
    offset = jnp.where(rising, x * gap, -x * gap)
    return jnp.where(zero, -high, jnp.where(high == low, 0, offset))


def _step(a: PerPole, b: PerPole, w: PerPole, x: Float[Array, "*b k"]) -> Pair:
    """The root of the model at x, as its distance to either pole."""
    e = a + x[..., None]
    inverse = jnp.where(w == 0, 0, 1 / jnp.where(w == 0, 1, e))
    to_near, to_far = x[..., None] * inverse, (1 - x)[..., None] * inverse
    value = jnp.sum(w * inverse, -1)
    near = jnp.sum(w * (b * to_near) * to_near * to_near, -1)
    far = jnp.sum(w * (a * to_far) * to_far * to_far, -1)
    # y² - (u - v - F) y - u v = 0, where at the root of F itself y is u.
    u, v = near * (1 - x) / x, far * x / (1 - x)
    q = u - v - value
    root = jnp.hypot(q, 2 * jnp.sqrt(u) * jnp.sqrt(v))
    y = jnp.where(q >= 0, (q + root) / 2, u * (2 * v / jnp.where(q >= 0, 1, root - q)))
    return near / (near + y), y / (near + y)


# dλ = Σ (v_i - m)² ds_i + m² ds0 as for the largest one, and v_i - m = λ m / (s_i - λ), so the
# slopes are (λ / e_i)² / Σ_j (p_j / e_j)² with e = p - λ, that of the sink included (its e is -λ).
#
# The derivative of an eigenvalue between weights that tie is the mean over its eigenvectors, an
# equal share for each of these weights; it has no second one. An eigenvalue that is 0 by structure
# has as eigenvectors the classes without weight and, if there is no sink, the constant: its
# derivative is the mean over these.
@jax.custom_jvp
def _eigenvalues(p: PerClass, s0: PerRow) -> tuple[PerClass, PerClass]:
    """The eigenvalues, descending, and their offsets from the nearest pole."""
    poles, weights = _poles(p), jnp.concatenate([p, s0[..., None]], -1)
    offset = _in_blocks(lambda k: _offsets(poles, weights, k), p)
    return _origin(p, offset) + offset, offset


def _origin(p: PerClass, offset: PerClass) -> PerClass:
    """The pole from which an offset is counted."""
    return jnp.where(offset > 0, _poles(p)[..., 1:], p)


@_eigenvalues.defjvp
def _eigenvalues_jvp(primals: Pair, tangents: Pair) -> tuple[Pair, Pair]:
    (p, s0), (dp, ds0) = primals, tangents
    value, offset = _eigenvalues(p, s0)
    changes = jnp.concatenate([dp, ds0[..., None]], -1)

    def change(changes: Array) -> Array:
        of_block = lambda k: jnp.sum(_slopes(p, s0, value, offset, k) * changes[..., None, :], -1)
        # Without the checkpoint reverse mode would keep the slopes of all blocks, n² of them.
        return _in_blocks(jax.checkpoint(of_block), p)

    dvalue = transposable(change, changes)
    return (value, offset), (dvalue, dvalue - _origin(dp, offset))


def _slopes(p: PerClass, s0: PerRow, value: PerClass, offset: PerClass, k: Array) -> PerPole:
    """∂λ_k/∂p and, last, ∂λ_k/∂s0."""
    poles = _poles(p)
    of_all = p, poles[..., 1:], value, offset
    high, low, value, offset = (jnp.take(x, k, -1)[..., None] for x in of_all)
    poles = poles[..., None, :]
    zero = value == 0
    tied = (high == low) & ~zero
    simple = ~(zero | tied)
    origin = jnp.where(offset > 0, low, high)
    e = jnp.where(simple, (poles - origin) - offset, 1)
    # In units of the distance to the nearest pole no ratio exceeds 1.
    ratio = lax.stop_gradient(jnp.abs(offset)) / e
    norm = jnp.sum((poles / jnp.where(simple, value, 1) * ratio) ** 2, -1, keepdims=True)
    of_simple = ratio**2 / jnp.where(simple, norm, 1)

    equal = (poles == high).astype(p.dtype)
    of_tied = equal / jnp.sum(equal, -1, keepdims=True) + _kink(tied, high)
    return jnp.where(zero, _null_slopes(p, s0), jnp.where(tied, of_tied, of_simple))


def _null_slopes(p: PerClass, s0: PerRow) -> Float[Array, "*b 1 m"]:
    """The slopes of an eigenvalue that is 0."""
    absent = p == 0
    count = jnp.sum(~absent, -1).astype(p.dtype)
    constant = jnp.where((s0 == 0) & (count > 0), 1 / jnp.maximum(count, 1), 0)
    nullity = p.shape[-1] - count + (constant > 0).astype(p.dtype)
    slopes = jnp.where(absent, 1 + constant[..., None], 0)
    slopes = jnp.concatenate([slopes, constant[..., None]], -1)
    return (slopes / jnp.maximum(nullity, 1)[..., None])[..., None, :]


# 0, with a NaN as its derivative by x at a kink, where it has none.
@jax.custom_jvp
def _kink(where: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.zeros_like(x)


@_kink.defjvp
def _kink_jvp(primals: Pair, tangents: tuple[Any, Array]) -> Pair:
    return _kink(*primals), jnp.where(primals[0], jnp.nan, 0) * tangents[1]
