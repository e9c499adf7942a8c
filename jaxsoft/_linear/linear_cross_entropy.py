"""linear_cross_entropy: a linear layer and its cross-entropy, without the logits in between."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import class_ids, devices, options, programs, validation
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.devices import Mesh
from jaxsoft._core.programs import Places
from jaxsoft._core.sizes import is_empty, known
from jaxsoft._functions import token_loss
from jaxsoft._functions.token_loss import Reduction
from jaxsoft._linear.chunks import Division
from jaxsoft._linear.online import Layer, Options, Tokens
from jaxsoft._linear.rules import losses, weighted_sum
from jaxsoft._rows.logits import compute_dtype, nan_unless, positive

# On a CPU the product of a chunk of so many classes stays in the cache. Elsewhere each chunk of
# classes costs kernels and passes over memory, so by default there is one.
_CLASSES = 2048
_LEAST_TOKENS = 384  # products of matrices with fewer rows are slow


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
) -> Float[Array, "..."]:
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

    Returns:
        The loss in nats: a scalar, or an array of the shape of `labels` for "none", in float32 or
        wider.

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

    Source: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", for the
    loss in chunks.
    """
    name = "linear_cross_entropy"
    x, w = validation.floating(name, "x", x), validation.floating(name, "w", w)
    validation.matrix(name, "w", w, x)
    shape, n = x.shape[:-1], w.shape[1]
    given, of = labels, "x without its last axis"
    labels, ignored = class_ids.ids(name, "labels", labels, shape, of, ignore_index)
    token_loss.check_reduction(name, reduction)
    bias = options.per_class(name, "bias", bias, n, "one for each class")
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
        "softcap": options.softcap(name, softcap),
    }
    mesh = validation.mesh(name, axis_name, x=x, **alike)
    class_ids.in_range(name, "labels", given, n * (mesh.size if mesh else 1), ignore_index)
    tokens = options.positive_or_none(name, "token_chunk", token_chunk)
    classes = options.positive_or_none(name, "vocab_chunk", vocab_chunk)
    division = _division(w, tokens, classes, reduction, mesh)
    of_classes = {"bias": bias, "class_weights": class_weights}
    static = {"ignore_index": ignored, "reduction": reduction, "division": division}
    return _linear_cross_entropy(x, w, **alike, **of_classes, **static)


def _division(
    w: Array, tokens: int | None, classes: int | None, reduction: Reduction, mesh: Mesh | None
) -> Division:
    """How tokens and classes are divided, by default where the size of a chunk is None."""
    d, n = w.shape
    keep = classes is None and reduction != "none"
    most = d if known(lambda: d > _LEAST_TOKENS, False) else _LEAST_TOKENS
    if not keep:
        most += most // 3
    together = n
    if jax.default_backend() == "cpu":
        if mesh is None and jax.device_count() > 1:
            # The compiler may have divided the classes among devices: a chunk of them would have to
            # be sent to all. The memory that all classes take at once is saved on tokens.
            most //= 2
        elif known(lambda: n > _CLASSES, False):
            together = _in_cache(n)
    return Division(tokens or most, classes or together, keep, mesh)


def _in_cache(n: int) -> int:
    """About `_CLASSES` of them, and if possible such that all chunks are of one size."""
    count = max(1, round(n / _CLASSES))
    near = sorted(range(count - count // 3, count + count // 3 + 1), key=lambda c: abs(c - count))
    return next((n // c for c in near if n % c == 0), math.ceil(n / count))


def _places(ndim: int, *, reduction: Reduction, **_: Any) -> Places:
    return programs.of_last(ndim) if reduction == "none" else ()


@programs.program(static=("ignore_index", "reduction", "division"), places=_places)
def _linear_cross_entropy(
    x: Array,
    w: Array,
    *,
    labels: Array,
    weights: Array | None,
    temperature: Array | None,
    ignore_index: int | None,
    reduction: Reduction,
    division: Division,
    **options: Any,
) -> Array:
    shape, mesh = labels.shape, division.mesh
    common = jnp.promote_types(x.dtype, w.dtype)
    dtype = compute_dtype(common)
    given = (temperature, weights, *Options(**options))
    widened = [None if option is None else jnp.asarray(option, dtype) for option in given]
    args = devices.aligned(w.astype(common), x, labels, *widened, mesh=mesh)
    w, x, labels, scale, weights, *of_layer = args
    x, labels = x.reshape(labels.size, w.shape[0]).astype(common), labels.reshape(-1)
    axis = ClassAxis(1, mesh)
    n = axis.count(w)
    valid, ignored = token_loss.labelled(labels, n, ignore_index, mesh)
    factors, finite = devices.typed(jnp.ones(labels.shape, dtype), x), None
    if weights is not None:
        factors, finite = weights.reshape(-1), jnp.all(jnp.isfinite(x), 1)
    factors, valid, ignored = token_loss.examples(factors, valid, ignored, finite)
    if is_empty(labels) or known(lambda: n == 0, False):
        # Without a class no label exists: a loss is NaN, or else 0 by its weight or ignore_index.
        out = nan_unless(factors == 0, jnp.zeros_like(factors))
    else:
        if scale is not None:
            scale = positive(scale.reshape(-1), dtype)
            scale = scale if ignored is None else jnp.where(ignored, 1, scale)
        copied = functools.partial(devices.copied, like=w, mesh=mesh)
        x = x if mesh is None else x.astype(dtype)  # its gradient is added up before it is rounded
        tokens = Tokens(copied(x), axis.places(labels, w), valid, ignored, copied(scale))
        layer = Layer(w, Options(*copied(of_layer)))
        if reduction == "none":
            out = devices.joined(losses(tokens, layer, division, common), mesh)
            out = token_loss.weighted(factors, out)
        else:
            out = weighted_sum(tokens, layer, copied(factors), division, common)
            out = devices.joined(out, mesh)
    out = token_loss.reduced(out, factors, reduction)
    return out.reshape(shape) if reduction == "none" else out
