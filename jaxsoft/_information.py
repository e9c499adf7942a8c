"""entropy and kl_divergence, each with its rule."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft import _axes, _checks, _logits, _mesh, _rows, _sharding
from jaxsoft._autodiff import jvp_from_vjp
from jaxsoft._axes import ClassAxis
from jaxsoft._mesh import Mesh
from jaxsoft._sizes import is_empty
from jaxsoft._softmax import jacobian_product, probabilities, undominated


def entropy(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    axis_name: _checks.AxisName = None,
) -> Float[Array, "..."]:
    r"""The entropy of softmax(x), in nats, from the logits.

        H = -Σ_j p_j log p_j = log1p(Σ_{j≠k} exp(z_j - m)) + Σ_j p_j (m - z_j),  z = x / T
        ∂H/∂x = -J (z - m) / T

    Both terms of H are non-negative: nothing cancels, and the entropy of a confident row keeps
    its last bits.

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcastable to `x`; classes where it is False do not count.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        axis_name: mesh axes over which the axis of the classes goes on; as in `softmax`. The result
            is alike on their devices.

    Returns:
        The entropy in nats, with the shape of `x` without the axis, in float32 or wider: a
        statistic of 16-bit logits needs more digits than they have.

    Raises:
        TypeError, ValueError: as `softmax`.

    Numerics:
        A row that is masked or -inf throughout has entropy 0 and derivative 0. A class of
        probability 0 contributes 0, however far below the maximum it lies.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> print(f"{jaxsoft.entropy(jnp.array([40.0, 0.0])):.4g}")
        1.742e-16
    """
    (*args, _), along = _checks.rows("entropy", x, axis, where, temperature, None, axis_name)
    return _entropy(*args, **along)


@_sharding.program(static=("axes", "mesh"), places=_sharding.rows)
def _entropy(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
) -> Array:
    shape = tuple(size for a, size in enumerate(x.shape) if a not in axes)
    axis = ClassAxis(_axes.merged_axis(x.ndim, axes), mesh)
    if is_empty(x):
        return jnp.zeros(shape, _logits.compute_dtype(x.dtype))

    args = _mesh.aligned(x, where, temperature, mesh=mesh)
    merged, *options = (_axes.merge_axes(arg, axes) for arg in args)

    def logits() -> _logits.Logits:
        return _logits.prepare(merged, axis, *options)

    row = _rows.statistics(logits(), axis)
    entropies = _logits.keep_inputs(lambda: row_entropy(logits().z, row, axis))
    return _mesh.joined(entropies, mesh).reshape(shape)


# ∇H = -J log p = -J (z - m), for J is blind to a constant; in a confident row z_k - m = 0 and the
# entry of class k is p_k Σ_j p_j (m - z_j), without a cancellation.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _row_entropy(z: Array, row: _rows.Row, axis: ClassAxis) -> Array:
    p = _rows.probabilities(z, row.top, row.normalizer, axis)
    spread = axis.sum(p * _gaps(z, p, row, axis))
    return _mesh.copied(row.log_normalizer + spread, z, axis.mesh)


row_entropy = jvp_from_vjp(_row_entropy)


def _row_entropy_fwd(z: Array, row: _rows.Row, axis: ClassAxis) -> tuple[Array, Any]:
    return row_entropy(z, row, axis), (z, row)


def _row_entropy_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    z, row = residuals
    p, _ = probabilities(z, None, row.top, row.normalizer, axis, z.dtype)
    slope, _ = jacobian_product(p, _gaps(z, p, row, axis), axis, undominated(row.largest))
    return axis.expand(cotangent) * slope, None


_row_entropy.defvjp(_row_entropy_fwd, _row_entropy_bwd)


def _gaps(z: Array, p: Array, row: _rows.Row, axis: ClassAxis) -> Array:
    """m - z, the distance to the maximum; 0 for a class of probability 0, which has no weight."""
    top = axis.expand(row.top)
    return top - jnp.where(p == 0, top, z)


def kl_divergence(
    x: Shaped[ArrayLike, "..."],
    y: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    axis_name: _checks.AxisName = None,
) -> Float[Array, "..."]:
    r"""The Kullback-Leibler divergence of softmax(x / T) from softmax(y / T), from the logits.

        KL = Σ_j p_j (log p_j - log q_j) = Σ_j p_j (exp(d_j) - 1 - d_j),  d = log q - log p
        ∂KL/∂x = J_p (x - y) / T²          ∂KL/∂y = (q - p) / T

    No term of the second sum is negative: of two distributions that nearly agree the divergence
    keeps its leading digits, where the first sum leaves rounding errors of either sign. Of a class
    with p_j = 0 the term is q_j: it is part of the second sum, though not of the first.

    Args:
        x: logits of p, shape [..., n, ...].
        y: logits of q; the shapes of `x` and `y` are broadcast.
        axis: the axis of the classes of the broadcast shape, a tuple of axes, or None for all.
        where: boolean mask, broadcastable to the logits; classes where it is False do not count.
        temperature: T > 0 of both, a number or one value per row; as in `softmax`. The divergence
            is not multiplied by T².
        axis_name: mesh axes over which the axis of the classes goes on; as in `softmax`. The result
            is alike on their devices.

    Returns:
        The divergence in nats, with the shape of the logits without the axis, in float32 or wider.

    Raises:
        TypeError: `x` or `y` is complex or not an array, `where` is not boolean.
        ValueError: the shapes of `x` and `y` do not broadcast; as `softmax`.

    Numerics:
        Classes with q_j = 0 < p_j give infinity, with derivative NaN; classes with p_j = 0 count as
        q_j. A row in which p is masked or -inf throughout has divergence 0 and derivative 0.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> kl = jaxsoft.kl_divergence(jnp.array([0.0, 0.0]), jnp.array([0.0, 1e-4]))
        >>> print(f"{kl:.4g}")
        1.25e-09
    """
    name = "kl_divergence"
    both = {"x": _checks.floating(name, "x", x), "y": _checks.floating(name, "y", y)}
    arrays = _checks.together(name, **both, where=_checks.booleans(name, "where", where))
    axes = _checks.axes(name, axis, arrays[0].ndim)
    scale = _checks.temperature(name, temperature, arrays[0].shape, axes)
    mesh = _checks.mesh(name, axis_name, temperature=scale)
    return _kl_divergence(*arrays, scale, axes=axes, mesh=mesh)


@_sharding.program(static=("axes", "mesh"), places=_sharding.rows)
def _kl_divergence(
    x: Array,
    y: Array,
    where: Array | None,
    temperature: Array | None,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
) -> Array:
    shape = tuple(size for a, size in enumerate(x.shape) if a not in axes)
    axis = ClassAxis(_axes.merged_axis(x.ndim, axes), mesh)
    dtype = _logits.compute_dtype(jnp.result_type(x, y))
    if is_empty(x):
        return jnp.zeros(shape, dtype)

    x, y, where, temperature = _mesh.aligned(x, y, where, temperature, mesh=mesh)
    y = _mesh.copied(y, x, mesh)
    mask, scale = _axes.merge_axes(where, axes), _axes.merge_axes(temperature, axes)

    def logits(given: Array) -> _logits.Logits:
        return _logits.prepare(_axes.merge_axes(given.astype(dtype), axes), axis, mask, scale)

    rows = [_rows.statistics(logits(given), axis) for given in (x, y)]
    loss = _logits.keep_inputs(lambda: divergence(logits(x).z, logits(y).z, *rows, axis))
    return _mesh.joined(loss, mesh).reshape(shape)


# z̄ = loss-bar · J_p (-d), for J_p is blind to a constant, and w̄ = loss-bar · (q - p). A row without
# any p has no divergence. Ratios are taken in quarters, which do not overflow.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _divergence(z: Array, w: Array, z_row: _rows.Row, w_row: _rows.Row, axis: ClassAxis) -> Array:
    p = _rows.probabilities(z, z_row.top, z_row.normalizer, axis)
    q = _rows.probabilities(w, w_row.top, w_row.normalizer, axis)
    terms = _rows.divergence_terms(p, q, _quarter_ratio(z, w, p, z_row, w_row, axis))
    out = _mesh.copied(axis.sum(terms), z, axis.mesh)
    return jnp.where(z_row.rest == -1, 0, out)


divergence = jvp_from_vjp(_divergence)


def _divergence_fwd(
    z: Array, w: Array, z_row: _rows.Row, w_row: _rows.Row, axis: ClassAxis
) -> tuple[Array, Any]:
    return divergence(z, w, z_row, w_row, axis), (z, w, z_row, w_row)


def _divergence_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    z, w, z_row, w_row = residuals
    p, _ = probabilities(z, None, z_row.top, z_row.normalizer, axis, z.dtype)
    q, _ = probabilities(w, None, w_row.top, w_row.normalizer, axis, w.dtype)
    quarter = _quarter_ratio(z, w, p, z_row, w_row, axis)
    slope, _ = jacobian_product(p, quarter, axis, undominated(z_row.largest))
    plain = q - p
    exact = _rows.difference(p, q, lax.stop_gradient(4 * quarter))
    w_bar = plain + lax.stop_gradient(exact - plain)
    cotangent = axis.expand(jnp.where(z_row.rest == -1, 0, cotangent))
    return -4 * cotangent * slope, cotangent * w_bar, None, None


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


def _quarter_ratio(
    z: Array, w: Array, p: Array, z_row: _rows.Row, w_row: _rows.Row, axis: ClassAxis
) -> Array:
    """(log q - log p) / 4, exact to the rounding of w - z up to one constant; 0 where p = 0."""
    z, w = (jnp.where(p == 0, 0, logits / 4) for logits in (z, w))
    tops = w_row.top / 4 - z_row.top / 4
    logarithms = (w_row.log_normalizer - z_row.log_normalizer) / 4
    return jnp.where(p == 0, 0, ((w - z) - axis.expand(tops)) - axis.expand(logarithms))
