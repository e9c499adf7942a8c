"""log Σ_j b_j exp(a_j) with factors of any sign and size."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoft._core import devices, double_word
from jaxsoft._core.autodiff import analytic
from jaxsoft._core.axes import ClassAxis
from jaxsoft._rows.logits import Logits, keep_inputs, maximum

_FAR = 1e4  # no factor brings terms whose exponents are so far apart to one size


def log_and_sign(
    logits: Callable[[], Logits], b: Array, where: Array | None, axis: ClassAxis
) -> tuple[Array, Array]:
    """log|S| and the sign of S = Σ_j b_j exp(z_j)."""

    def given() -> tuple[Array, Array]:
        z = logits().z
        factors = devices.copied(b, z, axis.mesh).astype(z.dtype)
        # A masked factor does not count, even if it is infinite or NaN.
        factors = factors if where is None else jnp.where(where, factors, 0)
        # A term is infinite by its exponent or by its factor. 0 times infinity is NaN.
        return jnp.where(jnp.isinf(factors) & (z > -jnp.inf), jnp.inf, z), factors

    pivot = _pivot(*lax.stop_gradient(given()), axis)
    rest = keep_inputs(lambda: rest_of(*given(), pivot, axis))
    rest = devices.joined(rest, axis.mesh)
    high, low = double_word.plus_logarithm(pivot.exponent, pivot.factor)
    sign = jnp.sign(pivot.factor.fraction) * jnp.sign(1 + rest)
    return high + (low + _log_abs(rest)), sign


# Neither b_j nor exp(a_j) nor the quotient of two of them need be of a size that the
# dtype holds, and a_j + log|b_j| may cancel. So all is measured by the largest term, the pivot k:
#
#     S = b_k exp(a_k) (1 + R),    R = Σ_{j≠k} t_j,    t_j = (f_j / f_k) exp(s_j),
#     s_j = (a_j - a_k) + (e_j - e_k) log 2            with b = f 2^e,
#     log|S| = (a_k + log|b_k|) + log|1 + R|
#
# The differences in s_j keep the digits that cancel between them, and the first sum has twice the
# working precision, once a row.
class _Pivot(NamedTuple):
    """The largest term of each row: constants, without the axis.

    A row with an infinite term, or without any term, has no pivot. It is measured by an exponent
    and a factor so large that no finite term counts.

    Attributes:
        exponent: a_k.
        factor: b_k.
        place: k on this device; the number of entries on the others, and where there is none.
        missing: 1 where there is none, else 0.
    """

    exponent: Array
    factor: double_word.Parts
    place: Array
    missing: Array


def _pivot(z: Array, b: Array, axis: ClassAxis) -> _Pivot:
    at, mesh, n, info = axis.position, axis.mesh, z.shape[axis.position], jnp.finfo(z.dtype)
    parts = double_word.parts(b)
    z = jnp.where(parts.fraction == 0, -jnp.inf, z)
    # From the largest exponent on, for a_j + log|b_j| would round the logarithm off.
    top = jnp.minimum(devices.largest(maximum(z, at), mesh), float(info.max))
    # log|f| is |f| - 1 to within 0.07.
    logarithm = parts.exponent * double_word.log_of_two(z.dtype)[0] + (jnp.abs(parts.fraction) - 1)
    size = (z - axis.expand(top)) + logarithm
    highest = axis.expand(devices.largest(maximum(size, at), mesh))
    first = devices.index(mesh).astype(jnp.int32) * n if mesh else 0
    number = lax.broadcasted_iota(jnp.int32, z.shape, at) + first
    number = jnp.where((size == highest) & (highest < jnp.inf), number, axis.count(z))
    number = -devices.largest(-jnp.min(number, at), mesh)
    found = number < axis.count(z)
    some = axis.places(jnp.where(found, number, 0), z)

    def of_pivot(x: Array, otherwise: ArrayLike) -> Array:
        return jnp.where(found, axis.take(x, some), otherwise)

    fraction, exponent = of_pivot(parts.fraction, 1), of_pivot(parts.exponent, float(info.maxexp))
    factor, missing = double_word.Parts(fraction, exponent), jnp.where(found, 0, jnp.ones_like(top))
    return _Pivot(of_pivot(z, top), factor, axis.places(number, z), missing)


# dt_j = t_j dz_j + u_j db_j, where u_j = exp(z_j) over the pivot, of which du_j = u_j dz_j.
def _terms(z: Array, b: Array | None, pivot: _Pivot, axis: ClassAxis) -> Array:
    """t_j, or exp(a_j) over the pivot without b."""
    fraction, exponent = (1, 0) if b is None else double_word.parts(b)
    z = z if b is None else jnp.where(fraction == 0, -jnp.inf, z)
    high, middle, low = double_word.log_of_two(z.dtype)
    start, (of_pivot, power) = axis.expand(pivot.exponent), map(axis.expand, pivot.factor)
    gap, powers = z - start, exponent - power
    # Neither infinities nor numbers beyond the largest come into the error of the difference.
    _, error = double_word.sum_of(jnp.where(jnp.abs(gap) < _FAR, z, start), -start)
    s, rounded = double_word.sum_of(jnp.clip(gap, -_FAR, _FAR), powers * high)
    return (fraction / of_pivot) * jnp.exp(s) * (1 + (rounded + error + powers * (middle + low)))


def _terms_pullback(
    z: Array, b: Array | None, pivot: _Pivot, axis: ClassAxis, cotangent: Array
) -> Any:
    z_bar = cotangent * terms(z, b, pivot, axis)
    if b is None:
        return z_bar, None, None
    # One that overflows is finite, so that a cotangent of 0 stays 0.
    largest = float(jnp.finfo(z.dtype).max)
    return z_bar, cotangent * jnp.clip(terms(z, None, pivot, axis), -largest, largest), None


terms = analytic(_terms, _terms_pullback, static=(3,))


# R = S / (b_k exp(a_k)) - 1 with the pivot for a constant, so that dR = Σ dt_j over all j.
def _rest(z: Array, b: Array, pivot: _Pivot, axis: ClassAxis) -> Array:
    others = jnp.where(axis.one_hot(pivot.place, z), 0, _terms(z, b, pivot, axis))
    return devices.copied(axis.sum(others) - pivot.missing, z, axis.mesh)


def _rest_pullback(z: Array, b: Array, pivot: _Pivot, axis: ClassAxis, cotangent: Array) -> Any:
    return _terms_pullback(z, b, pivot, axis, axis.expand(cotangent))


rest_of = analytic(_rest, _rest_pullback, static=(3,))


def _log_abs(rest: Array) -> Array:
    """log|1 + R|; -inf with derivative 0 where the sum is 0."""
    # XLA's log1p (jax 0.10.2, float64) errs by up to 100 eps from -0.41 to -0.3. There log(1 + R)
    # is as good, for the rounding of 1 + R is no larger than that of R.
    small, nothing = rest > -0.25, rest == -1
    near, far = jnp.where(small, rest, 0), jnp.where(small | nothing, 0, rest)
    logarithm = jnp.where(small, jnp.log1p(near), jnp.log(jnp.abs(1 + far)))
    return jnp.where(nothing, -jnp.inf, logarithm)
