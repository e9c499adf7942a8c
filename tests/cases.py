"""The functions of logits and of probabilities, each beside a plain one, for the tests of all.

A new function or option is a row of `CASES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoft


class Case(NamedTuple):
    """A function and a plain one that is right in float64, of a dictionary of arrays.

    Of those in `names` some may be missing; more options are given by keyword.
    """

    fun: Callable[..., Any]
    reference: Callable[..., Any]
    names: tuple[str, ...]

    def chosen(self, given: dict[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in self.names if name in given}


def case(fun, reference, names, **options) -> Case:
    first, *others = names.split()

    def of_arrays(fun):
        def call(given, **more):
            named = {name: given[name] for name in others if name in given}
            return fun(given[first], **(named | options | more))

        return call

    return Case(of_arrays(fun), of_arrays(reference), (first, *others))


def arrays(rows: int, n: int) -> dict[str, np.ndarray]:
    """What the functions are given, by name: all of so many rows, or of so many classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(n, size=rows)
    where = rng.uniform(size=(rows, n)) > 0.3
    where[:, 0] = where[np.arange(rows), labels] = True
    return {
        "x": rng.normal(size=(rows, n)) * 2,
        "y": rng.normal(size=(rows, n)) * 2,
        "b": rng.normal(size=(rows, n)),
        "p": rng.dirichlet(np.ones(n), size=rows),
        "v": rng.normal(size=(rows, n)),
        "g": rng.normal(size=(rows, n)),
        "labels": labels,
        "targets": rng.dirichlet(np.ones(n), size=rows),
        "i": labels,
        "j": (labels + np.arange(rows)) % n,  # in the first row the same class
        "where": where,
        "class_weights": rng.uniform(0.5, 2, size=n),
        "temperature": rng.uniform(0.5, 2, size=(rows, 1)),
        "sink": rng.normal(size=(rows, 1)),
        "softcap": np.array(3.0),
    }


# ------------------------------------------------------------------------- as one writes them


def plain_softmax(x, temperature=1.0, sink=None, where=None):
    z = x / temperature
    e = jnp.exp(z) if where is None else jnp.where(where, jnp.exp(z), 0)
    total = e.sum(-1, keepdims=True)
    return e / (total if sink is None else total + jnp.exp(sink))


def plain_log_softmax(x, temperature=1.0, sink=None, where=None):
    p = plain_softmax(x, temperature, sink, where)
    return (
        jnp.log(p) if where is None else jnp.where(where, jnp.log(jnp.where(where, p, 1)), -jnp.inf)
    )


def plain_logsumexp(x, b=1.0, where=True):
    return jnp.log(jnp.abs(jnp.where(where, b * jnp.exp(x), 0).sum(-1)))


def plain_mean(values, x, temperature=1.0, where=None):
    """The mean of the values by the softmax of x; what is masked counts 0."""
    p = plain_softmax(x, temperature, None, where)
    return (p * (values if where is None else jnp.where(where, values, 0))).sum(-1)


def plain_entropy(x, temperature=1.0, where=None):
    return -plain_mean(plain_log_softmax(x, temperature, None, where), x, temperature, where)


def plain_kl_divergence(x, y, where=None):
    log_p, log_q = (plain_log_softmax(logits, 1.0, None, where) for logits in (x, y))
    return plain_mean(log_p, x, 1.0, where) - plain_mean(log_q, x, 1.0, where)


def plain_cross_entropy(
    x,
    labels,
    *,
    where=None,
    class_weights=None,
    temperature=1.0,
    softcap=None,
    label_smoothing=0.0,
    z_loss=0.0,
    ignore_index=None,
):
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    kept = jnp.ones_like(x) if where is None else jnp.where(where, jnp.ones_like(x), 0)
    ids = labels.ndim < x.ndim
    target = jax.nn.one_hot(labels, x.shape[-1], dtype=x.dtype) if ids else labels
    target = (1 - label_smoothing) * target
    target += label_smoothing * kept / kept.sum(-1, keepdims=True)
    if class_weights is not None:
        target *= class_weights[None]
    log_total = jnp.log((kept * jnp.exp(x / temperature)).sum(-1, keepdims=True))
    loss = (target * (log_total - x / temperature)).sum(-1) + z_loss * log_total[..., 0] ** 2
    return loss if ignore_index is None else jnp.where(labels == ignore_index, 0, loss)


def plain_product(p, v):
    return p * (v - (p * v).sum(-1, keepdims=True))


def plain_derivative(p, i, j):
    of_class = lambda k: jnp.take_along_axis(p, k[..., None], -1)[..., 0]
    return of_class(i) * (jnp.where(i == j, 1.0, 0.0) - of_class(j))


# --------------------------------------------------------------------------------- the table


def logsumexp(x, **options):
    return jaxsoft.logsumexp(x, -1, **options)


def log_of_size(x, **options):
    return jaxsoft.logsumexp(x, -1, return_sign=True, **options)[0]


def weighted(logsumexp):
    return lambda x, class_weights, **options: logsumexp(x, b=class_weights[None], **options)


def of_targets(cross_entropy):
    return lambda x, targets, **options: cross_entropy(x, labels=targets, **options)


def product_of_cotangent(p, g):
    return plain_product(p, g)


SOFTMAX = jaxsoft.softmax, plain_softmax
LOG_SOFTMAX = jaxsoft.log_softmax, plain_log_softmax
ENTROPY = jaxsoft.entropy, plain_entropy
CROSS_ENTROPY = jaxsoft.cross_entropy, plain_cross_entropy

OF_LOGITS = {
    "softmax": case(*SOFTMAX, "x"),
    "softmax, a number": case(*SOFTMAX, "x", temperature=0.5),
    "softmax, options": case(*SOFTMAX, "x temperature sink where"),
    "log_softmax": case(*LOG_SOFTMAX, "x"),
    "log_softmax, options": case(*LOG_SOFTMAX, "x temperature sink where"),
    "logsumexp": case(logsumexp, plain_logsumexp, "x"),
    "logsumexp, weights": case(weighted(logsumexp), weighted(plain_logsumexp), "x class_weights"),
    "logsumexp, options": case(log_of_size, plain_logsumexp, "x b where"),
    "entropy": case(*ENTROPY, "x"),
    "entropy, options": case(*ENTROPY, "x temperature where"),
    "kl_divergence": case(jaxsoft.kl_divergence, plain_kl_divergence, "x y"),
    "kl_divergence, options": case(jaxsoft.kl_divergence, plain_kl_divergence, "x y where"),
    "cross_entropy": case(*CROSS_ENTROPY, "x labels"),
    "cross_entropy, options": case(
        *CROSS_ENTROPY,
        "x labels where class_weights temperature softcap",
        label_smoothing=0.1,
        z_loss=0.01,
        ignore_index=-7,
    ),
    "cross_entropy, targets": case(
        *map(of_targets, CROSS_ENTROPY), "x targets", label_smoothing=0.1
    ),
}

OF_PROBABILITIES = {
    "softmax_jvp": case(jaxsoft.softmax_jvp, plain_product, "p v"),
    "softmax_vjp": case(jaxsoft.softmax_vjp, product_of_cotangent, "p g"),
    "softmax_derivative": case(jaxsoft.softmax_derivative, plain_derivative, "p i j"),
}

CASES = OF_LOGITS | OF_PROBABILITIES
