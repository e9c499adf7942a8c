"""Formulas of C(s, s0) = diag(s) - s sᵀ / t, t = Σs + s0: the Jacobian of the whole softmax family.

Weights s have shape [..., n], the sink s0 has shape [...]. The sink is one more class of which no
row and no column is kept: a vector has the entry 0 there. Everything works on the fractions
a = s / t and a0 = s0 / t, which sum to 1, so that neither a weight of 1e30 (a small temperature)
nor one of 1e-30 is ever squared.

1 - a is never formed: it is the sum of the others. Derivatives are those of the formulas: a class
is selected by numbers that count as constants, and the branches of a selection are equal as
functions of (s, s0).

With a mesh each device has a part of the classes; s0 and all else of a row is replicated.
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsoft._core import devices, programs
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.devices import Mesh
from jaxsoft._rows import jacobian_product
from jaxsoft._rows.logits import divisor

jit = functools.partial(jax.jit, static_argnames="mesh")

# A number for each class of each row, and a number for each row.
PerClass: TypeAlias = Float[Array, "*b n"]
PerRow: TypeAlias = Float[Array, "*b"]
Pair: TypeAlias = tuple[Array, Array]


def total(x: Shaped[Array, "*b n"], mesh: Mesh | None, *, keepdims: bool = False) -> Array:
    """The sum over all classes."""
    return devices.total(jnp.sum(x, -1, keepdims=keepdims), mesh)


def _largest(x: Array, mesh: Mesh | None, *, keepdims: bool = False) -> Array:
    """The maximum over all classes, 0 or more; on several devices a constant."""
    return devices.largest(jnp.max(x, -1, keepdims=keepdims, initial=0), mesh)


def fractions(s: PerClass, s0: PerRow, mesh: Mesh | None = None) -> tuple[PerRow, PerClass, PerRow]:
    """Returns t, a and a0; a row without any weight has t = 1 and fractions of 0."""
    t = divisor(total(s, mesh) + s0)
    # XLA:CPU (jax 0.10) multiplies by 1 / t, which is flushed to 0 for t > 2^126: a quarter is not.
    unit = jnp.where(t > 2.0**64, 0.25, 1).astype(t.dtype)
    return t, quotient(unit[..., None] * s, (unit * t)[..., None]), quotient(s0, t)


# d(x / y) = (dx - (x / y) dy) / y. JAX takes 1 / y² in it, which is infinite for y = 1e-35 and 0
# for y = 1e35, both of which totals and tails of float32 reach.
@jax.custom_jvp
def quotient(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / y, with a derivative that has the range of the type."""
    return x / y


@quotient.defjvp
def _quotient_jvp(primals: Pair, tangents: Pair) -> Pair:
    (x, y), (dx, dy) = primals, tangents
    ratio = quotient(x, y)
    return ratio, quotient(dx - ratio * dy, y)


