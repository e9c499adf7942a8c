"""The spectrum of C(s, s0) by the secular equation."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft._rows.logits import divisor
from jaxsoft._simplex.formulas import Pair, PerClass, PerRow, first_largest, quotient

# With the largest weight s1, the second s2 and t = Σs + s0, an eigenvalue λ of C is a root of
#
#     R(λ) = Σ_{i≥2} w_i / (λ - s_i) + w_0 / λ = 1,    w_i = s_i (s1 - s_i) / t,  w_0 = s0 s1 / t,
#
# the secular equation Σ s_i² / (s_i - λ) = t times (s1 - λ) / t. No weight is negative, so to the
# right of s2, where the largest eigenvalue lies, R falls from its pole to 0 and nothing cancels.
#
# The unknown is τ = λ - s2, for the distance to the pole keeps its relative accuracy. A step keeps
# the term of that pole and replaces the others by A / (τ + G) of the same value and slope. Since
# 1 / R is concave in τ the replacement lies below R, from wherever it is made, so its root is a
# lower bound of λ. The first step is made at the upper bound u = s1 (t - s1 + s2) / t of λ, which
# is close to λ in the hard case of many weights just below the largest; from there the iterates
# climb.
#
# Everything is measured in units of u, which is at most twice λ: the weights w / u, the gaps and τ
# lie in [0, 1], in a saturated row as in any other.


def _places(s: PerClass) -> tuple[Bool[Array, "*b n"], Bool[Array, "*b n"]]:
    """Where the largest weight is, and the second: one place each (none for a second of one)."""
    s = lax.stop_gradient(s)
    first = first_largest(s)
    return first, ~first & first_largest(jnp.where(first, -1, s))


# λ is a simple eigenvalue unless three weights or more share the maximum, and dλ = vᵀ dC v, which
# is the derivative of the quadratic form: Σ (v_i - m)² ds_i + m² ds0 with m = ⟨a, v⟩. From
# C v = λ v it follows that v_i - m = λ v_i / s_i. Three weights or more that tie for the maximum
# share the sum of their slopes equally, which is the mean over the eigenvectors of λ.
@jax.custom_jvp
def _largest(s: PerClass, s0: PerRow) -> tuple[PerRow, PerRow]:
    """λ, and τ = λ - s2 to its own last bits."""
    # As in `fractions`: in a smaller unit no reciprocal of a total is flushed to 0.
    scale = jnp.where(jnp.max(s, -1) > 2.0**64, 2.0**-8, 1).astype(s.dtype)
    s, s0 = scale[..., None] * s, scale * s0
    top = jnp.max(s, -1)
    below = jnp.where(s < top[..., None], s, 0)
    repeated = _count(s == top[..., None], s.dtype) - 1
    pole = jnp.where(repeated > 0, top, jnp.max(below, -1))
    others = _sum(below) + repeated * top + s0
    t = divisor(others + top)
    unit = divisor(top * ((others + pole) / t))
    # Weights equal to s2 have their pole in the same place, and so has the sink if s2 is 0.
    near = _count(s == pole[..., None], s.dtype) * (pole / unit) * ((top - pole) / t)
    weight0 = (s0 / unit) * (top / t)
    near += jnp.where(pole == 0, weight0, 0)
    weight0 = jnp.where(pole == 0, 0, weight0)
    far = s < pole[..., None]
    weights = jnp.where(far, (s / unit[..., None]) * ((top[..., None] - s) / t[..., None]), 0)
    gaps = jnp.where(far, (pole[..., None] - s) / unit[..., None], 1)
    gap0 = jnp.where(pole == 0, 1, pole / unit)

    tau = (others / t) * ((top - pole) / unit)  # u - s2
    steps = 4 if s.dtype.itemsize > 4 else 3
    for step in range(1, steps + 1):
        distance, distance0 = tau[..., None] + gaps, tau + gap0
        terms, term0 = weights / distance, weight0 / distance0
        # Only the value of the last step has to be summed to the last bit: a step corrects the
        # rounding errors of those before.
        value = _sum(terms) if step == steps else jnp.sum(terms, -1)
        slope = jnp.sum(terms / distance, -1)
        value, slope = value + term0, slope + term0 / distance0
        length = _quotient(value, slope)
        tau = _two_poles(near, value * length, jnp.maximum(length - tau, 0))
    tau *= unit
    return jnp.minimum(pole + tau, top) / scale, tau / scale


# Plain summation of many equal numbers beside a larger one errs by tens of eps: each time the same
# part is lost. Added to a number of twice the sum and taken off it, every number loses its last
# bits; the leading part is a multiple of one unit, and adds up without a rounding. The lost part is
# so small that the rounding of its own sum does not count (Rump, Ogita & Oishi 2008).
def _sum(x: PerClass) -> PerRow:
    """Σ x of numbers of 0 or more, to the last bit."""
    unit = 2 * jnp.sum(x, -1, keepdims=True)
    leading = (x + unit) - unit
    return jnp.sum(leading, -1) + jnp.sum(x - leading, -1)


def _count(where: Bool[Array, "*b n"], dtype: jnp.dtype) -> PerRow:
    # Of floats, for XLA's sum of integers takes several times as long on the CPU.
    return jnp.sum(where.astype(dtype), -1)


def _two_poles(near: PerRow, far: PerRow, gap: PerRow) -> PerRow:
    """The root τ ≥ 0 of near / τ + far / (τ + gap) = 1."""
    h = far + near - gap
    r = jnp.sqrt(h * h + 4 * near * gap)
    return jnp.where(h >= 0, 0.5 * (h + r), _quotient(2 * near * gap, r - h))


def _quotient(a: Array, b: Array) -> Array:
    """a / b, and 0 for a = 0."""
    return jnp.where(a == 0, 0, a / jnp.where(a == 0, 1, b))


@_largest.defjvp
def _largest_jvp(primals: Pair, tangents: Pair) -> tuple[Pair, Pair]:
    (s, s0), (ds, ds0) = primals, tangents
    value, tau = _largest(s, s0)
    slopes, slope0 = _slopes(*_in_units(s, s0, value, tau))
    change = jnp.sum(slopes * ds, -1) + slope0 * ds0
    return (value, tau), (change, change - jnp.sum(ds, -1, where=_places(s)[1]))


# Slopes and eigenvector do not depend on the unit. The derivative of a ratio divides by the square
# of its divisor, which would underflow in a saturated row if λ were not the unit.
def _in_units(s: PerClass, s0: PerRow, value: PerRow, tau: PerRow) -> tuple[Array, ...]:
    """The arguments in units of λ, which counts as a constant."""
    unit = lax.stop_gradient(divisor(value))
    return s / unit[..., None], s0 / unit, value / unit, tau / unit


# In units of m = τ the eigenvector of λ has the entries -y_i = -s_i τ / (λ - s_i) for i ≥ 2, with
# the pole itself first, y_2 = s2; the largest is y_1 = Σ_{i≥2} y_i + y_0, since C 1 = a0 s, where
# y_0 = s0 τ / λ is the sink's as that of a class with its pole at 0.
def _eigenvector(
    s: PerClass, s0: PerRow, value: PerRow, tau: PerRow
) -> tuple[PerClass, PerRow, Bool[Array, "*b"], PerClass]:
    """y_i / y_1 (i ≥ 2, else 0), y_1, whether C = 0, and τ / (λ - s_i)."""
    first, second = _places(s)
    zero = (jnp.sum(s, -1, where=first) == 0) | (jnp.sum(s, -1, where=~first) + s0 == 0)
    value, tau = jnp.where(zero, 1, value), jnp.where(zero, 1, tau)
    gaps = jnp.where(first | second, 1, jnp.sum(s, -1, where=second)[..., None] - s)
    f = jnp.where(second, 1, _ratio(tau[..., None], gaps))
    y = jnp.where(first, 0, s * f)
    y1 = jnp.where(zero, 1, jnp.sum(y, -1) + s0 * (tau / value))
    return y / y1[..., None], y1, zero, f


def _slopes(s: PerClass, s0: PerRow, value: PerRow, tau: PerRow) -> tuple[PerClass, PerRow]:
    """∂λ/∂s and ∂λ/∂s0."""
    first, _ = _places(s)
    r, y1, zero, f = _eigenvector(s, s0, value, tau)
    top = jnp.sum(s, -1, where=first)
    # Where C = 0 the eigenvector is that of the one weight left, with m = 1, or of none, m = 0.
    mean = lax.stop_gradient((top != 0).astype(s.dtype))
    scale = jnp.where(zero, mean, value / y1)
    of_top = jnp.where(zero, 1 - mean, value / divisor(top))
    of_sink = jnp.where(zero, mean, tau / y1)
    square = 1 + jnp.sum(r * r, -1)
    slopes = jnp.where(first, of_top[..., None], scale[..., None] * f) ** 2 / square[..., None]
    tied = s == top[..., None]
    count = _count(tied, s.dtype)
    shared = (jnp.sum(slopes, -1, where=tied) / count)[..., None]
    return jnp.where(tied & (count > 2)[..., None], shared, slopes), of_sink**2 / square


# τ / (τ + g) with 0 / 0 = 1. There the derivative is NaN, as it should be: g = 0 at τ = 0 is a
# third weight that shares the maximum, and the eigenvector can turn in the space of those.
@jax.custom_jvp
def _ratio(tau: Float[Array, "..."], gap: Float[Array, "..."]) -> Float[Array, "..."]:
    total = tau + gap
    return jnp.where(total == 0, 1, tau / divisor(total))


@_ratio.defjvp
def _ratio_jvp(primals: Pair, tangents: Pair) -> Pair:
    (tau, gap), (dtau, dgap) = primals, tangents
    total = tau + gap
    return _ratio(tau, gap), (gap / total / total) * dtau - (tau / total / total) * dgap


@jax.jit
def bounds(s: PerClass, s0: PerRow) -> tuple[PerRow, PerRow]:
    """A lower and an upper bound of the largest eigenvalue."""
    first, second = _places(s)
    top, pole = jnp.sum(s, -1, where=first), jnp.sum(s, -1, where=second)
    others = jnp.sum(s, -1, where=~first) + s0
    total = divisor(top + others)
    lower = pole * (1 + quotient(top - pole, total))
    return lower, top * quotient(others + pole, total)


@jax.jit
def largest_eigenvalue(s: PerClass, s0: PerRow) -> PerRow:
    """λ_1 = ‖C‖_2; 0 for no class."""
    return _largest(s, s0)[0] if s.shape[-1] else jnp.zeros_like(s0)


@jax.jit
def largest_eigenpair(s: PerClass, s0: PerRow) -> tuple[PerRow, PerClass]:
    """λ_1 and its unit eigenvector, positive at the largest weight and nowhere else."""
    value, tau = _largest(s, s0)
    first, _ = _places(s)
    r, _, zero, _ = _eigenvector(*_in_units(s, s0, value, tau))
    v = jnp.where(first, 1, jnp.where(zero[..., None], 0, -r))
    return value, v / jnp.sqrt(1 + jnp.sum(r * r, -1, keepdims=True))
