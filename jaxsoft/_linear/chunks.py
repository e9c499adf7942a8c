"""A linear layer and its cross-entropy in chunks of tokens and classes, and the gradients of both.

A chunk of tokens goes through the chunks of classes once for its statistics and, for the gradients,
once more. JAX differentiates it as it stands: reverse mode makes every chunk again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsoft._core import devices
from jaxsoft._core.devices import Mesh
from jaxsoft._core.sizes import known
from jaxsoft._linear import online
from jaxsoft._linear.online import Classes, Layer, Options, Statistics, Sums, Tokens
from jaxsoft._rows.logits import compute_dtype, product_dtype


# An argument of rules that is no tree: JAX_CUSTOM_VJP3 would wrap its leaves.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Division:
    """How the tokens and the classes are divided.

    Attributes:
        tokens: how many tokens make a chunk, at most.
        classes: how many classes make a chunk, at most.
        keep: whether the gradients keep the logits of a chunk of tokens for all classes, rather
            than making them twice.
        mesh: the axes of a mesh over which the classes go on.
    """

    tokens: int
    classes: int
    keep: bool
    mesh: Mesh | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Live:
    """Which arguments a gradient is wanted for."""

    x: bool
    temperature: bool | None
    w: bool
    options: Options


class Gradients(NamedTuple):
    """Gradients in the compute dtype; None for those not wanted."""

    x: Float[Array, "t d"] | None
    temperature: Float[Array, " t"] | None
    w: Float[Array, "d n"] | None
    options: Options


# ------------------------------------------------------------------------------------ the loss


def statistics(tokens: Tokens, layer: Layer, division: Division) -> Statistics:
    """What `online.loss` needs, in one product of matrices."""

    def of_chunk(_: None, tokens: Tokens, *__: Any) -> tuple[None, Statistics]:
        return None, _statistics(tokens, layer, division, keep=False)[0]

    return _over_tokens(of_chunk, None, tokens, division)[1]


def _statistics(
    tokens: Tokens, layer: Layer, division: Division, *, keep: bool
) -> tuple[Statistics, Array | None]:
    """With the products x w of every chunk of classes, if they are to be kept."""

    def step(so_far: Statistics, classes: Classes, _: None) -> tuple[Statistics, Array | None]:
        products = _products(tokens.x, classes.layer.w)
        so_far = online.extended(so_far, products, tokens, classes)
        return so_far, products if keep else None

    nothing = online.nothing(tokens, layer)
    here, kept = _over_classes(step, nothing, None, tokens, layer, division)
    return online.of_devices(here, tokens, division.mesh), kept


def _products(x: Array, w: Array) -> Array:
    """x w of the dtype of w, accumulated in the compute dtype."""
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=compute_dtype(w.dtype))


# ------------------------------------------------------------------------------- its gradients


def gradients(
    tokens: Tokens,
    layer: Layer,
    cotangent: Float[Array, " t"],
    live: Live,
    division: Division,
    given: Statistics | None = None,
) -> tuple[Float[Array, " t"], Gradients]:
    """The loss of each token, and the gradients of Σ_i cotangent_i loss_i.

    If the classes lie on several devices, each device has the gradients by its own columns, and a
    part of every other gradient, to be added to the parts of the others. The gradients of x and of
    w each take one product of matrices more than the loss. With `division.keep` the logits are made
    once; without it twice, or once if the statistics are given.
    """
    zeros = functools.partial(_zeros, tokens.x)
    options = jax.tree.map(zeros, live.options, layer.options)
    start = Gradients(None, None, zeros(live.w, layer.w), options)
    of_chunk = functools.partial(_chunk_gradients, layer, live, division)
    sums, of_tokens = _over_tokens(of_chunk, start, tokens, division, cotangent, given)
    out, x_bar, temperature_bar = of_tokens
    return out, sums._replace(x=x_bar, temperature=temperature_bar)


def _zeros(like: Array, wanted: bool | None, leaf: Array | None) -> Array | None:
    """A gradient to add to, if it is wanted; it differs between devices as `like` does."""
    if not wanted or leaf is None:
        return None
    return devices.typed(jnp.zeros(leaf.shape, compute_dtype(leaf.dtype)), like)


def _chunk_gradients(
    layer: Layer,
    live: Live,
    division: Division,
    so_far: Gradients,
    tokens: Tokens,
    cotangent: Array,
    given: Statistics | None,
) -> tuple[Gradients, tuple[Array, Array | None, Array | None]]:
    """Adds to the gradients of the layer, and returns the losses and gradients of a chunk."""
    kept = None
    if given is None:
        given, kept = _statistics(tokens, layer, division, keep=division.keep)
    top = given.top

    def loss_of(sums: Sums, temperature: Array | None, options: Options) -> Array:
        of_tokens, of_layer = tokens._replace(temperature=temperature), Layer(layer.w, options)
        return online.loss(Statistics(top, sums), of_tokens, of_layer, division.mesh)

    out, pullback = jax.vjp(loss_of, given.sums, tokens.temperature, layer.options)
    sums_bar, *bars = pullback(cotangent)
    temperature_bar, options_bar = devices.shares(bars, tokens.x, division.mesh)

    def step(so_far: Gradients, classes: Classes, kept: Array | None) -> tuple[Gradients, None]:
        w, options = classes.layer

        def sums_of(products: Array, temperature: Array | None, options: Options) -> Sums:
            part = classes._replace(layer=Layer(w, options))
            of_tokens = tokens._replace(temperature=temperature)
            return online.sums(online.capped(products, part), top, of_tokens, part)

        products = _products(tokens.x, w) if kept is None else kept
        _, pullback = jax.vjp(sums_of, products, tokens.temperature, options)
        products_bar, temperature_bar, options_bar = pullback(sums_bar)
        factor = product_dtype(w.dtype)  # p - y is formed in the compute dtype
        products_bar = products_bar.astype(factor)
        x_bar = None if so_far.x is None else _products(products_bar, w.T.astype(factor))
        w_bar = None if so_far.w is None else _products(tokens.x.T.astype(factor), products_bar)
        part = Gradients(x_bar, temperature_bar, w_bar, options_bar)
        return _added(so_far, part, classes.start), None

    zeros = functools.partial(_zeros, tokens.x)
    of_tokens = zeros(live.x, tokens.x), zeros(live.temperature, tokens.temperature)
    so_far = Gradients(*of_tokens, so_far.w, so_far.options)
    so_far = _added(so_far, Gradients(None, temperature_bar, None, options_bar), 0)
    sums, _ = _over_classes(step, so_far, kept, tokens, layer, division)
    return sums._replace(x=None, temperature=None), (out, sums.x, sums.temperature)


def _added(total: Gradients, part: Gradients, start: Array | int) -> Gradients:
    """Adds what comes from a chunk of classes that begins at `start` to the gradients wanted."""

    def added(total: Array | None, part: Array | None) -> Array | None:
        if total is None or part is None:
            return total
        if total.shape == part.shape:
            return total + part
        here = lax.dynamic_slice_in_dim(total, start, part.shape[-1], -1)
        return lax.dynamic_update_slice_in_dim(total, here + part, start, -1)

    return jax.tree.map(added, total, part, is_leaf=lambda leaf: leaf is None)


# ----------------------------------------------------------------------------------- the loops


# Chunks of one loop have one size, and together little more than there is: the last chunk of
# classes begins earlier if the size does not divide them, and some chunks of tokens repeat the last
# token, with cotangent 0. Of k chunks of tokens each takes every k-th token rather than neighbours.
# If the tokens are divided among devices, each device then has a part of every chunk, and no token
# is sent to another.
def _over_tokens(
    of_chunk: Callable[..., tuple[Any, Any]],
    carry: Any,
    tokens: Tokens,
    division: Division,
    cotangent: Array | None = None,
    given: Statistics | None = None,
) -> tuple[Any, Any]:
    """Scans over chunks of tokens, their cotangents and their statistics."""

    def body(carry: Any, chunk: tuple[Tokens, Array | None, Statistics | None]) -> tuple[Any, Any]:
        tokens, *others = chunk
        if tokens.ignored is not None:  # it may hold a NaN, which a cotangent of 0 does not silence
            tokens = tokens._replace(x=jnp.where(tokens.ignored[:, None], 0, tokens.x))
        return of_chunk(carry, tokens, *others)

    body = jax.checkpoint(body, prevent_cse=False)
    length = tokens.labels.shape[0]
    count = _token_chunks(length, division)
    if count == 1:
        return body(carry, (tokens, cotangent, given))
    size = math.ceil(length / count)

    def divided(mode: str, tree: Any) -> Any:
        def chunks(leaf: Array) -> Array:
            widths = [(0, size * count - length)] + [(0, 0)] * (leaf.ndim - 1)
            padded = jnp.pad(leaf, widths, mode=mode)
            return padded.reshape(size, count, *leaf.shape[1:]).swapaxes(0, 1)

        return jax.tree.map(chunks, tree)

    xs = divided("edge", tokens), divided("constant", cotangent), divided("edge", given)
    carry, out = lax.scan(body, carry, xs)
    in_order = lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])[:length]
    return carry, jax.tree.map(in_order, out)


def _token_chunks(length: int, division: Division) -> int:
    """The number of chunks of tokens."""
    if not known(lambda: length > division.tokens, False):
        return 1
    least, devices = math.ceil(length / division.tokens), jax.device_count()
    if division.mesh is None and devices > 1:
        # The compiler may have divided the tokens among devices. It sends tokens to and fro unless
        # each device has equally many of every chunk, so smaller chunks that allow it are better.
        counts = range(least, 2 * least + 1)
        return next((c for c in counts if length % (c * devices) == 0), least)
    return least


def _over_classes(
    step: Callable[[Any, Classes, Any], tuple[Any, Any]],
    carry: Any,
    of_chunks: Any,
    tokens: Tokens,
    layer: Layer,
    division: Division,
) -> tuple[Any, Any]:
    """Scans over the chunks of classes, and over arrays with an entry for each of them."""
    n, labels = layer.w.shape[1], tokens.labels
    if not known(lambda: n > division.classes, False):
        return step(carry, Classes(layer, 0, None, _places(labels, 0, 0, n)), of_chunks)
    count = math.ceil(n / division.classes)
    size = math.ceil(n / count)

    def body(carry: Any, chunk: tuple[Array, Any]) -> tuple[Any, Any]:
        i, of_chunk = chunk
        low = i * size
        start = jnp.minimum(low, n - size)
        sliced = lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, -1) if leaf.ndim else leaf
        columns = jax.tree.map(sliced, layer)
        fresh = None if n % size == 0 else start + jnp.arange(size, dtype=labels.dtype) >= low
        place = _places(labels, low, start, size)
        return step(carry, Classes(columns, start, fresh, place), of_chunk)

    body = jax.checkpoint(body, prevent_cse=False)
    return lax.scan(body, carry, (jnp.arange(count, dtype=labels.dtype), of_chunks))


def _places(labels: Array, low: Array | int, start: Array | int, size: int) -> Array:
    """The places of labels in a chunk from `start`, which takes those from `low`; else its size."""
    here = (labels >= low) & (labels < start + size)
    return jnp.where(here, labels - start, size)