def dominant(a: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Where a class holds more than half of the total: at most once in a row."""
    return a > 0.5


def first_largest(s: PerClass) -> Bool[Array, "*b n"]:
    """Where the largest weight is, of equals the first."""
    # By two plain reductions: argmax takes ten times as long on the CPU.
    number, n = lax.broadcasted_iota(jnp.int32, s.shape, s.ndim - 1), s.shape[-1]
    largest = s == jnp.max(s, -1, keepdims=True, initial=-1)
    return number == jnp.min(jnp.where(largest, number, n), -1, keepdims=True, initial=n)


def others(a: PerClass, mesh: Mesh | None = None) -> PerClass:
    """Σ_{j≠i} a_j, by subtraction from the sum where at least half of it is left."""
    of_row = total(a, mesh, keepdims=True)
    top = a > of_row / 2
    rest = total(jnp.where(top, 0, a), mesh, keepdims=True)
    return jnp.where(top, rest, of_row - a)


def complement(a: PerClass, a0: PerRow, mesh: Mesh | None = None) -> PerClass:
    """1 - a, the share of all others."""
    return others(a, mesh) + a0[..., None]


# ------------------------------------------------------------------------- products with vectors


# C is t times the Jacobian of softmax at the fractions a, and is centred as that is: see
# `_rows/jacobian_product.py`. With P = I - 1 wᵀ, C = Pᵀ C P.
def anchor(a: PerClass, a0: PerRow, mesh: Mesh | None = None) -> PerClass:
    """The weights w of the classes."""
    return jacobian_product.anchor([a], _flat(a, a0, mesh))[0]


def _flat(a: PerClass, a0: PerRow, mesh: Mesh | None) -> Float[Array, "*b 1"]:
    a, a0 = lax.stop_gradient((a, a0))
    return jacobian_product.flatness(jnp.maximum(_largest(a, mesh), a0))[..., None]


def centred(
    a: PerClass, a0: PerRow, v: PerClass, v0: PerRow | float = 0.0, mesh: Mesh | None = None
) -> tuple[PerClass, PerRow]:
    """v - ⟨a, v⟩, the mean being over the classes and the sink, and its entry for the sink."""
    v0 = jnp.broadcast_to(jnp.asarray(v0, a0.dtype), a0.shape)
    shares, vs, axis = [a, a0[..., None]], [v, v0[..., None]], ClassAxis(a.ndim - 1, mesh)
    flat = _flat(a, a0, mesh)
    u, u0 = jacobian_product.centred(shares, vs, flat, axis, jacobian_product.total)
    return u, u0[..., 0]


@jit
def product(s: PerClass, s0: PerRow, v: PerClass, mesh: Mesh | None = None) -> PerClass:
    """C v = s ∘ (v - ⟨a, v⟩).

    The last step, Pᵀ, is a rounding error in a row that nothing dominates. But it makes the
    program symmetric, and so its transpose, the reverse mode, is as accurate as itself.
    """
    _, a, a0 = fractions(s, s0, mesh)
    u, u0 = centred(a, a0, v, mesh=mesh)
    out = s * u
    excess = total(out, mesh) + s0 * u0
    return out - anchor(a, a0, mesh) * excess[..., None]


@functools.partial(jax.jit, static_argnames=("axis", "mesh"))
def products(s: PerClass, s0: PerRow, v: Array, axis: int, mesh: Mesh | None) -> Array:
    """C times each column of v (axis -1), or each row times C (axis -2)."""
    return jax.vmap(lambda v: product(s, s0, v, mesh), axis, axis)(v)


@jit
def quadratic_form(s: PerClass, s0: PerRow, v: PerClass, mesh: Mesh | None = None) -> PerRow:
    """vᵀ C v = Σ s (v - ⟨a, v⟩)² + s0 ⟨a, v⟩²: no term is negative."""
    _, a, a0 = fractions(s, s0, mesh)
    u, u0 = centred(a, a0, v, mesh=mesh)
    return total(s * u * u, mesh) + s0 * u0 * u0


@jit
def second(s: PerClass, s0: PerRow, u: PerClass, v: PerClass, mesh: Mesh | None = None) -> PerClass:
    """t s ∘ (w - ⟨a, w⟩) with w = (u - ⟨a, u⟩)(v - ⟨a, v⟩)."""
    t, a, a0 = fractions(s, s0, mesh)
    (u, u0), (v, v0) = (centred(a, a0, x, mesh=mesh) for x in (u, v))
    w, _ = centred(a, a0, u * v, u0 * v0, mesh)
    return t[..., None] * s * w


# ------------------------------------------------------------------------------- entries and sums


def _off_diagonal(s: Array, a: Array, s_other: Array, a_other: Array) -> Array:
    """-s_i a_j = -s_j a_i, by a formula that does not tell i from j: the matrix is symmetric."""
    return 0 - jnp.maximum(s, s_other) * jnp.minimum(a, a_other)  # 0, not -0, for a weight of 0


@jit
def diagonal(s: PerClass, s0: PerRow, mesh: Mesh | None = None) -> PerClass:
    """s (1 - a)."""
    _, a, a0 = fractions(s, s0, mesh)
    return s * complement(a, a0, mesh)


# The rows are divided as the weights are, the columns are not.
@programs.program(places=lambda ndim: (*range(ndim), None))
def matrix(s: PerClass, s0: PerRow) -> Float[Array, "*b n n"]:
    """C itself."""
    _, a, _ = fractions(s, s0)
    off = _off_diagonal(s[..., :, None], a[..., :, None], s[..., None, :], a[..., None, :])
    on = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=bool), off.shape)
    return jnp.where(on, diagonal(s, s0)[..., None], off)


@programs.program(static=("mesh",), places=programs.as_given)
def row(s: PerClass, s0: PerRow, i: Int[Array, "*b"], *, mesh: Mesh | None) -> PerClass:
    """C[i, :]; NaN where i is outside [0, n)."""
    _, a, _ = fractions(s, s0, mesh)
    axis = ClassAxis(s.ndim - 1, mesh)
    n, on = axis.count(s), axis.one_hot(axis.places(i, s), s)
    of_row = [total(jnp.where(on, x, 0), mesh, keepdims=True) for x in (s, a)]
    out = jnp.where(on, diagonal(s, s0, mesh), _off_diagonal(s, a, *of_row))
    return jnp.where(((i >= 0) & (i < n))[..., None], out, jnp.nan)


@jit
def trace(s: PerClass, s0: PerRow, mesh: Mesh | None = None) -> PerRow:
    """Σ s (1 - a)."""
    return total(diagonal(s, s0, mesh), mesh)


@jit
def norm_inf(s: PerClass, s0: PerRow, mesh: Mesh | None = None) -> PerRow:
    """The largest absolute row sum, max s (2 Σ_{j≠i} a_j + a0); C is symmetric: also the 1-norm."""
    _, a, a0 = fractions(s, s0, mesh)
    largest = jnp.max(s * (2 * others(a, mesh) + a0[..., None]), -1, initial=0)
    if mesh is None:
        return largest
    # If several devices have the maximum, its derivative is divided equally among them.
    highest = (largest == devices.largest(largest, mesh)).astype(s.dtype)
    return devices.total(largest * (highest / devices.total(highest, mesh)), mesh)


# ‖C‖_F² = t² Σ a_i² [(1-a_i)² + Σ_{j≠i} a_j²]. In a saturated row every term is the square of a
# number that may be 1e-35, so all is in units of the largest entry d = max a (1 - a), which lies on
# the diagonal. In the row of a dominant class (1-a)/d is at most 2, in the others a/d is.
@jit
def norm_frobenius(s: PerClass, s0: PerRow, mesh: Mesh | None = None) -> PerRow:
    """‖C‖_F, with the derivative 0 where C = 0."""
    t, a, a0 = fractions(s, s0, mesh)
    rest = complement(a, a0, mesh)
    largest = lax.stop_gradient(_largest(a * rest, mesh, keepdims=True))
    d, top = divisor(largest), dominant(a)
    others = jnp.where(top, 0, a)
    squares = total(a * a, mesh, keepdims=True) - a * a
    top_squares = total((others / d) ** 2, mesh, keepdims=True)
    of_top = a * a * ((jnp.where(top, rest, 0) / d) ** 2 + top_squares)
    of_others = (others / d) ** 2 * (rest * rest + squares)
    square = total(jnp.where(top, of_top, of_others), mesh)
    nonzero = largest[..., 0] != 0
    return jnp.where(nonzero, t * d[..., 0] * jnp.sqrt(jnp.where(nonzero, square, 1)), 0)


@jit
def effective_rank(s: PerClass, s0: PerRow, mesh: Mesh | None = None) -> PerRow:
    """(tr C / ‖C‖_F)²; 0 where C = 0."""
    frobenius = norm_frobenius(s, s0, mesh)
    zero = frobenius == 0
    unit = lax.stop_gradient(divisor(frobenius))
    ratio = (trace(s, s0, mesh) / unit) / jnp.where(zero, 1, frobenius / unit)
    return jnp.where(zero, 0, ratio) ** 2


# ------------------------------------------------------------------------ probabilities and classes


# With every logit moved by at most r, p_i is largest when its own logit goes up and all others
# down, and smallest the other way round; the sink's logit stays. In units of e^r all exponents are
# negative.
@jit
def certificate(s: PerClass, s0: PerRow, r: PerRow, mesh: Mesh | None) -> tuple[PerClass, PerClass]:
    """The smallest and the largest probabilities; NaN where r is negative."""
    t, a, a0 = fractions(s, s0, mesh)
    a0, rest = a0[..., None], others(a, mesh)
    decay = jnp.exp(-jnp.where(r >= 0, r, jnp.nan) * t)[..., None]
    upper = _share(a, rest * decay * decay + a0 * decay)
    # Where there is no other class, e^-r is a factor of both.
    common = jnp.where(rest == 0, 1, decay)
    lower = _share(a * decay * common, rest + a0 * common)
    return jnp.where((rest == 0) & (a0 == 0), a, lower), upper


def _share(part: Array, rest: Array) -> Array:
    """part / (part + rest), 0 / 0 being 0."""
    whole = part + rest
    return jnp.where(whole == 0, 0, quotient(part, divisor(whole)))


@functools.partial(jax.jit, static_argnames="count")
def merged(s: PerClass, ids: Int[Array, " n"], *, count: int) -> tuple[Array, PerRow]:
    """The weights summed over the classes of each id, and the sum of those of no id in [0, m)."""
    place = jnp.where((ids >= 0) & (ids < count), ids, count)
    sums = jnp.zeros((*s.shape[:-1], count + 1), s.dtype).at[..., place].add(s)
    return sums[..., :-1], sums[..., -1]
