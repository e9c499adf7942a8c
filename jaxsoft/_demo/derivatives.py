"""Every public function in every mode of differentiation, against plain references."""

import concurrent.futures
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import jaxsoft
from jaxsoft import testing
from jaxsoft._demo import Track

_CLASS_COUNT = 4
_LEAD = 9.0  # of one logit: subtraction from 1 in float32 would leave three digits of 1 - p
_TOLERANCE = 16.0  # eps: twice what DESIGN grants a derivative, for Hessians take two
_QUICK_MODES = ("value", "jit(jvp)", "jit(vjp)")
_MODES = (
    "value",
    "jvp",
    "jit(vjp)",
    "vmap(vjp)",
    "vjp(checkpoint)",
    "jacfwd",
    "jacrev",
    "jacfwd(jacfwd)",
    "jacfwd(jacrev)",
    "jacrev(jacfwd)",
    "jacrev(jacrev)",
)
_THREADS = 2  # most of the time goes into compiling, which threads do side by side


@dataclasses.dataclass(frozen=True)
class Case:
    """A public function of one array, and the same function written plainly."""

    name: str
    function: Callable[[Array], Any]
    reference: Callable[[Array], Array]
    argument: Float[Array, "..."]


Pair = tuple[Callable[[Array], Any], Callable[[Array], Array]]  # a function and a plain one


@dataclasses.dataclass(frozen=True)
class Derivatives:
    """The errors of the public functions in every mode of differentiation.

    Attributes:
        modes: names of the modes, as in `jaxsoft.testing.MODES`.
        errors: for each function the largest error in each mode, in eps; infinite for a mode that
            raises.
        tolerance: the largest error allowed.
        failures: what is wrong.
    """

    modes: tuple[str, ...]
    errors: dict[str, dict[str, float]]
    tolerance: float
    failures: tuple[str, ...]


def derivatives(seed: int, *, quick: bool, track: Track) -> Derivatives:
    """Compares values and derivatives with `jax.jacfwd` of the references in float64."""
    modes = _QUICK_MODES if quick else _MODES
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        futures = {case.name: pool.submit(_errors, case, modes) for case in cases(seed)}
        errors = {name: futures[name].result() for name in track(tuple(futures), "derivatives")}
    return Derivatives(
        modes=modes,
        errors=errors,
        tolerance=_TOLERANCE,
        failures=tuple(
            f"{name}, {mode}: "
            + (f"off by {error:.3g} eps" if math.isfinite(error) else "no number, or an exception")
            for name, of_modes in errors.items()
            for mode, error in of_modes.items()
            if not error <= _TOLERANCE
        ),
    )


def _errors(case: Case, modes: Sequence[str]) -> dict[str, float]:
    def errors(modes: Sequence[str]) -> dict[str, float]:
        return testing.assert_derivatives(
            case.function,
            case.argument,
            reference=case.reference,
            modes=modes,
            tolerance=sys.float_info.max,
        )

    try:
        return errors(modes)
    except AssertionError:  # A mode raises or returns no number; which one, and how are the others?
        found: dict[str, float] = {}
        for mode in modes:
            try:
                found |= errors([mode])
            except AssertionError:
                found[mode] = math.inf
        return found


# ---------------------------------------------------------------------------------------- cases


def _plain_softmax(x: Array) -> Array:
    return jnp.exp(x) / jnp.sum(jnp.exp(x))


def _plain_cross_entropy(x: Array, q: Array) -> Array:
    return -jnp.sum(q * jnp.log(_plain_softmax(x)))


def _plain_kl_divergence(x: Array, y: Array) -> Array:
    p = _plain_softmax(x)
    return _plain_cross_entropy(y, p) - _plain_cross_entropy(x, p)


# Of classes that all have a share, the threshold is the root of an equation of degree 1 or 2.
def _plain_sparsemax(x: Array) -> Array:
    return x - (jnp.sum(x) - 1) / x.size


def _plain_entmax(x: Array) -> Array:
    centred = (x - jnp.mean(x)) / 2
    return (centred + jnp.sqrt((1 - jnp.sum(centred**2)) / x.size)) ** 2


def _plain_entmax_loss(x: Array, label: int) -> Array:
    p = _plain_entmax(x)
    return p @ x - x[label] - (jnp.sum(p**1.5) - 1) / 0.75


