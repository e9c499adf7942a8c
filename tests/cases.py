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
        "alpha": np.linspace(1.4, 1.7, rows)[:, None],
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


def plain_threshold(x, alpha, temperature=1.0, where=None):
    """λ by bisection, and by three steps of Newton's method that carry the derivatives."""
    z = x / temperature
    z = z if where is None else jnp.where(where, z, -jnp.inf)
    a = jnp.broadcast_to(alpha - 1, (*z.shape[:-1], 1)).astype(z.dtype)

    def terms(level):
        y = a * (z - level)
        inside = y > -1
        u = jnp.where(inside, 1 + y, 1)
        p = jnp.where(inside, u ** (1 / a), 0)
        return p, p / u

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        below = terms(middle)[0].sum(-1, keepdims=True) > 1
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    top = jax.lax.stop_gradient(z.max(-1, keepdims=True))
    level, _ = jax.lax.stop_gradient(
        jax.lax.fori_loop(0, 60, halve, (top, top + jnp.log(z.shape[-1])))
    )
    for _ in range(3):
        p, s = terms(level)
        level += (p.sum(-1, keepdims=True) - 1) / s.sum(-1, keepdims=True)
    return terms(level)[0], level[..., 0]


def plain_entmax(x, alpha=1.5, temperature=1.0, where=None):
    return plain_threshold(x, alpha, temperature, where)[0]


def plain_sparsemax(x):
    support = (plain_entmax(x, 2.0) > 0).astype(x.dtype)
    level = ((support * x).sum(-1, keepdims=True) - 1) / support.sum(-1, keepdims=True)
    return support * (x - level)


def plain_entmax_loss(x, labels, alpha=1.5, temperature=1.0, where=None, ignore_index=None):
    """Of class ids; or of target probabilities, all more than 0."""
    p, level = plain_threshold(x, alpha, temperature, where)
    of_row = jnp.broadcast_to(alpha, (*x.shape[:-1], 1))
    power = lambda q: jnp.where(q > 0, jnp.where(q > 0, q, 1) ** of_row, 0).sum(-1)
    if labels.ndim < x.ndim:
        target = jax.nn.one_hot(labels, x.shape[-1], dtype=x.dtype)
    else:
        target = labels if where is None else jnp.where(where, labels, 0)
    gaps = (target * (level[..., None] - x / temperature)).sum(-1)
    alpha, total = of_row[..., 0], target.sum(-1)
    out = gaps - (1 - power(p)) / alpha - (total - power(target)) / (alpha * (alpha - 1))
    out -= (total - 1) / alpha  # as the divergences of all classes add up
    return out if ignore_index is None else jnp.where(labels == ignore_index, 0, out)


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


def of_small(entmax):
    """Logits near each other: most classes are in the support, and none is near its edge."""
    return lambda x, **options: entmax(x / 4, **options)


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

SPARSEMAX = tuple(map(of_small, (jaxsoft.sparsemax, plain_sparsemax)))
ENTMAX = tuple(map(of_small, (jaxsoft.entmax, plain_entmax)))
ENTMAX_LOSS = tuple(map(of_small, (jaxsoft.entmax_loss, plain_entmax_loss)))

SPARSE = {
    "sparsemax": case(*SPARSEMAX, "x"),
    "entmax": case(*ENTMAX, "x"),
    "entmax, options": case(*ENTMAX, "x alpha temperature where"),
    "entmax_loss": case(*ENTMAX_LOSS, "x labels"),
    "entmax_loss, options": case(*ENTMAX_LOSS, "x labels alpha temperature where", ignore_index=-7),
    "entmax_loss, targets": case(*map(of_targets, ENTMAX_LOSS), "x targets", alpha=1.3),
}

OF_LOGITS |= SPARSE

OF_PROBABILITIES = {
    "softmax_jvp": case(jaxsoft.softmax_jvp, plain_product, "p v"),
    "softmax_vjp": case(jaxsoft.softmax_vjp, product_of_cotangent, "p g"),
    "softmax_derivative": case(jaxsoft.softmax_derivative, plain_derivative, "p i j"),
}

CASES = OF_LOGITS | OF_PROBABILITIES
