"""What is timed along an axis: as jaxsoft, jax.nn or optax, and the shortest formula have it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxsoft

Axis = int | tuple[int, ...]
Computation = Callable[[Array, Array, Array, Axis], Any]  # of logits, a cotangent, labels, an axis


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is computed.

    Attributes:
        own: how jaxsoft computes it.
        peer: how jax.nn, optax or the textbook does.
        arrays: how many arrays of the size of the logits it reads and writes at least.
        tuples: whether the peer takes several axes.
        bare: the shortest formula, which loses the digits of what is nearly certain; to tell what
            the others cost.
        soft: whether the second array is one of probabilities.
        few: whether it is measured at fewer sizes.
    """

    own: Computation
    peer: Computation
    arrays: int
    tuples: bool = True
    bare: Computation | None = None
    soft: bool = False
    few: bool = False


def _forward(function: Callable[..., Array]) -> Computation:
    return lambda x, g, labels, axis: function(x, axis)


def _forward_and_vjp(function: Callable[..., Array]) -> Computation:
    def both(x: Array, g: Array, labels: Array, axis: Axis) -> tuple[Array, Array]:
        out, pullback = jax.vjp(lambda x: function(x, axis), x)
        return out, pullback(g)[0]

    return both


def _loss(loss: Callable[..., Array]) -> Computation:
    return lambda x, g, labels, axis: loss(x, labels, axis)


def _with_gradient(loss: Computation) -> Computation:
    def both(x: Array, g: Array, labels: Array, axis: Axis) -> tuple[Array, Array]:
        losses, pullback = jax.vjp(lambda x: loss(x, g, labels, axis), x)
        return losses, pullback(jnp.ones_like(losses))[0]

    return both


def _textbook(p: Array, g: Array, axis: Axis) -> Array:
    return p * (g - jnp.sum(p * g, axis, keepdims=True))


def _product(product: Callable[..., Array]) -> Computation:
    return lambda p, g, labels, axis: product(p, g, axis)


def _bare_softmax_and_vjp(x: Array, g: Array, labels: Array, axis: Axis) -> tuple[Array, Array]:
    p = jax.nn.softmax(x, axis)
    product = _textbook(p.astype(jnp.float32), g.astype(jnp.float32), axis)
    return p, product.astype(x.dtype)


def _bare_loss(x: Array, g: Array, labels: Array, axis: Axis) -> Array:
    return _bare_loss_and_exponentials(x, labels, axis)[0]


def _bare_loss_and_gradient(x: Array, g: Array, labels: Array, axis: Axis) -> tuple[Array, Array]:
    loss, exponentials, total = _bare_loss_and_exponentials(x, labels, axis)
    p = exponentials / total
    return loss, (p - jax.nn.one_hot(labels, x.shape[axis], axis=axis)).astype(x.dtype)


def _bare_loss_and_exponentials(x: Array, labels: Array, axis: Axis) -> tuple[Array, Array, Array]:
    z = x.astype(jnp.float32)
    top = jnp.max(z, axis, keepdims=True)
    exponentials = jnp.exp(z - top)
    total = jnp.sum(exponentials, axis, keepdims=True)
    at_label = jnp.take_along_axis(z, jnp.expand_dims(labels, axis), axis)
    return ((top - at_label) + jnp.log(total)).squeeze(axis), exponentials, total


# ------------------------------------------------- of two arrays: targets, or another row of logits


def _soft_loss(loss: Callable[..., Array]) -> Computation:
    return lambda x, y, labels, axis: loss(x, y)


def _of_both(function: Callable[..., Array]) -> Computation:
    return lambda x, y, labels, axis: (function(x, axis), function(y, axis))


def _peer_entropy(x: Array) -> Array:
    return -jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x), -1)


def _peer_divergence(x: Array, y: Array) -> Array:
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(y), jax.nn.log_softmax(x))


def _pair(
    name: str, own: Computation, peer: Computation, arrays: int, *, soft: bool = False
) -> dict[str, Quantity]:
    """A loss, and with its gradient."""
    gradients = map(_with_gradient, (own, peer))
    return {
        name: Quantity(own, peer, arrays, soft=soft, few=True),
        f"{name} + gradient": Quantity(*gradients, arrays + 1, soft=soft, few=True),
    }


_peer_loss = optax.softmax_cross_entropy_with_integer_labels
_own_loss = jaxsoft.cross_entropy
FROM_P = "VJP from p"

QUANTITIES = {
    "softmax": Quantity(_forward(jaxsoft.softmax), _forward(jax.nn.softmax), 2),
    "log_softmax": Quantity(_forward(jaxsoft.log_softmax), _forward(jax.nn.log_softmax), 2),
    "logsumexp": Quantity(_forward(jaxsoft.logsumexp), _forward(jax.nn.logsumexp), 1),
    "softmax + VJP": Quantity(
        _forward_and_vjp(jaxsoft.softmax),
        _forward_and_vjp(jax.nn.softmax),
        4,
        bare=_bare_softmax_and_vjp,
    ),
    "log_softmax + VJP": Quantity(
        _forward_and_vjp(jaxsoft.log_softmax), _forward_and_vjp(jax.nn.log_softmax), 4
    ),
    FROM_P: Quantity(_product(jaxsoft.softmax_vjp), _product(_textbook), 3),
    "loss": Quantity(_loss(_own_loss), _loss(_peer_loss), 1, tuples=False, bare=_bare_loss),
    "loss + gradient": Quantity(
        _with_gradient(_loss(_own_loss)),
        _with_gradient(_loss(_peer_loss)),
        2,
        tuples=False,
        bare=_bare_loss_and_gradient,
    ),
    **_pair(
        "soft labels",
        _soft_loss(jaxsoft.cross_entropy),
        _soft_loss(optax.softmax_cross_entropy),
        2,
        soft=True,
    ),
    **_pair(
        "entropy",
        lambda x, y, labels, axis: jaxsoft.entropy(x),
        lambda x, y, labels, axis: _peer_entropy(x),
        1,
    ),
    **_pair("KL divergence", _soft_loss(jaxsoft.kl_divergence), _soft_loss(_peer_divergence), 2),
    # What a program has of other sums decides on a CPU how XLA compiles these.
    "two logsumexps": Quantity(
        _of_both(jaxsoft.logsumexp), _of_both(jax.nn.logsumexp), 2, few=True
    ),
}