def cases(seed: int) -> tuple[Case, ...]:
    """The public functions at a row of logits of which one leads, and plain references.

    Two arguments are stacked into one array: one Hessian then stands for four.
    """
    n, label = _CLASS_COUNT, 1
    keys = jax.random.split(jax.random.key(seed), 4)
    x, y = jax.random.uniform(keys[0], (2, n), jnp.float32, 0.5, 2.0)
    x = x.at[label].add(_LEAD)
    near = x / (8 * _LEAD)  # so near to each other that all classes are in the support
    v = jax.random.uniform(keys[1], (n,), jnp.float32, -1.0, 1.0)
    q = _plain_softmax(jax.random.normal(keys[2], (n,), jnp.float32))
    classes = jnp.arange(n)
    mask = classes != 0
    weights = jnp.asarray([1.0, 0.5, 2.0, 1.0], jnp.float32)

    def jacobian_by_entries(x: Array) -> Array:
        p = jnp.broadcast_to(jaxsoft.softmax(x), (n, n, n))
        return jaxsoft.softmax_derivative(p, classes[:, None], classes[None, :])

    def loss_with_options(x: Array) -> Array:
        return jaxsoft.cross_entropy(
            x, label, where=mask, label_smoothing=0.125, z_loss=0.0625, class_weights=weights
        )

    def plain_loss_with_options(x: Array) -> Array:
        log_partition = jnp.log(jnp.sum(jnp.where(mask, jnp.exp(x), 0)))
        target = jnp.where(classes == label, 0.875, 0) + jnp.where(mask, 0.125 / (n - 1), 0)
        weighted = weights.astype(x.dtype) * target
        return jnp.sum(weighted * (log_partition - x)) + 0.0625 * log_partition**2

    identity = jnp.eye(n, dtype=x.dtype)
    layer = jnp.concatenate([x[None], identity])

    def statistics(xw: Array) -> Array:
        found = jaxsoft.linear_log_probs(xw[0], xw[1:], label, vocab_chunk=n // 2)
        return jnp.stack(found[:3])

    def plain_statistics(xw: Array) -> Array:
        z = xw[0] @ xw[1:]
        p = _plain_softmax(z)
        entropy = _plain_cross_entropy(z, p)
        return jnp.stack([jnp.log(p[label]), entropy, jnp.log(jnp.sum(jnp.exp(z)))])

    def of_segments(function: Callable[..., Array], of_row: Callable[[Array], Array]) -> Pair:
        """A function of segments, here the first two classes and the others, and a plain one."""
        ids = (classes >= 2).astype(int)
        plain = lambda x: jnp.concatenate([of_row(x[:2]), of_row(x[2:])])
        return lambda x: function(x, ids, 2), plain

    def attention(xv: Array) -> Array:
        k, v = (row[:, None, None] for row in xv)
        query = jnp.ones_like(k[:1])
        out = jaxsoft.dot_product_attention(query, k, v, scale=1.0, key_chunk=n // 2)
        return jnp.sum(out)

    return (
        Case("softmax", jaxsoft.softmax, _plain_softmax, x),
        Case("log_softmax", jaxsoft.log_softmax, lambda x: jnp.log(_plain_softmax(x)), x),
        Case("logsumexp", jaxsoft.logsumexp, lambda x: jnp.log(jnp.sum(jnp.exp(x))), x),
        Case("entropy", jaxsoft.entropy, lambda x: _plain_cross_entropy(x, _plain_softmax(x)), x),
        Case(
            "kl_divergence",
            lambda xy: jaxsoft.kl_divergence(xy[0], xy[1]),
            lambda xy: _plain_kl_divergence(xy[0], xy[1]),
            jnp.stack([x, y]),
        ),
        Case("sparsemax", jaxsoft.sparsemax, _plain_sparsemax, near),
        Case("entmax", jaxsoft.entmax, _plain_entmax, near),
        Case(
            "entmax_jacobian",
            lambda xv: jaxsoft.entmax_jacobian(xv[0]).mv(xv[1]),
            lambda xv: jax.jvp(_plain_entmax, (xv[0],), (xv[1],))[1],
            jnp.stack([near, v]),
        ),
        Case(
            "entmax_loss",
            lambda x: jaxsoft.entmax_loss(x, label),
            lambda x: _plain_entmax_loss(x, label),
            near,
        ),
        Case("segment_softmax", *of_segments(jaxsoft.segment_softmax, _plain_softmax), argument=x),
        Case(
            "segment_log_softmax",
            *of_segments(jaxsoft.segment_log_softmax, lambda x: jnp.log(_plain_softmax(x))),
            argument=x,
        ),
        Case(
            "segment_logsumexp",
            *of_segments(jaxsoft.segment_logsumexp, lambda x: jnp.log(jnp.sum(jnp.exp(x)))[None]),
            argument=x,
        ),
        Case(
            "softmax_jvp",
            lambda xv: jaxsoft.softmax_jvp(jaxsoft.softmax(xv[0]), xv[1]),
            lambda xv: jax.jvp(_plain_softmax, (xv[0],), (xv[1],))[1],
            jnp.stack([x, v]),
        ),
        Case(
            "softmax_vjp",
            lambda xg: jaxsoft.softmax_vjp(jaxsoft.softmax(xg[0]), xg[1]),
            lambda xg: jax.vjp(_plain_softmax, xg[0])[1](xg[1])[0],
            jnp.stack([x, v]),
        ),
        Case(
            "softmax_jacobian",
            lambda xv: jaxsoft.softmax_jacobian(xv[0]).mv(xv[1]),
            lambda xv: jax.jvp(_plain_softmax, (xv[0],), (xv[1],))[1],
            jnp.stack([x, v]),
        ),
        Case("softmax_derivative", jacobian_by_entries, jax.jacfwd(_plain_softmax), x),
        Case(
            "cross_entropy",
            lambda x: jaxsoft.cross_entropy(x, label),
            lambda x: -jnp.log(_plain_softmax(x)[label]),
            x,
        ),
        Case(
            "cross_entropy, soft labels",
            lambda xq: jaxsoft.cross_entropy(xq[0], xq[1]),
            lambda xq: _plain_cross_entropy(xq[0], xq[1]),
            jnp.stack([x, q]),
        ),
        Case("cross_entropy, options", loss_with_options, plain_loss_with_options, x),
        Case(
            "linear_cross_entropy",
            lambda xw: jaxsoft.linear_cross_entropy(xw[0], xw[1:], label, vocab_chunk=n // 2),
            lambda xw: -jnp.log(_plain_softmax(xw[0] @ xw[1:])[label]),
            layer,
        ),
        Case("linear_log_probs", statistics, plain_statistics, layer),
        Case(
            "linear_kl_divergence",
            lambda yw: jaxsoft.linear_kl_divergence(yw[0], yw[1:], x, identity, vocab_chunk=n // 2),
            lambda yw: _plain_kl_divergence(x.astype(yw.dtype), yw[0] @ yw[1:]),
            jnp.concatenate([y[None], identity]),
        ),
        Case(
            "dot_product_attention",
            attention,
            lambda xv: _plain_softmax(xv[0]) @ xv[1],
            jnp.stack([x, v]),
        ),
    )
