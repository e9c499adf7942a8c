"""kl_divergence and its rule."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import devices, options, programs, validation
from jaxsoft._core.autodiff import analytic, valued
from jaxsoft._core.axes import ClassAxis
from jaxsoft._functions.softmax import probabilities
from jaxsoft._rows import statistics
from jaxsoft._rows.jacobian_product import Vector, jacobian_product
from jaxsoft._rows.logits import Logits, compute_dtype, keep_inputs, prepare
from jaxsoft._rows.rowwise import rowwise
from jaxsoft._rows.statistics import Row

_SERIES_TERMS = 14  # of exp(d) - 1 - d for |d| < 1/2 in float64


def kl_divergence(
    x: Shaped[ArrayLike, "..."],
    y: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    axis_name: validation.AxisName = None,
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
    both = {"x": validation.floating(name, "x", x), "y": validation.floating(name, "y", y)}
    where = validation.booleans(name, "where", where)
    first, second, where = validation.together(name, **both, where=where)
    axes = validation.axes(name, axis, first.ndim)
    scale = options.temperature(name, temperature, first.shape, axes)
    mesh = validation.mesh(name, axis_name, temperature=scale)
    dtype = compute_dtype(jnp.result_type(first, second))
    x, y = first.astype(dtype), second.astype(dtype)
    return _kl_divergence(x, y, where, scale, axes=axes, mesh=mesh)


@rowwise(places=programs.rows, empty=lambda x, rows: jnp.zeros(rows, x.dtype))
def _kl_divergence(
    x: Array, y: Array, where: Array | None, temperature: Array | None, axis: ClassAxis
) -> Array:
    y = devices.copied(y, x, axis.mesh)

    def logits(given: Array) -> Logits:
        return prepare(given, axis, where, temperature)

    x_row, y_row = (statistics.statistics(logits(given), axis) for given in (x, y))
    loss = keep_inputs(lambda: divergence(logits(x).z, logits(y).z, x_row, y_row, axis))
    return devices.joined(loss, axis.mesh)


# z̄ = loss-bar · J_p (-d), for J_p is blind to a constant, and w̄ = loss-bar · (q - p). A row without
# any p has no divergence. Ratios are taken in quarters, which do not overflow.
def _divergence(z: Array, w: Array, z_row: Row, w_row: Row, axis: ClassAxis) -> Array:
    p = statistics.probabilities(z, None, z_row.normalizer, axis, z.dtype).classes
    q = statistics.probabilities(w, None, w_row.normalizer, axis, w.dtype).classes
    terms = _terms(p, q, _quarter_ratio(z, w, p, z_row, w_row, axis))
    out = devices.copied(axis.sum(terms), z, axis.mesh)
    return jnp.where(z_row.rest == -1, 0, out)


def _divergence_pullback(
    z: Array, w: Array, z_row: Row, w_row: Row, axis: ClassAxis, cotangent: Array
) -> Any:
    of_z = probabilities(z, None, z_row.normalizer, axis, z.dtype)
    p, q = of_z.classes, probabilities(w, None, w_row.normalizer, axis, w.dtype).classes
    quarter = _quarter_ratio(z, w, p, z_row, w_row, axis)
    slope = jacobian_product(of_z, Vector(quarter, None), axis).classes
    difference = _difference(p, q, 4 * quarter)
    # The differences sum to 0: that of a class above 1/2 is minus the sum of the others.
    top = p > 0.5
    others = axis.expand(axis.sum(jnp.where(top, 0, difference)))
    w_bar = valued(q - p, jnp.where(top, -others, difference))
    cotangent = axis.expand(jnp.where(z_row.rest == -1, 0, cotangent))
    return -4 * cotangent * slope, cotangent * w_bar, None, None


divergence = analytic(_divergence, _divergence_pullback, static=(4,))


def _quarter_ratio(z: Array, w: Array, p: Array, z_row: Row, w_row: Row, axis: ClassAxis) -> Array:
    """(log q - log p) / 4, exact to the rounding of w - z up to one constant; 0 where p = 0."""
    z, w = (jnp.where(p == 0, 0, logits / 4) for logits in (z, w))
    tops = w_row.top / 4 - z_row.top / 4
    logarithms = (w_row.log_normalizer - z_row.log_normalizer) / 4
    return jnp.where(p == 0, 0, ((w - z) - axis.expand(tops)) - axis.expand(logarithms))


# Of a class with p = 0 the term is q: it belongs to a sum over all classes, in which q and p both
# add up to 1.
def _terms(p: Array, q: Array, quarter: Array) -> Array:
    """p (exp(d) - 1 - d) for d / 4 = (log q - log p) / 4: none is negative, and none cancels."""
    near = (jnp.abs(quarter) < 0.125) & (p != 0)
    d = jnp.where(near, 4 * quarter, 0)
    series = jnp.zeros_like(d)
    for k in range(_SERIES_TERMS + 1, 1, -1):
        series = series * d + 1 / math.factorial(k)
    far = (q - p) - 4 * (p * quarter)
    return jnp.where(near, p * (d * d * series), far)


def _difference(p: Array, q: Array, log_ratio: Array) -> Array:
    """q - p from the logarithm of their ratio, to its last bits where both round to 1."""
    d = -jnp.abs(log_ratio)
    exact = jnp.where(log_ratio < 0, p * jnp.expm1(d), -q * jnp.expm1(d))
    return jnp.where(p == 0, q, exact)
