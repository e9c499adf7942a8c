"""linear_log_probs: log-probabilities and entropy of a linear layer, without its logits."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

from jaxsoft._core import class_ids, options, programs, validation
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.sizes import known
from jaxsoft._functions import token_loss
from jaxsoft._linear.loops import Division, divided
from jaxsoft._linear.models import Model, checked, prepared
from jaxsoft._linear.operands import Tokens
from jaxsoft._linear.rules import found_of
from jaxsoft._linear.token_statistics import LogProbs, TokenStatistics, token_statistics
from jaxsoft._rows.logits import nan_unless


def linear_log_probs(
    x: Shaped[ArrayLike, "..."],
    w: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    *,
    bias: Shaped[ArrayLike, "..."] | None = None,
    ignore_index: int | None = None,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    softcap: Shaped[ArrayLike, ""] | None = None,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    axis_name: validation.AxisName = None,
) -> TokenStatistics:
    r"""Log-probabilities, entropy and argmax of softmax(x w + bias), without holding the logits.

        log_probs = z_y - log_partition           entropy = -Σ_j p_j log p_j
        log_partition = log Σ_j exp(z_j)          argmax = argmax_j z_j
        z = c tanh((x w + bias) / c) / T          p = softmax(z)
        ∂log_probs/∂z = e_y - p          ∂entropy/∂z = -p ∘ (log p + entropy)

    What policy gradients (PPO, GRPO), preference losses (DPO) and monitoring need of a language
    model, in one product of matrices. The logits are made in chunks and made again for the
    gradient; between the passes stay the arguments and a few numbers of each token. All results but
    `argmax` are differentiable, in every mode and to any order, and those that are not used are not
    computed under `jax.jit`.

    Args:
        x: features, shape [..., d].
        w: weight of the layer, shape [d, n].
        labels: class ids, an integer array of shape [...], or [..., K] for K classes of each token
            (the candidates of a teacher, say). K may be 0.
        bias: shape [n]. An entry of -inf takes a class out.
        ignore_index: a label without a log-probability. There is no default: -100, which others
            ignore unasked, is a label that does not exist.
        temperature: T > 0, a number or one value for each token, broadcastable to [..., 1].
        softcap: c > 0; finite logits are replaced by c tanh(logits / c), before the temperature.
        token_chunk: how many tokens are taken at a time, at most; as in `linear_cross_entropy`.
        vocab_chunk: how many classes are taken at a time, at most. Default: about 2048 on a CPU,
            elsewhere all.
        axis_name: mesh axes over which the classes go on; as in `linear_cross_entropy`.

    Returns:
        `TokenStatistics`, a named tuple of log_probs, of the shape of `labels`; entropy and
        log_partition, shape [...], all in nats and float32 or wider; and argmax, integers of shape
        [...], the first of several classes.

    Raises:
        TypeError: an argument is complex or not an array, `labels` are not integers, a chunk is no
            integer.
        ValueError: an argument has the wrong shape or is out of its range; a label that is a number
            is outside [0, n) and not ignored.

    Numerics:
        As in `linear_cross_entropy`: a log-probability near 0 and a small entropy keep their
        digits, and so do their gradients. The log-probability of an ignored label is 0, that of a
        label outside [0, n) NaN, that of a class taken out -inf; other results do not depend on
        labels. A token all of whose labels are ignored has no influence if its x is not finite: its
        results are 0. Without any class entropy is 0 and log_partition -inf.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> x, w = jnp.eye(2, 3), 20.0 * jnp.eye(3, 5)
        >>> found = jaxsoft.linear_log_probs(x, w, jnp.array([0, 2]))
        >>> print(*(f"{log_prob:.4g}" for log_prob in found.log_probs))
        -8.245e-09 -20
        >>> print(*(f"{entropy:.4g}" for entropy in found.entropy), found.argmax)
        1.731e-07 1.731e-07 [0 1]

    A step of GRPO with what the same pass tells, from the log-probabilities under the old policy
    and under a reference; and the log-probability of a sequence and its perplexity:

        >>> def grpo(w, x, labels, old, reference, advantage, mask):
        ...     new = jaxsoft.linear_log_probs(x, w, labels)
        ...     ratio = jnp.exp(new.log_probs - old)
        ...     clipped = jnp.clip(ratio, 0.8, 1.2)
        ...     d = reference - new.log_probs  # k3 of KL(new ‖ reference): expm1(d) - d
        ...     gain = jnp.minimum(ratio * advantage, clipped * advantage)
        ...     mean = lambda a: jnp.mean(a, where=mask)
        ...     loss = mean(0.04 * (jnp.expm1(d) - d) - gain)
        ...     return loss, {"entropy": mean(new.entropy), "ratio": mean(ratio)}
        >>> old = found.log_probs
        >>> labels, mask = jnp.array([0, 2]), jnp.array([True, True])
        >>> step = jax.value_and_grad(grpo, has_aux=True)
        >>> (loss, logged), gradient = step(w, x, labels, old, old, jnp.array([1.0, -1.0]), mask)
        >>> print(loss, logged["ratio"])
        0.0 1.0
        >>> print(jnp.sum(old, where=mask), jnp.exp(-jnp.mean(old, where=mask)))
        -20.0 22026.465

    Source: Schulman 2020, "Approximating KL divergence", for k3; Shao et al. 2024, arXiv
    2402.03300, for GRPO.
    """
    name = "linear_log_probs"
    model = checked(name, x, w, bias, softcap)
    shape, n = model.x.shape[:-1], model.w.shape[1]
    given = labels
    of = "x without its last axis; one axis more for several labels of a token"
    labels, ignored = class_ids.ids_or_several(name, "labels", labels, shape, of, ignore_index)
    scale = options.temperature(name, temperature, (*shape, n), (len(shape),))
    alike = {"labels": labels, "temperature": scale}
    mesh = validation.mesh(name, axis_name, x=model.x, softcap=model.softcap, **alike)
    class_ids.in_range(name, "labels", given, n * (mesh.size if mesh else 1), ignore_index)
    division = divided(name, model.w, token_chunk, vocab_chunk, mesh, once=False)
    several = labels.ndim > len(shape)
    static = {"ignore_index": ignored, "division": division, "several": several}
    return TokenStatistics(*_linear_log_probs((model,), **alike, **static))


def _places(ndim: int, *, several: bool, **_: Any) -> Any:
    of_tokens = programs.of_last(ndim)
    return ((*of_tokens, None) if several else of_tokens, *(of_tokens,) * 3)


@programs.program(static=("ignore_index", "division", "several"), places=_places)
def _linear_log_probs(
    models: tuple[Model, ...],
    *,
    labels: Array,
    temperature: Array | None,
    ignore_index: int | None,
    division: Division,
    several: bool,
) -> tuple[Array, ...]:
    mesh, axis = division.mesh, ClassAxis(1, division.mesh)
    x, layer, others, dtype = prepared(models, labels, temperature, mesh=mesh)
    labels, temperature = others
    of_labels, of_tokens = labels.shape, models[0].x.shape[:-1]
    count, n = math.prod(of_tokens), axis.count(layer.w[0])
    labels = labels.reshape(count, of_labels[-1] if several else 1)
    valid, ignored = token_loss.labelled(labels, n, ignore_index, mesh)
    absent = None
    if ignored is not None:
        valid = valid | ignored
        if known(lambda: labels.shape[1] > 0, True):
            absent = jnp.all(ignored, 1) & ~jnp.all(jnp.isfinite(x[0]), 1)
    if known(lambda: count == 0 or n == 0, False):
        none = jnp.zeros(count, dtype)
        log_probs = nan_unless(valid, jnp.zeros(labels.shape, dtype))
        statistics = TokenStatistics(
            log_probs, none, none - jnp.inf, jnp.zeros(count, labels.dtype)
        )
    else:
        tokens = Tokens(x, axis.places(labels, layer.w[0]), valid, absent)
        tokens = tokens.with_temperature(temperature)
        found = found_of(LogProbs(), tokens, layer, division)
        statistics = token_statistics(found, tokens)
    log_probs, *of_token = statistics
    if ignored is not None:
        log_probs = jnp.where(ignored, 0, log_probs)
    if absent is not None:
        of_token = [jnp.where(absent, 0, a) for a in of_token]
    return log_probs.reshape(of_labels), *(a.reshape(of_tokens) for a in of_token)
