"""logsumexp, plain, with factors of any sign, and of complex numbers."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Inexact, Shaped

from jaxsoft import _axes, _checks, _double_word, _logits, _mesh, _rows, _sharding
from jaxsoft._autodiff import jvp_from_vjp
from jaxsoft._axes import ClassAxis
from jaxsoft._mesh import Mesh
from jaxsoft._sizes import is_empty
from jaxsoft._softmax import probabilities

_FAR = 1e4  # no factor brings terms whose exponents are so far apart to one size


@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis_name: _checks.AxisName = None,
) -> Inexact[Array, "..."]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: Shaped[ArrayLike, "..."] | None = None,
    axis_name: _checks.AxisName = None,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: _checks.Axis,
    b: Shaped[ArrayLike, "..."] | None,
    keepdims: bool,
    return_sign: Literal[True],
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis_name: _checks.AxisName = None,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis_name: _checks.AxisName = None,
) -> Inexact[Array, "..."] | tuple[Inexact[Array, "..."], Inexact[Array, "..."]]: ...
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis_name: _checks.AxisName = None,
) -> Inexact[Array, "..."] | tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    r"""log Σ_j b_j exp(a_j), a drop-in for `jax.nn.logsumexp`.

        out = m + log1p(Σ_{j≠k} exp(a_j - m)),  m = a_k the maximum          ∂out/∂a_j = p_j

    and with factors, from the largest term k = argmax_j (a_j + log|b_j|) on,

        out = (a_k + log|b_k|) + log1p(Σ_{j≠k} t_j),  t_j = b_j exp(a_j) / (b_k exp(a_k))
        ∂out/∂a_j = p_j = b_j exp(a_j) / S             ∂out/∂b_j = exp(a_j) / S

    Args:
        a: exponents, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the sum, a tuple of axes, or None (the default) for all of them.
        b: factors of any sign and size, subnormal numbers included; entries where b is 0 do not
            count. `a`, `b` and `where` are broadcast to one shape.
        keepdims: whether the summed axes stay, with size 1.
        return_sign: whether to return the sign of the sum as well. Without it a negative sum is
            NaN.
        where: boolean mask; entries where it is False do not count.
        axis_name: mesh axes over which the axis of the sum goes on; as in `softmax`. The result is
            alike on their devices.

    Returns:
        The logarithm of the (absolute) sum, of the dtype that JAX promotes `a` and `b` to: 16 bits
        stay 16 bits, rounded once. With `return_sign` also its sign: 1, -1 or 0.

        Where `a` or `b` is complex, log|S| + i arg S, the principal value, with the holomorphic
        derivative; with `return_sign` the real log|S|, and S / |S| or 0.

    Raises:
        TypeError: `a` or `b` is not an array, `where` is not boolean.
        ValueError: `axis` is out of range, `b` or `where` does not broadcast.

    Numerics:
        Within 3 eps of max(|out|, Σ_j |p_j| |a_j + log|b_j||) for factors of one sign. Terms of
        both signs may cancel: within 3 eps of max(|out|, Σ_j |p_j| (1 + |a_j + log|b_j||)), in
        which Σ_j |p_j| is the sum of the sizes of the terms over the size of their sum. The
        contract is for real numbers; the complex sum is shifted by the largest real part of `a`.

        An empty sum, one of -inf alone and one that is 0 are -inf with sign 0 and derivative 0. A
        sum with +inf, or with an infinite factor, is infinite, and its derivative by the infinite
        exponents NaN; infinite terms of both signs are NaN. A derivative by a factor is clipped
        where it comes to the n-th part of the largest number, n being the number of terms.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> print(f"{jaxsoft.logsumexp(jnp.array([0.0, -20.0])):.4g}")
        2.061e-09
        >>> print(f"{jaxsoft.logsumexp(jnp.array([85.2, 0.0]), b=jnp.array([1e-37, 0.0])):.4g}")
        0.004348

    Source: Blanchard, Higham & Higham 2021; Dekker 1971 for the first sum with factors.
    """
    exponents, factors = _checks.promoted("logsumexp", a=a, b=b)
    mask = _checks.booleans("logsumexp", "where", where)
    arrays = _checks.together("logsumexp", a=exponents, b=factors, where=mask)
    axes = _checks.axes("logsumexp", axis, arrays[0].ndim)
    mesh = _checks.mesh("logsumexp", axis_name)
    along = {"axes": axes, "mesh": mesh, "keepdims": bool(keepdims)}
    if jnp.iscomplexobj(exponents):
        out, sign = _of_complex(*arrays, **along, return_sign=bool(return_sign))
    else:
        out, sign = _logsumexp(*arrays, **along)
        if b is not None and not return_sign:
            # The logarithm of a negative sum. Nothing else is NaN here, for `jax_debug_nans`.
            out = jnp.where(sign < 0, jnp.log(sign), out)
    return (out, sign) if return_sign else out


@_sharding.program(static=("axes", "mesh", "keepdims"), places=_sharding.rows)
def _logsumexp(
    a: Array,
    b: Array | None,
    where: Array | None,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
    keepdims: bool,
) -> tuple[Array, Array]:
    axis = ClassAxis(_axes.merged_axis(a.ndim, axes), mesh)
    shape = _reduced(a.shape, axes, keepdims)
    if is_empty(a):
        return jnp.full(shape, -jnp.inf, a.dtype), jnp.zeros(shape, a.dtype)

    args = _mesh.aligned(a, b, where, mesh=mesh)
    x, factors, mask = (_axes.merge_axes(arg, axes) for arg in args)

    config: Any = jax.config  # its flags are attributes of which a type checker knows nothing
    if factors is None and config.jax_debug_nans and config.jax_disable_jit:
        # JAX looks at every operation, and the statistics of a row with +inf, which is infinite,
        # are NaN. The formula with factors has none, but takes longer.
        factors = jnp.ones_like(x)

    def logits() -> _logits.Logits:
        return _logits.prepare(x, axis, mask)

    if factors is None:
        row = _rows.statistics(logits(), axis)
        out = _logits.keep_inputs(lambda: log_normalizer(logits().z, row, axis))
        out = row.top + _mesh.joined(out, mesh)
        out = jnp.where(row.rest == -1, -jnp.inf, out)
        out = jnp.where(row.top == jnp.inf, jnp.inf, out)
        sign = jnp.where(row.top == jnp.inf, 1, jnp.sign(row.normalizer))
    else:

        def terms() -> tuple[Array, Array]:
            z, b = logits().z, factors
            b = _mesh.copied(b, z, mesh).astype(z.dtype)
            # What is masked, infinite or NaN as it may be, does not count.
            b = b if mask is None else jnp.where(mask, b, 0)
            # A term is infinite by its exponent or by its factor. 0 times infinity is NaN.
            return jnp.where(jnp.isinf(b) & (z > -jnp.inf), jnp.inf, z), b

        pivot = _pivot(*lax.stop_gradient(terms()), axis)
        rest = _logits.keep_inputs(lambda: rest_of(*terms(), pivot, axis))
        rest = _mesh.joined(rest, mesh)
        high, low = _double_word.plus_logarithm(pivot.exponent, pivot.factor)
        out = high + (low + _log_abs(rest))
        sign = jnp.sign(pivot.factor.fraction) * jnp.sign(1 + rest)
    sign = lax.stop_gradient(sign.astype(a.dtype))
    return _logits.rounded(out, a.dtype).reshape(shape), sign.reshape(shape)


def _reduced(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[int, ...]:
    if keepdims:
        return tuple(1 if i in axes else size for i, size in enumerate(shape))
    return tuple(size for i, size in enumerate(shape) if i not in axes)


# ȳ ↦ z̄ = ȳ p, from the statistics of these very logits.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_normalizer(z: Array, row: _rows.Row, axis: ClassAxis) -> Array:
    return _mesh.copied(row.log_normalizer, z, axis.mesh)


log_normalizer = jvp_from_vjp(_log_normalizer)


def _log_normalizer_fwd(z: Array, row: _rows.Row, axis: ClassAxis) -> tuple[Array, Any]:
    return log_normalizer(z, row, axis), (z, row)


def _log_normalizer_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    z, row = residuals
    p, _ = probabilities(z, None, row.top, row.normalizer, axis, z.dtype)
    return axis.expand(cotangent) * p, None


_log_normalizer.defvjp(_log_normalizer_fwd, _log_normalizer_bwd)


# With factors. Neither b_j nor exp(a_j) nor the quotient of two of them need be of a size that the
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
    factor: _double_word.Parts
    place: Array
    missing: Array


def _pivot(z: Array, b: Array, axis: ClassAxis) -> _Pivot:
    at, mesh, n, info = axis.position, axis.mesh, z.shape[axis.position], jnp.finfo(z.dtype)
    parts = _double_word.parts(b)
    z = jnp.where(parts.fraction == 0, -jnp.inf, z)
    # From the largest exponent on, for a_j + log|b_j| would round the logarithm off.
    top = jnp.minimum(_mesh.largest(_logits.maximum(z, at), mesh), float(info.max))
    # log|f| is |f| - 1 to within 0.07.
    logarithm = parts.exponent * _double_word.log_of_two(z.dtype)[0] + (jnp.abs(parts.fraction) - 1)
    size = (z - axis.expand(top)) + logarithm
    highest = axis.expand(_mesh.largest(_logits.maximum(size, at), mesh))
    first = lax.axis_index(mesh.names).astype(jnp.int32) * n if mesh else 0
    number = lax.broadcasted_iota(jnp.int32, z.shape, at) + first
    number = jnp.where((size == highest) & (highest < jnp.inf), number, axis.count(z))
    number = -_mesh.largest(-jnp.min(number, at), mesh)
    found = number < axis.count(z)
    some = axis.places(jnp.where(found, number, 0), z)

    def of_pivot(x: Array, otherwise: ArrayLike) -> Array:
        return jnp.where(found, axis.take(x, some), otherwise)

    factor = _double_word.Parts(
        of_pivot(parts.fraction, 1), of_pivot(parts.exponent, float(info.maxexp))
    )
    missing = jnp.where(found, 0, jnp.ones_like(top))
    return _Pivot(of_pivot(z, top), factor, axis.places(number, z), missing)


def _terms_of(z: Array, b: Array | None, pivot: _Pivot, axis: ClassAxis) -> Array:
    """t_j, or exp(a_j) over the pivot without b."""
    fraction, exponent = (1, 0) if b is None else _double_word.parts(b)
    z = z if b is None else jnp.where(fraction == 0, -jnp.inf, z)
    high, middle, low = _double_word.log_of_two(z.dtype)
    start, (of_pivot, power) = axis.expand(pivot.exponent), map(axis.expand, pivot.factor)
    gap, powers = z - start, exponent - power
    # Neither infinities nor numbers beyond the largest come into the error of the difference.
    _, error = _double_word.sum_of(jnp.where(jnp.abs(gap) < _FAR, z, start), -start)
    s, rounded = _double_word.sum_of(jnp.clip(gap, -_FAR, _FAR), powers * high)
    return (fraction / of_pivot) * jnp.exp(s) * (1 + (rounded + error + powers * (middle + low)))


# dt_j = t_j dz_j + u_j db_j, where u_j = exp(z_j) over the pivot, of which du_j = u_j dz_j.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _terms(z: Array, b: Array | None, pivot: _Pivot, axis: ClassAxis) -> Array:
    return _terms_of(z, b, pivot, axis)


terms = jvp_from_vjp(_terms)


def _terms_fwd(
    z: Array, b: Array | None, pivot: _Pivot, axis: ClassAxis
) -> tuple[Array, tuple[Array, Array | None, _Pivot]]:
    return terms(z, b, pivot, axis), (z, b, pivot)


def _terms_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    z, b, pivot = residuals
    z_bar = cotangent * terms(z, b, pivot, axis)
    if b is None:
        return z_bar, None, None
    # One that overflows is finite, so that a cotangent of 0 stays 0.
    largest = float(jnp.finfo(z.dtype).max)
    return z_bar, cotangent * jnp.clip(terms(z, None, pivot, axis), -largest, largest), None


_terms.defvjp(_terms_fwd, _terms_bwd)


# R = S / (b_k exp(a_k)) - 1 with the pivot for a constant, so that dR = Σ dt_j over all j.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rest(z: Array, b: Array, pivot: _Pivot, axis: ClassAxis) -> Array:
    others = jnp.where(axis.one_hot(pivot.place, z), 0, _terms_of(z, b, pivot, axis))
    return _mesh.copied(axis.sum(others) - pivot.missing, z, axis.mesh)


rest_of = jvp_from_vjp(_rest)


def _rest_fwd(
    z: Array, b: Array, pivot: _Pivot, axis: ClassAxis
) -> tuple[Array, tuple[Array, Array, _Pivot]]:
    return rest_of(z, b, pivot, axis), (z, b, pivot)


def _rest_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    return _terms_bwd(axis, residuals, axis.expand(cotangent))


_rest.defvjp(_rest_fwd, _rest_bwd)


def _log_abs(rest: Array) -> Array:
    """log|1 + R|; -inf with derivative 0 where the sum is 0."""
    # XLA's log1p in float64 errs by up to 100 eps from -0.41 to -0.3 (0.10.2 on the CPU). So far
    # from 0 the rounding of 1 + R is no more than that of R.
    small, nothing = rest > -0.25, rest == -1
    near, far = jnp.where(small, rest, 0), jnp.where(small | nothing, 0, rest)
    logarithm = jnp.where(small, jnp.log1p(near), jnp.log(jnp.abs(1 + far)))
    return jnp.where(nothing, -jnp.inf, logarithm)


@_sharding.program(static=("axes", "mesh", "keepdims", "return_sign"), places=_sharding.rows)
def _of_complex(
    a: Array,
    b: Array | None,
    where: Array | None,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
    keepdims: bool,
    return_sign: bool,
) -> tuple[Array, Array]:
    """log|S| and S / |S|; log|S| + i arg S in place of the former without `return_sign`."""
    axis = ClassAxis(_axes.merged_axis(a.ndim, axes), mesh)
    shape = _reduced(a.shape, axes, keepdims)
    if is_empty(a):
        nothing = jnp.full(shape, -jnp.inf, a.dtype)
        return nothing.real if return_sign else nothing, jnp.zeros(shape, a.dtype)

    args = _mesh.aligned(a, b, where, mesh=mesh)
    x, factors, mask = (_axes.merge_axes(arg, axes) for arg in args)
    if mask is not None:
        x = jnp.where(mask, x, -jnp.inf)
        factors = None if factors is None else jnp.where(mask, factors, 0)
    if factors is not None:
        factors = _mesh.copied(factors, x, mesh)
        x = jnp.where(factors == 0, -jnp.inf, x)
    top = _mesh.largest(jnp.max(lax.stop_gradient(x.real), axis.position), mesh)
    top = jnp.where(jnp.isfinite(top), top, 0)

    def parts() -> tuple[Array, Array]:
        terms = _exp(x.real - axis.expand(top), x.imag)
        terms = terms if factors is None else terms * factors
        return part_sum(terms.real, axis), part_sum(terms.imag, axis)

    real, imag = (_mesh.joined(part, mesh) for part in _logits.keep_inputs(parts))
    infinite = jnp.isinf(real) | jnp.isinf(imag)
    real, imag = (jnp.where(infinite, _direction(part), part) for part in (real, imag))
    nothing = (real == 0) & (imag == 0)
    total = lax.complex(jnp.where(nothing, 1, real), imag)
    logarithm = jnp.log(total)
    size = jnp.where(nothing, -jnp.inf, jnp.where(infinite, jnp.inf, logarithm.real + top))
    out = size if return_sign else lax.complex(size, logarithm.imag)
    modulus = jnp.abs(total)
    sign = jnp.where(nothing, 0, lax.complex(total.real / modulus, total.imag / modulus))
    return out.reshape(shape), sign.reshape(shape)


def _exp(real: Array, imag: Array) -> Array:
    """exp(x + i y) as in C99: 0 for x = -inf whatever y is, and real for y = 0 whatever x is."""
    imag = jnp.where((real == -jnp.inf) & ~jnp.isfinite(imag), 0, imag)
    size, sine = jnp.exp(real), jnp.sin(imag)
    height = jnp.where((size == jnp.inf) & (sine == 0), 1, size)
    return lax.complex(size * jnp.cos(imag), height * sine)


def _direction(part: Array) -> Array:
    """One part of a complex number that is infinite, of a finite one in the same direction."""
    infinite = jnp.isinf(part)
    return jnp.where(infinite, jnp.sign(part), 0 * jnp.where(infinite, 0, part))


# A sum over all devices, with the derivative by the part of one.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _part_sum(terms: Array, axis: ClassAxis) -> Array:
    return _mesh.copied(axis.sum(terms), terms, axis.mesh)


part_sum = jvp_from_vjp(_part_sum)


def _part_sum_fwd(terms: Array, axis: ClassAxis) -> tuple[Array, Array]:
    return part_sum(terms, axis), terms


def _part_sum_bwd(axis: ClassAxis, terms: Array, cotangent: Array) -> tuple[Array]:
    return (jnp.broadcast_to(axis.expand(cotangent), terms.shape),)


_part_sum.defvjp(_part_sum_fwd, _part_sum_bwd)
