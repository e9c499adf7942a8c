"""cross_entropy, put together from the losses of rows."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import class_ids, devices, options, programs, validation
from jaxsoft._core.axes import ClassAxis
from jaxsoft._functions import examples, token_loss
from jaxsoft._functions.examples import Silenced
from jaxsoft._functions.label_loss import label_loss, target_loss
from jaxsoft._functions.logsumexp import log_normalizer
from jaxsoft._functions.token_loss import Reduction
from jaxsoft._rows.logits import Logits, cap, compute_dtype, nan_unless, prepare
from jaxsoft._rows.rowwise import from_statistics, rowwise
from jaxsoft._rows.statistics import Row


def cross_entropy(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
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
    axis_name: validation.AxisName = None,
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
            divides by the total weight of the examples that are not ignored, and is 0 if that is
            0. (`.mean()` of the losses would count the ignored ones.)
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
    given = examples.arguments(
        name, logits, labels, axis, where, temperature, weights, ignore_index, reduction
    )
    class_weights = options.per_class(
        name, "class_weights", class_weights, given.classes, "one weight per class"
    )
    of_rows = {  # in the order of the arguments of `_cross_entropy`
        "temperature": given.temperature,
        "weights": given.weights,
        "label_smoothing": options.number_or_none(name, "label_smoothing", label_smoothing, 0, 1),
        "z_loss": options.number_or_none(name, "z_loss", z_loss, 0, math.inf),
        "softcap": options.softcap(name, softcap),
    }
    ids = validation.is_discrete(given.labels)
    mesh = validation.mesh(name, axis_name, **of_rows, **({"labels": given.labels} if ids else {}))
    count = given.classes * (mesh.size if mesh else 1)
    class_ids.in_range(name, "labels", labels, count, ignore_index)
    arrays = (given.logits, given.labels, given.where, class_weights, *of_rows.values())
    along = {"axes": given.axes, "mesh": mesh, "ignore_index": given.ignore_index}
    return _cross_entropy(*arrays, **along, reduction=reduction)


def _places(ndim: int, *, reduction: Reduction, **along: Any) -> programs.Places:
    return programs.rows(ndim, **along) if reduction == "none" else ()


@rowwise(places=_places, empty=examples.reduced_nothing, static=("ignore_index", "reduction"))
def _cross_entropy(
    x: Array,
    labels: Array,
    where: Array | None,
    class_weights: Array | None,
    temperature: Array | None,
    weights: Array | None,
    label_smoothing: Array | None,
    z_loss: Array | None,
    softcap: Array | None,
    axis: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
) -> Array:
    class_weights, label_smoothing, z_loss, softcap = (
        None if option is None else jnp.asarray(option, compute_dtype(x.dtype))
        for option in (class_weights, label_smoothing, z_loss, softcap)
    )

    def losses(silenced: Silenced, valid: Array, label: Array) -> Array:
        def logits() -> Logits:
            z = silenced(x, 0)
            if softcap is not None:
                z = cap(z if where is None else jnp.where(where, z, 0), softcap)
            scale = None if temperature is None else silenced(temperature, 1)
            return prepare(z, axis, where, scale)

        def of_rows(logits: Logits, row: Row) -> Array:
            row = row._replace(rest=nan_unless(valid, row.rest))
            return _losses(logits, row, label, axis, where, class_weights, label_smoothing, z_loss)

        place = label if validation.is_discrete(label) else None
        return from_statistics(of_rows, logits, axis, label=place)[1]

    return examples.reduced_losses(losses, x, labels, where, weights, axis, ignore_index, reduction)


def _losses(
    logits: Logits,
    row: Row,
    label: Array,
    axis: ClassAxis,
    where: Array | None,
    class_weights: Array | None,
    label_smoothing: Array | None,
    z_loss: Array | None,
) -> Array:
    """The losses of rows, each given the place of its label, or its target."""
    z, mesh = logits.z, axis.mesh
    of_classes = jnp.ones(z.shape, z.dtype)
    if class_weights is not None:
        of_classes = lax.broadcast_in_dim(class_weights, z.shape, (axis.position,))
    of_classes = devices.copied(of_classes, z, mesh)
    n: Array | int | None = None
    of_label = spread = log_partition = None
    if validation.is_discrete(label):
        loss = label_loss(z, label, row, axis)
        of_label = None if class_weights is None else axis.take(of_classes, label)
    else:
        loss = target_loss(z, label * of_classes, row, axis)
    if label_smoothing is not None:
        n = axis.count(z)
        if where is not None:
            of_classes = jnp.where(where, of_classes, 0)
            n = jnp.maximum(axis.sum(where.astype(z.dtype)), 1)
        spread = devices.joined(target_loss(z, of_classes, row, axis), mesh)
    if z_loss is not None:
        log_partition = row.top + devices.joined(log_normalizer(z, row, axis), mesh)
        if logits.shift is not None:
            log_partition += logits.shift
        # A row without a class has no partition function; its loss is infinite as it is.
        log_partition = jnp.where(row.rest == -1, 0, log_partition)
    loss = devices.joined(loss, mesh)
    return token_loss.combined(loss, of_label, label_smoothing, n, spread, z_loss, log_partition)
