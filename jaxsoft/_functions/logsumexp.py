"""logsumexp and its rule."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Inexact, Shaped

from jaxsoft._core import devices, programs, validation
from jaxsoft._core.autodiff import analytic
from jaxsoft._core.axes import ClassAxis
from jaxsoft._functions import complex_sum, weighted_sum
from jaxsoft._functions.softmax import probabilities
from jaxsoft._rows.logits import prepare, rounded
from jaxsoft._rows.rowwise import from_statistics, rowwise
from jaxsoft._rows.statistics import Row


@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: validation.Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis_name: validation.AxisName = None,
) -> Inexact[Array, "..."]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: validation.Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: Shaped[ArrayLike, "..."] | None = None,
    axis_name: validation.AxisName = None,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: validation.Axis,
    b: Shaped[ArrayLike, "..."] | None,
    keepdims: bool,
    return_sign: Literal[True],
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis_name: validation.AxisName = None,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: validation.Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis_name: validation.AxisName = None,
) -> Inexact[Array, "..."] | tuple[Inexact[Array, "..."], Inexact[Array, "..."]]: ...
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: validation.Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis_name: validation.AxisName = None,
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
    exponents, factors = validation.promoted("logsumexp", a=a, b=b)
    mask = validation.booleans("logsumexp", "where", where)
    arrays = validation.together("logsumexp", a=exponents, b=factors, where=mask)
    axes = validation.axes("logsumexp", axis, arrays[0].ndim)
    mesh = validation.mesh("logsumexp", axis_name)
    along = {"axes": axes, "mesh": mesh, "keepdims": bool(keepdims)}
    if jnp.iscomplexobj(exponents):
        out, sign = complex_sum.log_and_sign(*arrays, **along, return_sign=bool(return_sign))
    else:
        out, sign = _logsumexp(*arrays, **along)
        if b is not None and not return_sign:
            # The logarithm of a negative sum. Nothing else is NaN here, for `jax_debug_nans`.
            out = jnp.where(sign < 0, jnp.log(sign), out)
    return (out, sign) if return_sign else out


def _nothing(a: Array, rows: tuple[int, ...], **_: Any) -> tuple[Array, Array]:
    return jnp.full(rows, -jnp.inf, a.dtype), jnp.zeros(rows, a.dtype)


@rowwise(places=programs.rows, empty=_nothing, static=("keepdims",))
def _logsumexp(
    a: Array, b: Array | None, where: Array | None, axis: ClassAxis
) -> tuple[Array, Array]:
    config: Any = jax.config  # its flags are attributes of which a type checker knows nothing
    if b is None and config.jax_debug_nans and config.jax_disable_jit:
        # JAX looks at every operation, and the statistics of a row with +inf, which is infinite,
        # are NaN. The formula with factors has none, but takes longer.
        b = jnp.ones_like(a)
    logits = functools.partial(prepare, a, axis, where)
    if b is not None:
        out, sign = weighted_sum.log_and_sign(logits, b, where, axis)
    else:
        rule = lambda logits, row: log_normalizer(logits.z, row, axis)
        row, out = from_statistics(rule, logits, axis)
        out = row.top + devices.joined(out, axis.mesh)
        out = jnp.where(row.rest == -1, -jnp.inf, out)
        out = jnp.where(row.top == jnp.inf, jnp.inf, out)
        sign = jnp.where(row.top == jnp.inf, 1, jnp.sign(1 + row.rest))
    return rounded(out, a.dtype), jax.lax.stop_gradient(sign.astype(a.dtype))


# ȳ ↦ z̄ = ȳ p, from the statistics of these very logits.
def _log_normalizer(z: Array, row: Row, axis: ClassAxis) -> Array:
    return devices.copied(row.log_normalizer, z, axis.mesh)


def _log_normalizer_pullback(z: Array, row: Row, axis: ClassAxis, cotangent: Array) -> Any:
    p = probabilities(z, None, row.normalizer, axis, z.dtype).classes
    return axis.expand(cotangent) * p, None


log_normalizer = analytic(_log_normalizer, _log_normalizer_pullback, static=(2,))
