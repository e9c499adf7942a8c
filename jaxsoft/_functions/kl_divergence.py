"""kl_divergence and its rule."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
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

_SERIES_TERMS = {4: 8, 8: 14}  # of exp(d) - 1 - d for |d| < 1/2, in float32 and float64


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
    # `prepare` widens 16-bit logits; until then they take half the memory, and are read faster.
    x, y = (a if compute_dtype(a.dtype) == dtype else a.astype(dtype) for a in (first, second))
    return _kl_divergence(x, y, where, scale, axes=axes, mesh=mesh)


@rowwise(places=programs.rows, empty=lambda x, rows: jnp.zeros(rows, compute_dtype(x.dtype)))
def _kl_divergence(
    x: Array, y: Array, where: Array | None, temperature: Array | None, axis: ClassAxis
) -> Array:
    y = devices.copied(y, x, axis.mesh)

    def logits(given: Array) -> Logits:
        return prepare(given, axis, where, temperature)

    x_row, y_row = (statistics.statistics(logits(given), axis) for given in (x, y))
    loss = keep_inputs(lambda: divergence(logits(x).z, logits(y).z, x_row, y_row, axis))
    return devices.joined(loss, axis.mesh)


# z̄ = loss-bar · J_p (-d), for J_p is blind to a constant, and w̄ = loss-bar · (q - p), of which the
# derivative is that of probabilities and the value that of the corrected differences below.
def _divergence(z: Array, w: Array, z_row: Row, w_row: Row, axis: ClassAxis) -> Array:
    sums = _sums(z, w, z_row, w_row, axis)
    # P is 1 but for its rounding, and its derivative is in the rule below.
    return divergence_of(sums._replace(total=jnp.ones_like(sums.total)), z_row, w_row)


def _divergence_pullback(
    z: Array, w: Array, z_row: Row, w_row: Row, axis: ClassAxis, cotangent: Array
) -> Any:
    of_z = probabilities(z, None, z_row.normalizer, axis, z.dtype)
    p, q = of_z.classes, probabilities(w, None, w_row.normalizer, axis, w.dtype).classes
    quarter = _quarter_ratio(z, w, p, z_row, w_row, axis)
    slope = jacobian_product(of_z, Vector(quarter, None), axis).classes
    _, difference = _terms_and_difference(p, q, quarter)
    excess = jnp.where(w_row.rest == -1, 0, axis.sum(difference))
    difference -= q * axis.expand(excess / (1 + excess))
    cotangent = axis.expand(jnp.where(z_row.rest == -1, 0, cotangent))
    return -4 * cotangent * slope, cotangent * valued(q - p, difference), None, None


divergence = analytic(_divergence, _divergence_pullback, static=(4,))


# With normalizers that are held fixed, p_j = exp(z_j - m) / Z and q_j are functions of one logit
# each, P = Σ p_j and Q = Σ q_j are 1 but for their derivatives, and with d = log q - log p
#
#     KL = Σ (p_j / P) (log (p_j / P) - log (q_j / Q)) = Φ / P - (exp(t) - 1 - t),
#     Φ = Σ p_j (exp(d_j) - 1 - d_j),    t = log(Q / P) = log(1 + E / P),    E = Σ (q_j - p_j).
#
# E is 0 but for the rounding of the normalizers, the same in every d_j. In the value its square
# matters, and in the derivatives E itself: they correct d by it, to the rounding of w - z.
class Sums(NamedTuple):
    """What the divergence needs of a row: sums over the classes, given the normalizers.

    Attributes:
        terms: Φ.
        total: P.
        excess: E.
    """

    terms: Float[Array, "..."]
    total: Float[Array, "..."]
    excess: Float[Array, "..."]


def _sums(z: Array, w: Array, z_row: Row, w_row: Row, axis: ClassAxis) -> Sums:
    p, q, quarter = _of_classes(z, w, z_row, w_row, axis)
    terms, difference = _terms_and_difference(p, q, quarter)
    out = Sums(axis.sum(terms), axis.sum(p), axis.sum(difference))
    return devices.copied(out, z, axis.mesh)


# ∂Φ/∂z = -p d, ∂Φ/∂w = q - p, ∂p/∂z = p, ∂q/∂w = q. Ratios are taken in quarters, which do not
# overflow.
def _sums_pullback(z: Array, w: Array, z_row: Row, w_row: Row, axis: ClassAxis, bars: Sums) -> Any:
    p, q, quarter = _of_classes(z, w, z_row, w_row, axis)
    _, difference = _terms_and_difference(p, q, quarter)
    terms, total, excess = (axis.expand(bar) for bar in bars)
    z_bar = p * (total - excess) - 4 * (terms * (p * quarter))
    z_bar = jnp.where(p == 0, 0, z_bar)  # also where the divergence is infinite
    return z_bar, terms * valued(q - p, difference) + excess * q, None, None


sums = analytic(_sums, _sums_pullback, static=(4,))


def divergence_of(sums: Sums, z_row: Row, w_row: Row) -> Float[Array, "..."]:
    """The divergence of each row; 0 with derivative 0 of one without any p."""
    absent = z_row.rest == -1
    total = jnp.where(absent, 1, sums.total)
    excess = jnp.where(w_row.rest == -1, 0, sums.excess) / total
    out = sums.terms / total - _above_line(jnp.log1p(excess))
    return jnp.where(absent, 0, out)


def _of_classes(
    z: Array, w: Array, z_row: Row, w_row: Row, axis: ClassAxis
) -> tuple[Array, Array, Array]:
    """p, q and (log q - log p) / 4."""
    p = statistics.probabilities(z, None, z_row.normalizer, axis, z.dtype).classes
    q = statistics.probabilities(w, None, w_row.normalizer, axis, w.dtype).classes
    return p, q, _quarter_ratio(z, w, p, z_row, w_row, axis)


def _quarter_ratio(z: Array, w: Array, p: Array, z_row: Row, w_row: Row, axis: ClassAxis) -> Array:
    """(log q - log p) / 4, exact to the rounding of w - z up to one constant; 0 where p = 0."""
    z, w = (jnp.where(p == 0, 0, logits / 4) for logits in (z, w))
    tops = w_row.top / 4 - z_row.top / 4
    logarithms = (w_row.log_normalizer - z_row.log_normalizer) / 4
    return jnp.where(p == 0, 0, ((w - z) - axis.expand(tops)) - axis.expand(logarithms))


# Where p and q are within a factor of 1.6 of each other, both come from a series. Elsewhere q - p
# is the larger one times a number that is not small, so that it has the rounding of one of them. Of
# a class with p = 0 both are q: it belongs to sums over all classes, in which q and p add up to 1.
def _terms_and_difference(p: Array, q: Array, quarter: Array) -> tuple[Array, Array]:
    """p (exp(d) - 1 - d), which is not negative, and q - p, for d / 4 = (log q - log p) / 4."""
    near = jnp.abs(quarter) < 0.125
    d = jnp.where(near, 4 * quarter, 0)
    above = _series(d)
    smaller = jnp.exp(-4 * jnp.abs(quarter))  # over the larger one
    far = jnp.where(quarter < 0, p * (smaller - 1), q * (1 - smaller))
    difference = jnp.where(p == 0, q, jnp.where(near, p * (d + above), far))
    terms = jnp.where(near & (p != 0), p * above, difference - 4 * (p * quarter))
    return terms, difference


def _series(d: Array) -> Array:
    """exp(d) - 1 - d for |d| < 1/2."""
    series = jnp.zeros_like(d)
    for k in range(_SERIES_TERMS[d.dtype.itemsize] + 1, 1, -1):
        series = series * d + 1 / math.factorial(k)
    return d * d * series


@jax.custom_jvp
def _above_line(t: Array) -> Array:
    """exp(t) - 1 - t."""
    near = jnp.abs(t) < 0.5
    return jnp.where(near, _series(jnp.where(near, t, 0)), jnp.expm1(t) - t)


@_above_line.defjvp
def _above_line_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (t,), (t_dot,) = primals, tangents
    return _above_line(t), jnp.expm1(t) * t_dot
