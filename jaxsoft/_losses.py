"""cross_entropy, with its rules."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft import _axes, _checks, _labels, _logits, _mesh, _reduction, _rows, _sharding
from jaxsoft._autodiff import jvp_from_vjp
from jaxsoft._axes import ClassAxis
from jaxsoft._logarithms import complement, log_probabilities
from jaxsoft._logsumexp import log_normalizer
from jaxsoft._mesh import Mesh
from jaxsoft._reduction import Reduction
from jaxsoft._sizes import is_empty, known
from jaxsoft._softmax import jacobian_product, probabilities, undominated


def cross_entropy(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    weights: Shaped[ArrayLike, "..."] | None = None,
    label_smoothing: Shaped[ArrayLike, ""] = 0.0,
    z_loss: Shaped[ArrayLike, ""] = 0.0,
    ignore_index: int | None = None,
    class_weights: Shaped[ArrayLike, " n"] | None = None,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    softcap: Shaped[ArrayLike, ""] | None = None,
    reduction: Reduction = "none",
    axis_name: _checks.AxisName = None,
) -> Float[Array, "..."]:
    r"""Cross-entropy between softmax(logits) and labels, from the logits.

        loss = Σ_j q_j (log Z + m - z_j) + ζ (log Z + m)²          Z = Σ_j exp(z_j - m)
        z = c tanh(logits / c) / T
        q_j = w_j ((1 - α) y_j + α / n)
        mean: Σ_i weights_i loss_i / Σ_i weights_i          sum: Σ_i weights_i loss_i
        ∂loss/∂z = p - y   (ζ = α = 0, w = 1), with 1 - p_y summed from the other classes

    A confident example keeps its loss and its gradient where subtraction makes both exactly 0.
    Reverse mode keeps the arguments and two numbers for each example.

    Args:
        logits: shape [..., n, ...]. Integers and booleans become the default float.
        labels: class ids, an integer array of the shape of `logits` without the axis; or target
            probabilities y, a floating array broadcastable to `logits`, whose rows need not sum
            to 1. Differentiable in the latter.
        axis: the axis of the classes; with several axes, ids count through them in order.
        where: boolean mask of classes, broadcastable to `logits`; classes where it is False have
            probability 0 and no target, whatever `labels` hold there. (To leave out examples, take
            `weights` or `ignore_index`.)
        weights: of the examples, 0 or more, broadcastable to the shape of the loss.
        label_smoothing: α in [0, 1]; n counts the classes that are not masked.
        z_loss: ζ ≥ 0, the weight of the squared logarithm of the partition function.
        ignore_index: examples with this label have weight 0: loss 0 and gradient 0, whatever
            `logits` hold there. Only for class ids. There is no default: -100, which others ignore
            unasked, is a label that does not exist, and its loss NaN.
        class_weights: w, shape [n]. They scale the losses; the mean divides by `weights` alone. The
            weighted mean of PyTorch divides by the class weights of the labels as well: that is
            `weights=class_weights[labels]` in place of `class_weights`, and with label smoothing
            `reduction="sum"`, divided by `class_weights[labels].sum()`.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        softcap: c > 0; finite logits are replaced by c tanh(logits / c), before any mask. An
            infinite c is no cap.
        reduction: "none" for a loss for each example, times its weight; "sum"; or "mean", which
            divides by the total weight of what is not ignored and is 0 if that is 0. (`.mean()` of
            the losses would count the ignored ones.)
        axis_name: mesh axes over which the axis of the classes goes on; as in `softmax`. Labels are
            ids among all classes, and alike on all devices, as the loss is; target probabilities
            and `class_weights` are those of the classes here. Where labels differ between devices
            the loss is NaN, if JAX does not know it before.

    Returns:
        The loss in nats, float32 or wider: with the shape of `logits` without the axis for "none",
        else a scalar.

    Raises:
        TypeError: an argument is complex or not an array, class ids are not integers or target
            probabilities not floating, `ignore_index` is no integer.
        ValueError: labels or options of the wrong shape or out of their range; a label given as a
            number that is outside [0, n) and not ignored; an unknown reduction.

    Numerics:
        The loss is within 6 + gap/2 eps of its value, the gradient within 8 + gap/2 in every
        entry. A label outside [0, n) that is not ignored gives NaN, loss and gradient; it never
        wraps. A label on a class of probability 0, masked or -inf, gives infinity. A target of 0
        on a logit of -inf contributes 0. An entry of -inf has derivative 0. An example of weight 0
        counts for nothing even if its logits are not finite or its label does not exist.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> logits = jnp.array([20.0, 0.0, 0.0])
        >>> print(f"{jaxsoft.cross_entropy(logits, 0):.4g}")
        4.122e-09
        >>> print(*(f"{d:.4g}" for d in jax.grad(jaxsoft.cross_entropy)(logits, 0)))
        -4.122e-09 2.061e-09 2.061e-09
        >>> labels = jnp.array([0, 2, -1])  # the last is padding
        >>> batch = jnp.stack([logits, logits, logits])
        >>> print(jaxsoft.cross_entropy(batch, labels, ignore_index=-1, reduction="mean"))
        10.0

    Source: Prieto et al. 2025, arXiv 2501.04697, for what happens in training without it.
    """
    name = "cross_entropy"
    logits = _checks.array(name, "logits", logits)
    swapped = _checks.is_discrete(logits)
    logits = _checks.floating(name, "logits", logits)
    axes = _checks.axes(name, axis, logits.ndim)
    rows = tuple(size for a, size in enumerate(logits.shape) if a not in axes)
    _reduction.check(name, reduction)
    given = labels
    labels, ignored = _labels.labels(
        name, labels, logits.shape, axes, ignore_index, swapped=swapped
    )
    of_classes = "the shape of the logits; it masks classes, weights or ignore_index examples"
    where = _checks.mask(name, where, logits.shape, of_classes)
    n = math.prod(logits.shape[a] for a in axes)
    class_weights = _checks.per_class(
        name, "class_weights", class_weights, n, "one weight per class"
    )
    if weights is not None:
        weights = _checks.non_negative(name, "weights", weights, rows, "the shape of the loss")
    of_rows = {
        "weights": weights,
        "label_smoothing": _checks.number_or_none(name, "label_smoothing", label_smoothing, 0, 1),
        "z_loss": _checks.number_or_none(name, "z_loss", z_loss, 0, math.inf),
        "temperature": _checks.temperature(name, temperature, logits.shape, axes),
        "softcap": _checks.softcap(name, softcap),
    }
    alike = {**of_rows, "labels": labels} if _checks.is_discrete(labels) else of_rows
    mesh = _checks.mesh(name, axis_name, **alike)
    _labels.in_range(name, "labels", given, n * (mesh.size if mesh else 1), ignore_index)
    return _cross_entropy(
        logits,
        labels,
        where,
        class_weights,
        **of_rows,
        axes=axes,
        mesh=mesh,
        ignore_index=ignored,
        reduction=reduction,
    )


def _places(ndim: int, *, reduction: Reduction, **along: Any) -> _sharding.Places:
    return _sharding.rows(ndim, **along) if reduction == "none" else ()


@_sharding.program(static=("axes", "mesh", "ignore_index", "reduction"), places=_places)
def _cross_entropy(
    logits: Array,
    labels: Array,
    where: Array | None,
    class_weights: Array | None,
    weights: Array | None,
    label_smoothing: Array | None,
    z_loss: Array | None,
    temperature: Array | None,
    softcap: Array | None,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
    ignore_index: int | None,
    reduction: Reduction,
) -> Array:
    shape = tuple(size for a, size in enumerate(logits.shape) if a not in axes)
    axis = ClassAxis(_axes.merged_axis(logits.ndim, axes), mesh)
    dtype = _logits.compute_dtype(logits.dtype)
    if is_empty(logits):
        lost = jnp.full(shape, jnp.nan if known(lambda: math.prod(shape) > 0, True) else 0, dtype)
        return _reduction.reduced(lost, jnp.ones(shape, dtype), reduction)
    numbers = [
        None if option is None else jnp.asarray(option, dtype)
        for option in (label_smoothing, z_loss, softcap)
    ]
    options = where, class_weights, temperature, weights, *numbers
    logits, labels, *aligned = _mesh.aligned(logits, labels, *options, mesh=mesh)
    where, class_weights, temperature, weights, label_smoothing, z_loss, softcap = aligned
    ids = _checks.is_discrete(labels)
    if not ids:
        labels = _axes.merge_axes(labels, axes)
    ignored = None if ignore_index is None else labels == ignore_index
    x = _axes.merge_axes(logits, axes)
    mask, temperature = _axes.merge_axes(where, axes), _axes.merge_axes(temperature, axes)
    if not ids and mask is not None:
        labels = jnp.where(mask, labels, 0)  # what is masked has no target

    def prepared() -> _logits.Logits:
        given, scale = x, temperature
        if ignored is not None:  # a cotangent of 0 does not silence a NaN
            given = jnp.where(axis.expand(ignored), 0, given)
            scale = None if scale is None else jnp.where(axis.expand(ignored), 1, scale)
        if softcap is not None:
            given = given if mask is None else jnp.where(mask, given, 0)
            given = _logits.cap(given, softcap)
        return _logits.prepare(given, axis, mask, scale)

    place = None
    if ids:
        alike = _mesh.agree(labels, mesh)
        valid = (labels >= 0) & (labels < axis.count(x)) & alike
        ignored = None if ignored is None else ignored & alike
        place = axis.places(jnp.where(valid, labels, 0), x)
        row = _rows.statistics(prepared(), axis, place)
        sound = valid
    else:
        row = _rows.statistics(prepared(), axis)
        sound = jnp.ones(row.rest.shape, bool) if weights is None else _all_finite(labels, axis)
    factors = jnp.ones(row.rest.shape, dtype)
    if weights is not None:
        factors = weights.astype(dtype)
        # What cannot be computed may be left out; of what can, the derivative by the weight counts.
        absent = (factors == 0) & ~(sound & jnp.isfinite(row.rest))
        row = _rows.Row(*(jnp.where(absent, 0, of_row) for of_row in row))
        ignored = absent if ignored is None else ignored | absent
    if ignored is not None:
        factors, sound = jnp.where(ignored, 0, factors), sound | ignored
    if ids or weights is not None:
        # A NaN in the statistics makes the loss and every derivative of its row NaN.
        row = row._replace(rest=_logits.nan_unless(sound, row.rest))

    def losses() -> Array:
        ready = prepared()
        z, shift = ready.z, ready.shift
        of_classes = uniform = None
        if class_weights is not None:
            others = [a for a in range(z.ndim) if a != axis.position]
            of_classes = jnp.expand_dims(class_weights.astype(dtype), others)
        if label_smoothing is not None:
            alpha = label_smoothing
            alpha = _logits.nan_unless((alpha >= 0) & (alpha <= 1), alpha)
            uniform = _uniform(alpha, mask, z, axis)
        if place is not None:
            loss = _mesh.joined(negative_log_likelihood(z, place, row, axis), mesh)
            if uniform is not None:
                loss *= 1 - alpha
            if of_classes is not None:
                of_label = axis.take(jnp.broadcast_to(of_classes, z.shape), place)
                loss = _reduction.weighted(of_label, loss)
            target = uniform
        else:
            loss = jnp.zeros_like(row.top)
            target = labels.astype(dtype)
            if uniform is not None:
                target = (1 - alpha) * target + uniform
        if target is not None:
            target = target if of_classes is None else of_classes * target
            target = _mesh.copied(jnp.broadcast_to(target, z.shape), z, mesh)
            loss += _mesh.joined(expected_loss(z, target, row, axis), mesh)
        if z_loss is not None:
            log_partition = row.top + _mesh.joined(log_normalizer(z, row, axis), mesh)
            if shift is not None:
                log_partition += shift
            # A row without a class has no partition function; its loss is infinite as it is.
            log_partition = jnp.where(row.rest == -1, 0, log_partition)
            loss += z_loss * log_partition**2
        return loss

    loss = _logits.keep_inputs(losses)
    if weights is not None:
        loss = _reduction.weighted(factors, loss)
    if ignored is not None:
        loss = jnp.where(ignored, 0, loss)
    loss = _reduction.reduced(loss, factors, reduction)
    return loss.reshape(shape) if reduction == "none" else loss


def _all_finite(labels: Array, axis: ClassAxis) -> Array:
    """Whether all target probabilities of a row are finite."""
    return axis.sum((~jnp.isfinite(labels)).astype(jnp.float32)) == 0


def _uniform(alpha: Array, mask: Array | None, z: Array, axis: ClassAxis) -> Array:
    if mask is None:
        return jnp.broadcast_to(alpha / axis.count(z), z.shape)
    count = axis.expand(axis.sum(mask.astype(alpha.dtype)))
    return jnp.where(mask, alpha / jnp.maximum(count, 1), 0)


# loss = (m - z_y) + log Z, both terms non-negative; z̄ = loss-bar · (p - e_y).
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _negative_log_likelihood(z: Array, label: Array, row: _rows.Row, axis: ClassAxis) -> Array:
    loss = (row.top - axis.take(z, label)) + row.log_normalizer
    return _mesh.copied(loss, z, axis.mesh)


negative_log_likelihood = jvp_from_vjp(_negative_log_likelihood)


def _negative_log_likelihood_fwd(
    z: Array, label: Array, row: _rows.Row, axis: ClassAxis
) -> tuple[Array, Any]:
    return negative_log_likelihood(z, label, row, axis), (z, label, row)


def _negative_log_likelihood_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    z, label, row = residuals
    return axis.expand(cotangent) * hard_residual(z, label, row, axis), None, None


_negative_log_likelihood.defvjp(_negative_log_likelihood_fwd, _negative_log_likelihood_bwd)


# p - e_y, with expm1(-loss) = -(1 - p_y) at the label; its derivative is J, as that of p. The
# exponential of the label is left out as it is in the statistics, so that XLA shares one array
# between the two.
# An entry of -inf is a constant, also at the label.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _hard_residual(z: Array, label: Array, row: _rows.Row, axis: ClassAxis) -> Array:
    others = _rows.other_exponentials(z, row.top, label, axis)
    others /= axis.expand(_rows.at_least_one(row.normalizer))
    z_label = axis.take(z, label)
    loss = (row.top - z_label) + row.log_normalizer
    at_label = jnp.where(z_label == -jnp.inf, 0, -_rows.other_mass(loss))
    return jnp.where(axis.one_hot(label, z), axis.expand(at_label), others)


hard_residual = jvp_from_vjp(_hard_residual)


def _hard_residual_fwd(
    z: Array, label: Array, row: _rows.Row, axis: ClassAxis
) -> tuple[Array, Any]:
    return hard_residual(z, label, row, axis), (z, row)


def _hard_residual_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    z, row = residuals
    p, _ = probabilities(z, None, row.top, row.normalizer, axis, z.dtype)
    z_bar, _ = jacobian_product(p, cotangent, axis, undominated(row.largest))
    return z_bar, None, None


_hard_residual.defvjp(_hard_residual_fwd, _hard_residual_bwd)


# loss = Σ_j q_j ((m - z_j) + log Z), every term non-negative; with Q = Σ_j q_j,
# z̄_j = loss-bar · (Q p_j - q_j) and q̄_j = -loss-bar · log p_j. To keep the former exact for a
# confident row it is put together as p_j (Σ_{i≠j} q_i) - q_j (1 - p_j), both from sums of others.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _expected_loss(z: Array, target: Array, row: _rows.Row, axis: ClassAxis) -> Array:
    losses = (axis.expand(row.top) - z) + axis.expand(row.log_normalizer)
    return _mesh.copied(axis.sum(jnp.where(target == 0, 0, target * losses)), z, axis.mesh)


expected_loss = jvp_from_vjp(_expected_loss)


def _expected_loss_fwd(
    z: Array, target: Array, row: _rows.Row, axis: ClassAxis
) -> tuple[Array, Any]:
    return expected_loss(z, target, row, axis), (z, target, row)


def _expected_loss_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    z, target, row = residuals
    p, _ = probabilities(z, None, row.top, row.normalizer, axis, z.dtype)
    absent = (z == -jnp.inf) & (target == 0)
    target = jnp.where(absent, 0, target)  # a constant: it contributes 0
    total = axis.expand(axis.sum(target))
    large = 2 * target > total
    small_total = axis.expand(axis.sum(jnp.where(large, 0, target)))
    others = jnp.where(large, small_total, total - target)
    cotangent = axis.expand(cotangent)
    z_bar = cotangent * (p * others - target * complement(p, row, axis))
    log_p = log_probabilities(z, None, row, axis)
    target_bar = -cotangent * jnp.where(absent, 0, log_p)
    return jnp.where(z == -jnp.inf, 0, z_bar), target_bar, None


_expected_loss.defvjp(_expected_loss_fwd, _expected_loss_bwd)
