"""linear_cross_entropy: a linear layer and its cross-entropy, without the logits in between."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

from jaxsoft._core import class_ids, devices, options, programs, validation
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.sizes import is_empty, known
from jaxsoft._functions import token_loss
from jaxsoft._functions.token_loss import Reduction
from jaxsoft._linear.loops import Division, divided
from jaxsoft._linear.models import Model, checked, prepared
from jaxsoft._linear.operands import Tokens
from jaxsoft._linear.rules import weighted_losses, with_derivatives
from jaxsoft._linear.token_losses import Losses, LossStatistics, loss_statistics
from jaxsoft._rows.logits import nan_unless


def linear_cross_entropy(
    x: Shaped[ArrayLike, "..."],
    w: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    *,
    bias: Shaped[ArrayLike, "..."] | None = None,
    weights: Shaped[ArrayLike, "..."] | None = None,
    ignore_index: int | None = None,
    label_smoothing: Shaped[ArrayLike, ""] = 0.0,
    z_loss: Shaped[ArrayLike, ""] = 0.0,
    class_weights: Shaped[ArrayLike, "..."] | None = None,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    softcap: Shaped[ArrayLike, ""] | None = None,
    reduction: Reduction = "mean",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    axis_name: validation.AxisName = None,
    has_aux: bool = False,
) -> Any:
    r"""Cross-entropy of softmax(x w + bias), without ever holding the logits of all tokens.

        loss_i = cross_entropy(x_i w + bias, labels_i, …)
        mean: Σ_i weights_i loss_i / Σ_i weights_i          sum: Σ_i weights_i loss_i
        ∂loss_i/∂x_i = w (p_i - y_i)          ∂loss_i/∂w = x_i (p_i - y_i)ᵀ

    For a language model with n words in its vocabulary the logits, [tokens, n], are by far the
    largest array of a training step. Here they are made in chunks. The mean and the sum have their
    gradients computed along with the value, in three products of matrices, for those arguments
    that are being differentiated; a call that is not differentiated computes the loss alone.
    "none" keeps its arguments and makes the logits again. Differentiable in every mode and to any
    order, in chunks too.

    Args:
        x: features, shape [..., d].
        w: weight of the layer, shape [d, n].
        labels: class ids, an integer array of shape [...].
        bias: shape [n]. An entry of -inf takes a class out: it has no probability, and no part of
            the smoothed target.
        weights: of the examples, 0 or more, broadcastable to the shape of `labels`.
        ignore_index: examples with this label have weight 0, whatever x holds there. There is no
            default: -100, which others ignore unasked, is a label that does not exist.
        label_smoothing: α in [0, 1], the part of the target that is spread over all classes.
        z_loss: ζ ≥ 0, the weight of the squared logarithm of the partition function.
        class_weights: shape [n]. They scale the losses; the mean divides by `weights` alone. For
            the weighted mean of PyTorch see `cross_entropy`.
        temperature: T > 0, a number or one value for each example, broadcastable to [..., 1].
        softcap: c > 0; finite logits are replaced by c tanh(logits / c). An infinite c is no cap.
        reduction: "mean", which is 0 when the weights add up to 0; "sum"; or "none" for a loss for
            each example, times its weight.
        token_chunk: how many tokens are taken at a time, at most. Default: d, or 384 if that is
            more, so that a chunk of logits has about the size of w; a third more where they are
            made twice, with `vocab_chunk` and for "none"; half as many on a CPU of several devices.
            Of tokens that are divided among devices each has its part of every chunk, if there are
            chunks, up to half as large, that divide the tokens. A symbolic number of tokens
            (`jax.export`) is one chunk, as is one of classes.
        vocab_chunk: how many classes are taken at a time, at most, so that no more than
            token_chunk × vocab_chunk logits are held, which the gradient then computes twice.
            Default: the gradient holds the logits of a chunk of tokens for all classes. To be left
            alone where `jax.jit` divides the classes of `w`, for a chunk of them is on few devices.
        axis_name: mesh axes over which the classes go on, as in `softmax`: each device has its
            columns of `w` and its part of `bias` and `class_weights`, in order. All else is alike
            on these devices, as the loss is; labels are ids among all classes. Where labels differ
            between devices the loss is NaN, if JAX does not know it before. "none" is
            differentiated in `jax.shard_map` from jax 0.7 on.
        has_aux: whether to return what else the same pass finds of each token, for monitoring, as
            `jax.value_and_grad(..., has_aux=True)` takes it. It costs no product of matrices.

    Returns:
        The loss in nats: a scalar, or an array of the shape of `labels` for "none", in float32 or
        wider. With `has_aux` a pair of it and `LossStatistics`, two arrays of the shape of
        `labels`: `log_partition`, log Σ_j exp(z_j) of the logits z, which is differentiable (in one
        more pass over the logits); and `correct`, whether no logit is larger than that of the
        label. Of an ignored token they are 0 and False, which a mean is to leave out:
        `jnp.mean(found.correct, where=labels != ignore_index)`.

    Raises:
        TypeError: an argument is complex or not an array, `labels` are not integers, a chunk is no
            integer.
        ValueError: an argument has the wrong shape or is out of its range; a label that is a number
            is outside [0, n) and not ignored; `reduction` is unknown.

    Numerics:
        Logits, statistics and sums over tokens are float32 or wider for 16-bit inputs too, and
        gradients are rounded to the type of their argument once, at the end. The loss and the
        gradient of a confident example do not round to 0. A label outside [0, n) that is not
        ignored gives NaN. An example of weight 0 counts for nothing even if its x is not finite or
        its label does not exist.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> x, w = jnp.eye(2, 3), 20.0 * jnp.eye(3, 5)
        >>> labels = jnp.array([0, 2])
        >>> losses = jaxsoft.linear_cross_entropy(x, w, labels, reduction="none")
        >>> print(*(f"{loss:.4g}" for loss in losses))
        8.245e-09 20
        >>> print(jax.grad(jaxsoft.linear_cross_entropy)(x, w, labels).shape)
        (2, 3)
        >>> loss, found = jaxsoft.linear_cross_entropy(x, w, labels, has_aux=True)
        >>> print(f"accuracy {found.correct.mean()}, log Z {found.log_partition}")
        accuracy 0.5, log Z [20. 20.]

    What else it computes, for features `a` and `b` of pairs: InfoNCE both ways, the logits
    adjusted by how frequent the classes are, some classes in place of all, and the focal loss.

        >>> a, b, T = jnp.eye(2, 3), jnp.eye(2, 3) + 0.1, 0.1
        >>> pair, score = jnp.arange(2), jaxsoft.linear_cross_entropy
        >>> contrast = score(a, b.T, pair, temperature=T) + score(b, a.T, pair, temperature=T)
        >>> frequency = jnp.array([0.4, 0.3, 0.1, 0.1, 0.1])
        >>> adjusted = score(x, w, labels, bias=jnp.log(frequency))  # Menon et al. 2021
        >>> ids, drawn = jnp.array([0, 2, 4]), jnp.array([1.0, 1.0, 0.5])  # drawn: expected counts
        >>> sampled = score(x, w[:, ids], jnp.searchsorted(ids, labels), bias=-jnp.log(drawn))
        >>> focal = jnp.mean((-jnp.expm1(-losses)) ** 2 * losses)  # (1 - p)² · loss
        >>> print(contrast.shape, adjusted.shape, sampled.shape, focal.shape)
        () () () ()

    Source: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", for the
    loss in chunks.
    """
    name = "linear_cross_entropy"
    model = checked(name, x, w, bias, softcap)
    shape, n = model.x.shape[:-1], model.w.shape[1]
    given, of = labels, "x without its last axis"
    labels, ignored = class_ids.ids(name, "labels", labels, shape, of, ignore_index)
    token_loss.check_reduction(name, reduction)
    class_weights = options.per_class(
        name, "class_weights", class_weights, n, "one weight per class"
    )
    if weights is not None:
        weights = options.non_negative(name, "weights", weights, shape, "the shape of labels")
    alike = {
        "labels": labels,
        "weights": weights,
        "label_smoothing": options.number_or_none(name, "label_smoothing", label_smoothing, 0, 1),
        "z_loss": options.number_or_none(name, "z_loss", z_loss, 0, math.inf),
        "temperature": options.temperature(name, temperature, (*shape, n), (len(shape),)),
    }
    mesh = validation.mesh(name, axis_name, x=model.x, softcap=model.softcap, **alike)
    class_ids.in_range(name, "labels", given, n * (mesh.size if mesh else 1), ignore_index)
    once = reduction != "none"
    division = divided(name, model.w, token_chunk, vocab_chunk, mesh, once=once)
    static = {
        "ignore_index": ignored,
        "reduction": reduction,
        "division": division,
        "has_aux": validation.flag(name, "has_aux", has_aux),
    }
    return _linear_cross_entropy((model,), class_weights=class_weights, **alike, **static)


def _places(ndim: int, *, reduction: Reduction, has_aux: bool, **_: Any) -> Any:
    of_tokens = programs.of_last(ndim)
    loss = of_tokens if reduction == "none" else ()
    return (loss, of_tokens, of_tokens) if has_aux else loss


@programs.program(static=("ignore_index", "reduction", "division", "has_aux"), places=_places)
def _linear_cross_entropy(
    models: tuple[Model, ...],
    *,
    labels: Array,
    weights: Array | None,
    class_weights: Array | None,
    label_smoothing: Array | None,
    z_loss: Array | None,
    temperature: Array | None,
    ignore_index: int | None,
    reduction: Reduction,
    division: Division,
    has_aux: bool,
) -> Any:
    shape, mesh, axis = labels.shape, division.mesh, ClassAxis(1, division.mesh)
    given = labels, weights, temperature, class_weights, label_smoothing, z_loss
    x, layer, others, dtype = prepared(models, *given, mesh=mesh)
    labels, weights, temperature, *options = others
    layer = layer.with_options(*options)
    labels, n = labels.reshape(-1), axis.count(layer.w[0])
    valid, ignored = token_loss.labelled(labels, n, ignore_index, mesh)
    factors, finite = devices.typed(jnp.ones(labels.shape, dtype), x[0]), None
    if weights is not None:
        factors, finite = weights.reshape(-1), jnp.all(jnp.isfinite(x[0]), 1)
    factors, valid, ignored = token_loss.examples(factors, valid, ignored, finite)
    if is_empty(labels) or known(lambda: n == 0, False):
        # Without a class no label exists: a loss is NaN, or else 0 by its weight or ignore_index.
        out = nan_unless(factors == 0, jnp.zeros_like(factors))
        statistics = LossStatistics(jnp.full_like(out, -jnp.inf), jnp.zeros(labels.shape, bool))
    else:
        places = axis.places(labels, layer.w[0])
        tokens = Tokens(x, places, valid, ignored).with_temperature(temperature)
        along = Losses(), tokens, layer, division
        out, found = weighted_losses(factors, reduction, *along)
        if has_aux:
            found = found if reduction == "none" else with_derivatives(found, *along)
            statistics = loss_statistics(found, tokens)
    out = token_loss.reduced(out, factors, reduction)
    loss = out.reshape(shape) if reduction == "none" else out
    if not has_aux:
        return loss
    log_partition, correct = statistics
    return loss, LossStatistics(log_partition.reshape(shape), correct.reshape(shape))
