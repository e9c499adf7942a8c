"""entmax_loss, the loss whose gradient is entmax less the label, and its rules."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import class_ids, options, powers, programs, validation
from jaxsoft._core.autodiff import analytic, valued
from jaxsoft._core.axes import ClassAxis
from jaxsoft._functions import entmax, examples
from jaxsoft._functions.examples import Silenced
from jaxsoft._functions.token_loss import Reduction
from jaxsoft._rows import orders, thresholds
from jaxsoft._rows.logits import keep_inputs, nan_unless, prepare
from jaxsoft._rows.orders import Order
from jaxsoft._rows.rowwise import rowwise
from jaxsoft._rows.thresholds import Threshold

_NODES = {4: 6, 8: 11}  # of Gauss and Legendre, for numbers of so many bytes


def entmax_loss(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    alpha: Shaped[ArrayLike, "..."] = 1.5,
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    weights: Shaped[ArrayLike, "..."] | None = None,
    ignore_index: int | None = None,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    reduction: Reduction = "none",
) -> Float[Array, "..."]:
    r"""The loss for which entmax is what softmax is for cross-entropy.

        loss = max_p (⟨p, z⟩ - Ω(p)) + Ω(y) - ⟨y, z⟩,    Ω(p) = (Σ_i p_i^α - 1) / (α (α - 1))
        ∂loss/∂z = p - y,    p = entmax(z),    z = logits / T
        ∂²loss/∂z² = diag(s) - s sᵀ / Σs,    s_i = p_i^(2 - α) where p_i > 0, else 0

    For alpha = 1 and class ids it is `cross_entropy`. For alpha > 1 it has a margin: it is exactly
    0, with gradient 0, where the logit of the label is ahead of all others by 1 / (alpha - 1).

    Args:
        logits: shape [..., n, ...]. Integers and booleans become the default float.
        labels: class ids, an integer array of the shape of `logits` without the axis; or target
            probabilities y, a floating array broadcastable to `logits`, whose rows should sum to 1.
            For these the loss is 0 where entmax(z) = y (for alpha = 1 it is the divergence of p
            from y, cross-entropy less the entropy of y). Differentiable in the latter.
        alpha: α ≥ 1, a number or one value per row; as in `entmax`. Differentiable.
        axis: the axis of the classes; with several axes, ids count through them in order.
        where: boolean mask of classes, broadcastable to `logits`; as in `cross_entropy`.
        weights: of the examples, 0 or more, broadcastable to the shape of the loss.
        ignore_index: examples with this label have weight 0, as in `cross_entropy`.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        reduction: "none", "sum" or "mean", as in `cross_entropy`.

    Returns:
        The loss, float32 or wider: with the shape of `logits` without the axis for "none", else a
        scalar. Never negative.

    Raises:
        TypeError, ValueError: as `cross_entropy` and `entmax`.

    Numerics:
        A sum of terms of which none is negative; a confident example keeps its digits, in the loss
        and in the gradient, down to where the loss is exactly 0. For a large alpha the loss of a
        row that is not confident, near 1 / alpha², has about 3 alpha eps. For target probabilities
        close to entmax(z) the loss has the rounding of their difference. Labels that do not exist,
        classes of -inf and ignored examples are as in `cross_entropy`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> logits = jnp.array([[1.0, 0.5, -1.0], [3.0, 0.5, -1.0]])
        >>> print(jaxsoft.entmax_loss(logits, jnp.array([0, 0]), alpha=2.0))
        [0.0625 0.    ]
        >>> loss = lambda logits: jaxsoft.entmax_loss(logits, 0, alpha=2.0)
        >>> print(jax.grad(loss)(logits[0]))
        [-0.25  0.25  0.  ]

    Source: Blondel, Martins & Niculae 2020, "Learning with Fenchel-Young losses".
    """
    name = "entmax_loss"
    given = examples.arguments(
        name, logits, labels, axis, where, temperature, weights, ignore_index, reduction
    )
    class_ids.in_range(name, "labels", labels, given.classes, ignore_index)
    array, number = options.alpha(name, alpha, given.shape, given.axes)
    arrays = given.logits, given.labels, given.where, given.temperature, given.weights, array
    along = {"axes": given.axes, "mesh": None, "ignore_index": given.ignore_index}
    return _entmax_loss(*arrays, **along, reduction=reduction, number=number)


def _places(ndim: int, *, reduction: Reduction, **along: Any) -> programs.Places:
    return programs.rows(ndim, **along) if reduction == "none" else ()


@rowwise(
    places=_places,
    empty=examples.reduced_nothing,
    static=("ignore_index", "reduction", "number"),
)
def _entmax_loss(
    x: Array,
    labels: Array,
    where: Array | None,
    temperature: Array | None,
    weights: Array | None,
    alpha: Array,
    axis: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
    number: float | None,
) -> Array:
    def losses(silenced: Silenced, valid: Array, label: Array) -> Array:
        scale = None if temperature is None else silenced(temperature, 1)
        logits = keep_inputs(lambda: prepare(silenced(x, 0), axis, where, scale))
        of_row = silenced(alpha, 1).astype(logits.z.dtype).squeeze(axis.position)
        order = orders.order(nan_unless(valid, of_row), number)
        _, threshold = thresholds.solution(logits, order, axis)
        if not validation.is_discrete(label):
            return target_loss(logits.z, order, label, threshold, axis)
        threshold = thresholds.confident(logits.z, label, order, threshold, axis)
        return label_loss(logits.z, order, label, threshold, axis)

    return examples.reduced_losses(losses, x, labels, where, weights, axis, ignore_index, reduction)


# With g = λ - z + m, of the label y and, in a confident row, exact in its last digits,
#
#     loss = g - (1 - Σ_i p_i^α) / α = Σ_{i≠y} p_i^α / α + (g - (1 - p_y^α) / α),
#
# and the last term is ∫₀^r t (1 - t)^(α-2) dt with r = 1 - p_y, of which the halves cancel where r
# is small. It is the divergence of p_y from 1 in `_divergence`.
def _label_loss(
    z: Array,
    order: Order,
    label: Array,
    threshold: Threshold,
    axis: ClassAxis,
) -> Array:
    p, rest, gap = _of_label(z, label, order, threshold, axis)
    power = p * orders.roots(p, order, axis)
    alpha = 1 + order.excess
    of_others = axis.sum(jnp.where(axis.one_hot(label, z), 0, power)) / alpha
    of_label = axis.take(power, label)
    own = _divergence(jnp.ones_like(rest), of_label, rest, gap, order.excess)
    return of_others + own


def _label_loss_pullback(
    z: Array,
    order: Order,
    label: Array,
    threshold: Threshold,
    axis: ClassAxis,
    cotangent: Array,
) -> Any:
    exact, rest, _ = _of_label(z, label, order, threshold, axis)
    p = entmax.probabilities(z, order, exact, axis)
    target = axis.one_hot(label, z)
    slope = valued(p - target.astype(p.dtype), jnp.where(target, 0 - axis.expand(rest), exact))
    slope = jnp.where(z == -jnp.inf, 0, slope)
    by_alpha = Order(-cotangent * _entropy_slope(p, order, axis), order.number)
    return axis.expand(cotangent) * slope, by_alpha, None, None


label_loss = analytic(_label_loss, _label_loss_pullback, static=(4,))


def _of_label(
    z: Array, label: Array, order: Order, threshold: Threshold, axis: ClassAxis
) -> tuple[Array, Array, Array]:
    """p, and of the label 1 - p and g: constants."""
    p = thresholds.probabilities(z, order, threshold, axis)
    rest = axis.sum(jnp.where(axis.one_hot(label, z), 0, p))
    gap = thresholds.gap(axis.take(z, label), order, threshold)
    return p, jnp.where(axis.take(p, label) == 0, 1, rest), gap


# loss = Σ_i b(y_i, p_i), every term a divergence of two numbers. With q = s / Σs and Y = Σ y, which
# need not be 1, z̄ = p - y + (Y - 1) q; and ȳ = g - (1 - y^a) / a.
def _target_loss(z: Array, order: Order, y: Array, threshold: Threshold, axis: ClassAxis) -> Array:
    p = thresholds.probabilities(z, order, threshold, axis)
    gap = thresholds.gaps(z, order, threshold, axis)
    power = p * orders.roots(p, order, axis)
    return axis.sum(_divergence(y, power, y - p, gap, axis.expand(order.excess)))


def _target_loss_pullback(
    z: Array,
    order: Order,
    y: Array,
    threshold: Threshold,
    axis: ClassAxis,
    cotangent: Array,
) -> Any:
    exact = thresholds.probabilities(z, order, threshold, axis)
    p = entmax.probabilities(z, order, exact, axis)
    absent, of_row, excess = z == -jnp.inf, axis.expand(cotangent), axis.sum(y) - 1
    share = _shares(p, order, axis)
    z_bar = jnp.where(absent, 0, of_row * (p - y + axis.expand(excess) * share))
    gap = _gaps(jnp.where(absent, 0, z), order, exact, threshold, axis)
    gap = jnp.where(absent, jnp.where(y == 0, 0, jnp.inf), gap)
    slope = _entropy_slope(y, order, axis) - _entropy_slope(p, order, axis)
    of_level = axis.sum(share * entmax.slope_by_alpha(p, order, axis))
    slope += excess * (of_level + (1 + order.excess) ** -2)
    by_alpha = Order(cotangent * slope, order.number)
    return z_bar, by_alpha, of_row * (gap - _depth(y, order, axis)), None


target_loss = analytic(_target_loss, _target_loss_pullback, static=(4,))


# g = λ + m - z, and λ̇ = ⟨q, ż⟩ + ⟨q, E⟩ α̇ with q = s / Σs.
def _gaps_of_classes(
    z: Array,
    order: Order,
    p: Array,
    threshold: Threshold,
    axis: ClassAxis,
) -> Array:
    return thresholds.gaps(z, order, threshold, axis)


def _gaps_pullback(
    z: Array,
    order: Order,
    p: Array,
    threshold: Threshold,
    axis: ClassAxis,
    cotangent: Array,
) -> Any:
    p = entmax.probabilities(z, order, p, axis)
    total, share = axis.sum(cotangent), _shares(p, order, axis)
    of_level = axis.sum(share * entmax.slope_by_alpha(p, order, axis))
    by_alpha = Order(total * of_level, order.number)
    return axis.expand(total) * share - cotangent, by_alpha, None, None


_gaps = analytic(_gaps_of_classes, _gaps_pullback, static=(4,))


def _shares(p: Array, order: Order, axis: ClassAxis) -> Array:
    """q = s / Σs."""
    return orders.shares(orders.slopes(p, order, axis), axis)


# b(y, p) = ∫_p^y (y - t) t^(a-1) dt. With p^a = 1 - a g on the support, and off it the part of the
# loss that is linear there,
#
#     b = y (g - 1/α) - (y - y^α) / (α a) + p^α / α,
#
# which cancels where p is near y: there, with r = (y - p) / y, b = y^α r² ∫₀¹ t (1 - r t)^(a-1) dt.
def _divergence(y: Array, power: Array, difference: Array, gap: Array, a: Array) -> Array:
    """B of probabilities p from targets y, given p^α, y - p and g: 0 or more."""
    alpha, present = 1 + a, jnp.where(y == 0, 1, y)
    ratio = jnp.where(y == 0, 2, difference / present)
    limit = jnp.minimum(0.5, 1.5 / a)  # of r: (1 - r t)^(a-1) is then smooth enough for the nodes
    near = (ratio <= limit) & (ratio >= -2 * limit)
    r = jnp.where(near, ratio, 0)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES[y.dtype.itemsize])
    integral = jnp.full_like(y * a, 0.5)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        integral += float(weight * node) * jnp.expm1((a - 1) * jnp.log1p(-r * float(node)))
    of_target = present * powers.depth(present, a) / alpha
    linear = jnp.where(y == 0, 0, present * (jnp.where(y == 0, 0, gap) - 1 / alpha) - of_target)
    by_series = present * jnp.exp(-a * powers.surprisal(present)) * r * r * integral
    return jnp.where(near, by_series, linear + power / alpha)


def _depth(y: Array, order: Order, axis: ClassAxis) -> Array:
    """(1 - y^a) / a."""
    a = axis.expand(order.excess)
    return jnp.where(y == 0, 1 / a, powers.depth(y, a))


# -Ω = Σ p (1 - p^a) / (a α).
def _entropy_slope(p: Array, order: Order, axis: ClassAxis) -> Array:
    """∂Ω/∂α, of which no term is negative."""
    a = axis.expand(order.excess)
    terms = p * (powers.depth(p, a) / (1 + a) - powers.depth_slope(p, a))
    return axis.sum(terms) / (1 + order.excess)
