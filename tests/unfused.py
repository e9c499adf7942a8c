"""linear_cross_entropy and what it should be: the loss with the logits, written out in float64."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoft

IGNORED = -100
LIMIT = 2  # eps of what `magnitudes` returns; the largest error found is 1.03
# Arguments besides x and w; "ignored" stands for labels that are.
OPTIONS = ("bias", "weights", "class_weights", "label_smoothing", "z_loss", "temperature")
ALL = (*OPTIONS, "softcap", "ignored")


def problem(size, names, dtype):
    """The arguments named, x and w; the labels; and a cotangent for each token."""
    tokens, d, n = size
    rng = np.random.default_rng(n)
    options = {
        "bias": rng.normal(size=n),
        "weights": rng.uniform(0.5, 2, size=tokens),
        "class_weights": rng.uniform(0.5, 2, size=n),
        "label_smoothing": np.array(0.1),
        "z_loss": np.array(0.01),
        "temperature": rng.uniform(0.5, 2, size=(tokens, 1)),
        "softcap": np.array(5.0),
    }
    arguments = {"x": 3 * rng.normal(size=(tokens, d)), "w": rng.normal(size=(d, n)) / d**0.5}
    arguments |= {name: options[name] for name in names if name != "ignored"}
    labels = rng.integers(n, size=tokens)
    if "ignored" in names:
        labels[1::5] = IGNORED
    cotangent = rng.normal(size=tokens)
    return {k: v.astype(dtype) for k, v in arguments.items()}, labels, cotangent.astype(dtype)


@functools.cache
def fused(reduction, token_chunk=None, vocab_chunk=None, ignore_index=IGNORED):
    """Σ cotangent · out, its gradients by all arguments, and the result itself."""

    def total(arguments, labels, cotangent):
        out = jaxsoft.linear_cross_entropy(
            **arguments,
            labels=labels,
            ignore_index=ignore_index,
            reduction=reduction,
            token_chunk=token_chunk,
            vocab_chunk=vocab_chunk,
        )
        return jnp.sum(cotangent * out), out

    return jax.jit(jax.grad(total, has_aux=True))


def plain_losses(a, labels):
    u = a.x @ a.w + a.bias[None]
    capped = a.softcap < np.inf
    c = jnp.where(capped, a.softcap, 1)
    z = jnp.where(capped, c * jnp.tanh(u / c), u) / a.temperature
    top = z.max(1)
    log_total = top + jnp.log(jnp.exp(z - top[:, None]).sum(1))
    losses = log_total[:, None] - z
    hot = labels[:, None] == jnp.arange(z.shape[1])[None]
    even = (a.class_weights[None] * losses).mean(1)
    own = jnp.where(hot, a.class_weights[None] * losses, 0).sum(1)
    loss = (1 - a.label_smoothing) * own + a.label_smoothing * even + a.z_loss * log_total**2
    return jnp.where(labels == IGNORED, 0, a.weights * loss)


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def plain(arguments, labels, cotangent, is_mean):
    """Σ cotangent_i loss_i, for the mean divided by the total weight; one program for a size."""
    a = SimpleNamespace(**arguments)
    losses = plain_losses(a, labels)
    total = jnp.where(is_mean, jnp.where(labels == IGNORED, 0, a.weights).sum(), 1)
    return (cotangent * losses).sum() / total, losses / total


def filled(arguments):
    """In float64, with numbers that change nothing for what is not there."""
    tokens, n = arguments["x"].shape[0], arguments["w"].shape[1]
    neutral = {
        "bias": np.zeros(n),
        "weights": np.ones(tokens),
        "class_weights": np.ones(n),
        "label_smoothing": np.zeros(()),
        "z_loss": np.zeros(()),
        "temperature": np.ones((tokens, 1)),
        "softcap": np.array(np.inf),
    }
    return neutral | {name: np.asarray(v, np.float64) for name, v in arguments.items()}


def magnitudes(wide, labels, cotangent, reduction, logits=True):
    """What the rounding errors of the result and of each gradient are multiples of.

    A logit of size up to S, the sum of |x||w|, is rounded by so many eps of S, and an exponential
    of it by 1 + S relative to itself; the terms of the gradient by the logits, p and y, add up
    without a sign. Without `logits`, what comes of a rounding of these terms alone.
    """
    a = SimpleNamespace(**wide)
    s = (np.abs(a.x) @ np.abs(a.w) + np.abs(a.bias)).max(1) / a.temperature[:, 0]
    s = s if logits else 0 * s
    u = a.x @ a.w + a.bias
    z = (u if np.isinf(a.softcap) else a.softcap * np.tanh(u / a.softcap)) / a.temperature
    log_total = np.log(np.exp(z).sum(1))
    p, n = np.exp(z - log_total[:, None]), z.shape[1]
    alpha = a.label_smoothing
    y = a.class_weights * ((1 - alpha) * (labels[:, None] == np.arange(n)) + alpha / n)
    mass = y.sum(1) + 2 * a.z_loss * np.abs(log_total)
    loss = (1 + s + np.log(n)) * mass + a.z_loss * log_total**2
    by_token = (1 + s) * np.abs(cotangent) * (labels != IGNORED)
    out = (loss * a.weights) * (labels != IGNORED)
    by_weight = np.abs(cotangent) * loss * (labels != IGNORED)
    if reduction != "none":
        out = out.sum()
    if reduction == "mean":
        total = (a.weights * (labels != IGNORED)).sum()
        by_token, out = by_token / total, out / total
        by_weight = (by_weight + np.abs(cotangent) * out) / total
    f = by_token * a.weights
    g = f[:, None] * (mass[:, None] * p + y) / a.temperature
    by_loss = f * (1 + np.log(n))
    return out, {
        "x": g @ np.abs(a.w).T,
        "w": np.abs(a.x).T @ g,
        "bias": g.sum(0),
        "weights": by_weight,
        "class_weights": by_loss @ (labels[:, None] == np.arange(n)) + alpha * by_loss.mean(),
        "label_smoothing": (by_loss * (y.sum(1) + a.class_weights.max())).sum(),
        "z_loss": (f * (log_total**2 + 2 * np.abs(log_total))).sum(),
        "temperature": (g.sum(1) * s)[:, None],
        "softcap": g.sum(),
    }
