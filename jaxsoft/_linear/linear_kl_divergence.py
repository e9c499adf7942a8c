"""linear_kl_divergence: the divergence of two linear layers, without their logits."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import devices, options, programs, validation
from jaxsoft._core.sizes import known
from jaxsoft._functions import token_loss
from jaxsoft._functions.token_loss import Reduction
from jaxsoft._linear.divergences import Divergences
from jaxsoft._linear.loops import Division, divided
from jaxsoft._linear.models import Model, checked, prepared
from jaxsoft._linear.operands import Tokens
from jaxsoft._linear.rules import weighted_losses


def linear_kl_divergence(
    x: Shaped[ArrayLike, "..."],
    w: Shaped[ArrayLike, "..."],
    teacher_x: Shaped[ArrayLike, "..."],
    teacher_w: Shaped[ArrayLike, "..."],
    *,
    bias: Shaped[ArrayLike, "..."] | None = None,
    teacher_bias: Shaped[ArrayLike, "..."] | None = None,
    weights: Shaped[ArrayLike, "..."] | None = None,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    softcap: Shaped[ArrayLike, ""] | None = None,
    teacher_softcap: Shaped[ArrayLike, ""] | None = None,
    reverse: bool = False,
    reduction: Reduction = "mean",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    axis_name: validation.AxisName = None,
) -> Float[Array, "..."]:
    r"""The divergence of a student's softmax(x w) from its teacher's, without any logits.

        KL_i = KL(p_i ‖ q_i)          p_i = softmax(teacher_x_i teacher_w), q_i = softmax(x_i w)
        mean: Σ_i weights_i KL_i / Σ_i weights_i          sum: Σ_i weights_i KL_i
        ∂KL_i/∂(x_i w) = (q_i - p_i) / T

    As `kl_divergence` of the logits of both, for distillation: near zero, where the student agrees
    with its teacher, the divergence and its gradient keep their digits. Both logits are made in
    chunks, and made again for the gradient; between the passes stay the arguments and a few numbers
    of each token. Differentiable by all of them, in every mode and to any order; what is not
    differentiated, as the teacher usually, costs nothing.

    Args:
        x: features of the student, shape [..., d].
        w: weight of its layer, shape [d, n].
        teacher_x: features of the teacher, shape [..., e], of the same tokens.
        teacher_w: weight of its layer, shape [e, n]: the same classes.
        bias: of the student, shape [n]. An entry of -inf takes a class out of it.
        teacher_bias: of the teacher, likewise.
        weights: of the tokens, 0 or more, broadcastable to [...]; 0 for padding.
        temperature: T > 0 of both, a number or one value for each token, broadcastable to
            [..., 1]. The divergence is not multiplied by T².
        softcap: c > 0 of the student; finite logits are replaced by c tanh(logits / c), before the
            temperature.
        teacher_softcap: of the teacher, likewise.
        reverse: KL(q ‖ p), of the teacher from the student, in place of KL(p ‖ q).
        reduction: "mean", which is 0 when the weights add up to 0; "sum"; or "none" for a
            divergence for each token, times its weight.
        token_chunk: how many tokens are taken at a time, at most; as in `linear_cross_entropy`.
        vocab_chunk: how many classes are taken at a time, at most, so that no more than
            token_chunk × vocab_chunk logits of each model are held, and made once more. Default:
            the forward pass holds the logits of a chunk of tokens for all classes.
        axis_name: mesh axes over which the classes of both go on; as in `linear_cross_entropy`.

    Returns:
        The divergence in nats: a scalar, or an array of shape [...] for "none", in float32 or
        wider.

    Raises:
        TypeError: an argument is complex or not an array, `reverse` is not boolean, a chunk is no
            integer.
        ValueError: an argument has the wrong shape or is out of its range; the vocabularies have
            other sizes; `reduction` is unknown.

    Numerics:
        As in `kl_divergence`: a class that the second distribution alone lacks makes the divergence
        infinite, one that the first alone lacks counts. A token without a class of the first has
        divergence 0. A token of weight 0 counts for nothing even if its features are not finite.
        The rounding of second derivatives is that of probabilities, 1 eps of the largest entry:
        for a confident student small entries have no digits (in `kl_divergence` they have all).

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> x, w = jnp.eye(2, 3), 20.0 * jnp.eye(3, 5)
        >>> print(f"{jaxsoft.linear_kl_divergence(x, 1.01 * w, x, w):.4g}")
        1.544e-10
        >>> by_student = jax.grad(jaxsoft.linear_kl_divergence, (0, 1))(x, 1.01 * w, x, w)
        >>> print([gradient.shape for gradient in by_student])
        [(2, 3), (3, 5)]

    Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531, for distillation.
    """
    name = "linear_kl_divergence"
    student = checked(name, x, w, bias, softcap)
    teacher = checked(name, teacher_x, teacher_w, teacher_bias, teacher_softcap, prefix="teacher_")
    shape, n = student.x.shape[:-1], student.w.shape[1]
    of_tokens = (*shape, teacher.x.shape[-1])
    validation.same_shape(name, "teacher_x", teacher.x, of_tokens, "the tokens of x")
    of_classes = (teacher.w.shape[0], n)
    validation.same_shape(name, "teacher_w", teacher.w, of_classes, "the classes of w")
    token_loss.check_reduction(name, reduction)
    if weights is not None:
        weights = options.non_negative(name, "weights", weights, shape, "x without its last axis")
    alike = {
        "weights": weights,
        "temperature": options.temperature(name, temperature, (*shape, n), (len(shape),)),
    }
    of_models = {
        "x": student.x,
        "teacher_x": teacher.x,
        "softcap": student.softcap,
        "teacher_softcap": teacher.softcap,
    }
    mesh = validation.mesh(name, axis_name, **of_models, **alike)
    division = divided(name, student.w, token_chunk, vocab_chunk, mesh, once=True)
    models = teacher, student
    models = models[::-1] if validation.flag(name, "reverse", reverse) else models
    return _linear_kl_divergence(models, **alike, reduction=reduction, division=division)


def _places(ndim: int, *, reduction: Reduction, division: Division) -> programs.Places:
    return programs.of_last(ndim) if reduction == "none" else ()


@programs.program(static=("reduction", "division"), places=_places)
def _linear_kl_divergence(
    models: tuple[Model, ...],
    *,
    weights: Array | None,
    temperature: Array | None,
    reduction: Reduction,
    division: Division,
) -> Array:
    mesh, shape = division.mesh, models[0].x.shape[:-1]
    x, layer, others, dtype = prepared(models, weights, temperature, mesh=mesh)
    weights, temperature = others
    count, n = math.prod(shape), layer.w[0].shape[1]
    factors, ignored = devices.typed(jnp.ones(count, dtype), x[0]), None
    if weights is not None:
        finite = jnp.all(jnp.isfinite(x[0]), 1) & jnp.all(jnp.isfinite(x[1]), 1)
        exists = jnp.ones(count, bool)
        factors, _, ignored = token_loss.examples(weights.reshape(-1), exists, None, finite)
    if known(lambda: count == 0 or n == 0, False):
        out = jnp.zeros_like(factors)
    else:
        tokens = Tokens(x, None, None, ignored).with_temperature(temperature)
        out, _ = weighted_losses(factors, reduction, Divergences(), tokens, layer, division)
    out = token_loss.reduced(out, factors, reduction)
    return out.reshape(shape) if reduction == "none" else out
