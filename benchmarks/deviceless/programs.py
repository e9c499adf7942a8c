"""The programs that are compiled: quantities of jaxsoft beside those of its peers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import jaxsoft
from benchmarks.deviceless.devices import Device
from jaxsoft._demo.timing import QUANTITIES

# rows × classes, tokens × features × classes, or queries of all heads × features × keys
Size = tuple[int, ...]
Softmax = Callable[[Array], Array]

# A function and its arguments, which hold no data.
Program = tuple[Callable[..., Any], tuple[Any, ...]]
Build = Callable[[Device, Size, str], Program]

HEADS = 8  # of attention


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A quantity.

    Attributes:
        name: what is computed.
        peer: what computes it as well.
        own: the program of jaxsoft.
        peers: that of the peer.
    """

    name: str
    peer: str
    own: Build
    peers: Build


def rows_and_classes(size: Size) -> int:
    """The number of logits."""
    return math.prod((size[0], size[-1]))


# ------------------------------------------------------------------------------- of rows of logits


def _of_rows(function: Callable[[Array, Array, Array], Any]) -> Build:
    """The program of a function of logits, or probabilities, a cotangent and labels."""

    def build(device: Device, size: Size, dtype: str) -> Program:
        rows = device.argument(size, dtype)
        return function, (rows, rows, device.argument(size[:1], jnp.int32))

    return build


def _vjp_from_residuals(softmax: Softmax) -> Build:
    """The backward pass alone: what it keeps from the forward pass is an argument."""

    def build(device: Device, size: Size, dtype: str) -> Program:
        rows = device.argument(size, dtype)
        pullback = jax.eval_shape(lambda x: jax.vjp(softmax, x)[1], rows)
        residuals = jax.tree.map(lambda leaf: device.argument(leaf.shape, leaf.dtype), pullback)
        return lambda pullback, g: pullback(g), (residuals, rows)

    return build


def _vjp_from_logits(softmax: Softmax) -> Build:
    """The gradient alone, from the logits: the probabilities are not returned."""
    return _of_rows(lambda x, g, labels: jax.vjp(softmax, x)[1](g))


def _textbook_vjp(p: Array, g: Array) -> Array:
    return p * (g - jnp.sum(p * g, -1, keepdims=True))


def _shared(name: str) -> Comparison:
    """A quantity that `python -m benchmarks` times."""
    quantity = QUANTITIES[name]
    return Comparison(name, quantity.peer, _of_rows(quantity.own), _of_rows(quantity.peers))


# ------------------------------------------------------------------------------- of a linear layer


def _of_layer(loss: Callable[[Array, Array, Array], Array]) -> Build:
    def build(device: Device, size: Size, dtype: str) -> Program:
        tokens, d, n = size
        args = (
            device.argument((tokens, d), dtype),
            device.argument((d, n), dtype),
            device.argument((tokens,), jnp.int32),
        )
        return jax.value_and_grad(loss, argnums=(0, 1)), args

    return build


def _peer_layer_loss(x: Array, w: Array, labels: Array) -> Array:
    logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


# ----------------------------------------------------------------------------------- of attention

Attention = Callable[..., Array]


def _attends(attention: Attention) -> Build:
    """The program of the output."""

    def build(device: Device, size: Size, dtype: str) -> Program:
        return attention, _queries_keys_values(device, size, dtype)

    return build


def _attends_and_differentiates(attention: Attention) -> Build:
    """The program of Σ g ∘ output and its gradient by queries, keys and values."""

    def loss(q: Array, k: Array, v: Array, g: Array) -> Array:
        return jnp.vdot(attention(q, k, v), g, preferred_element_type=jnp.float32)

    def build(device: Device, size: Size, dtype: str) -> Program:
        q, k, v = _queries_keys_values(device, size, dtype)
        return jax.value_and_grad(loss, argnums=(0, 1, 2)), (q, k, v, q)

    return build


def _queries_keys_values(device: Device, size: Size, dtype: str) -> tuple[Any, Any, Any]:
    rows, h, s = size
    q, k = (device.argument((1, n, HEADS, h), dtype) for n in (rows // HEADS, s))
    return q, k, k


def _of_attention(name: str, build: Callable[[Attention], Build]) -> Comparison:
    programs = map(build, (jaxsoft.dot_product_attention, jax.nn.dot_product_attention))
    return Comparison(f"attention of {HEADS} heads{name}", "jax.nn", *programs)


ROWS = (
    _shared("softmax"),
    Comparison(
        "VJP, from what the forward pass keeps",
        "jax.nn",
        _vjp_from_residuals(jaxsoft.softmax),
        _vjp_from_residuals(jax.nn.softmax),
    ),
    Comparison(
        "VJP, from the logits",
        "jax.nn",
        _vjp_from_logits(jaxsoft.softmax),
        _vjp_from_logits(jax.nn.softmax),
    ),
    Comparison(
        "softmax_vjp",
        "p (g - Σpg)",
        _of_rows(lambda p, g, labels: jaxsoft.softmax_vjp(p, g)),
        _of_rows(lambda p, g, labels: _textbook_vjp(p, g)),
    ),
    _shared("softmax + VJP"),
    Comparison(
        "log_softmax",
        "jax.nn",
        _of_rows(lambda x, g, labels: jaxsoft.log_softmax(x)),
        _of_rows(lambda x, g, labels: jax.nn.log_softmax(x)),
    ),
    _shared("cross-entropy"),
    _shared("cross-entropy + gradient"),
)
LAYERS = (
    Comparison(
        "linear_cross_entropy + gradient",
        "optax",
        _of_layer(jaxsoft.linear_cross_entropy),
        _of_layer(_peer_layer_loss),
    ),
)
ATTENTION = (
    _of_attention("", _attends),
    _of_attention(" + gradient", _attends_and_differentiates),
)
