"""A linear layer and its cross-entropy in chunks of tokens and classes, and the gradients of both.

A chunk of tokens goes through the chunks of classes once for its statistics and, for the gradients,
once more. JAX differentiates it as it stands: reverse mode makes every chunk again.
"""

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
from jaxsoft._rows.logits import compute_dtype


class Division(NamedTuple):
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


class Live(NamedTuple):
    """Which arguments a gradient is wanted for."""

    x: bool
    temperature: bool
    w: bool
    options: tuple[bool | None, ...]


class Gradients(NamedTuple):
    """Gradients in the compute dtype; None for those not wanted."""

    x: Float[Array, "t d"] | None
    temperature: Float[Array, " t"] | None
    w: Float[Array, "d n"] | None
    options: Options


# ------------------------------------------------------------------------------------ the loss


def statistics(tokens: Tokens, layer: Layer, division: Division) -> Statistics:
    """What `online.loss` needs, in one product of matrices."""

    def of_chunk(carry: None, chunk: tuple[Tokens, None, None]) -> tuple[None, Statistics]:
        return carry, _statistics(_silenced(chunk[0]), layer, division, keep=False)[0]

    return _over_tokens(of_chunk, None, (tokens, None, None), division)[1]


def _silenced(tokens: Tokens) -> Tokens:
    """An ignored token may hold a NaN, which a cotangent of 0 does not silence."""
    if tokens.ignored is None:
        return tokens
    return tokens._replace(x=jnp.where(tokens.ignored[:, None], 0, tokens.x))


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

    Of classes on several devices each has the gradients by its own, and of what all have alike a
    part that is to be added to those of the others. Either of x and w takes one product of matrices
    more than the loss alone. The logits are made once with `division.keep`; else once more than the
    statistics that may be given.
    """
    dtype = compute_dtype(layer.w.dtype)

    def zeros(leaf: Array | None, wanted: bool | None) -> Array | None:
        if not wanted or leaf is None:
            return None
        return devices.typed(jnp.zeros(leaf.shape, dtype), tokens.x)

    options = Options(*map(zeros, layer.options, live.options))

    def of_chunk(
        so_far: Gradients, chunk: tuple[Tokens, Array, Statistics | None]
    ) -> tuple[Gradients, Any]:
        tokens, cotangent, given = chunk
        tokens = _silenced(tokens)
        out, sums = _chunk_gradients(tokens, layer, cotangent, live, division, so_far, given)
        return sums._replace(x=None, temperature=None), (out, sums.x, sums.temperature)

    start = Gradients(None, None, zeros(layer.w, live.w), options)
    chunks = (tokens, cotangent, given)
    sums, (out, x_bar, temperature_bar) = _over_tokens(of_chunk, start, chunks, division)
    return out, sums._replace(x=x_bar, temperature=temperature_bar)


def _chunk_gradients(
    tokens: Tokens,
    layer: Layer,
    cotangent: Array,
    live: Live,
    division: Division,
    so_far: Gradients,
    given: Statistics | None,
) -> tuple[Array, Gradients]:
    """The losses of a chunk of tokens, and the gradients with what comes to them by it."""
    kept = None
    if given is None:
        given, kept = _statistics(tokens, layer, division, keep=division.keep)
    top, count = given.top, online.class_count(layer, division.mesh)

    def loss_of(sums: Sums, temperature: Array | None, options: Options) -> Array:
        of_tokens = tokens._replace(temperature=temperature)
        return online.loss(Statistics(top, sums), of_tokens, options, count)

    out, pullback = jax.vjp(loss_of, given.sums, tokens.temperature, layer.options)
    sums_bar, *bars = pullback(cotangent)
    temperature_bar, options_bar = devices.shares(bars, tokens.x, division.mesh)

    def step(so_far: Gradients, classes: Classes, kept: Array | None) -> tuple[Gradients, None]:
        def sums_of(products: Array, temperature: Array | None, options: Options) -> Sums:
            part = classes._replace(layer=classes.layer._replace(options=options))
            of_tokens = tokens._replace(temperature=temperature)
            return online.sums(online.capped(products, part), top, of_tokens, part)

        w = classes.layer.w
        products = _products(tokens.x, w) if kept is None else kept
        _, pullback = jax.vjp(sums_of, products, tokens.temperature, classes.layer.options)
        products_bar, temperature_bar, options_bar = pullback(sums_bar)
        # p - y is formed in the compute dtype. It stays there for types with fewer exponents than
        # float32, where it would vanish for a confident example before a loss scale meets it.
        factor = w.dtype if float(jnp.finfo(w.dtype).tiny) < 2.0**-100 else out.dtype
        products_bar = products_bar.astype(factor)
        part = Gradients(
            _products(products_bar, w.T.astype(factor)) if live.x else None,
            temperature_bar,
            _products(tokens.x.T.astype(factor), products_bar) if live.w else None,
            options_bar,
        )
        return _added(so_far, part, classes.start), None

    so_far = so_far._replace(
        x=devices.typed(jnp.zeros(tokens.x.shape, out.dtype), tokens.x) if live.x else None,
        temperature=devices.typed(jnp.zeros_like(out), tokens.x) if live.temperature else None,
    )
    so_far = _added(so_far, Gradients(None, temperature_bar, None, options_bar), 0)
    so_far, _ = _over_classes(step, so_far, kept, tokens, layer, division)
    return out, so_far


def _added(total: Gradients, part: Gradients, start: Array | int) -> Gradients:
    """Adds what comes from a chunk of classes that begins at `start` to the gradients wanted."""

    def added(total: Array | None, part: Array | None) -> Array | None:
        if total is None or part is None:
            return total
        if total.shape == part.shape:
            return total + part
        here = lax.dynamic_slice_in_dim(total, start, part.shape[-1], -1)
        return lax.dynamic_update_slice_in_dim(total, here + part, start, -1)

    return Gradients(
        added(total.x, part.x),
        added(total.temperature, part.temperature),
        added(total.w, part.w),
        Options(*map(added, total.options, part.options)),
    )


# Chunks are of equal size, so that the last one wastes little; of the classes the last chunk begins
# earlier where they do not divide, and of the tokens some chunks repeat the last token, with
# cotangent 0. A chunk takes every so manieth token, not neighbours: of tokens that are divided
# among devices each device then has its part of every chunk, and none has to be sent.
def _over_tokens(
    of_chunk: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: tuple[Tokens, Array | None, Statistics | None],
    division: Division,
) -> tuple[Any, Any]:
    """Scans over chunks of tokens, their cotangents and their statistics."""
    body = jax.checkpoint(of_chunk, prevent_cse=False)
    tokens, cotangent, statistics = xs
    length = tokens.labels.shape[0]
    count = _token_chunks(length, division)
    if count == 1:
        return body(carry, xs)
    size = math.ceil(length / count)

    def chunks(leaf: Array, mode: str) -> Array:
        widths = [(0, size * count - length)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, widths, mode=mode).reshape(size, count, *leaf.shape[1:]).swapaxes(0, 1)

    def in_order(leaf: Array) -> Array:
        return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])[:length]

    of_tokens = jax.tree.map(lambda leaf: chunks(leaf, "edge"), (tokens, statistics))
    cotangent = None if cotangent is None else chunks(cotangent, "constant")
    carry, out = lax.scan(body, carry, (of_tokens[0], cotangent, of_tokens[1]))
    return carry, jax.tree.map(in_order, out)


def _token_chunks(length: int, division: Division) -> int:
    """The number of chunks of tokens."""
    if not known(lambda: length > division.tokens, False):
        return 1
    least, devices = math.ceil(length / division.tokens), jax.device_count()
    if division.mesh is None and devices > 1:
        # The compiler may have divided the tokens among devices, and where a chunk does not have as
        # many of each it would send them to and fro: somewhat smaller chunks that do are better.
        counts = range(least, 2 * least + 1)
        return next((c for c in counts if length % (c * devices) == 0), least)
    return least


def _class_chunks(layer: Layer, division: Division) -> tuple[int, int]:
    """The number of chunks of classes, and how many classes each of them has."""
    n = layer.w.shape[1]
    if not known(lambda: n > division.classes, False):
        return 1, n
    count = math.ceil(n / division.classes)
    return count, math.ceil(n / count)


def _over_classes(
    step: Callable[[Any, Classes, Any], tuple[Any, Any]],
    carry: Any,
    of_chunks: Any,
    tokens: Tokens,
    layer: Layer,
    division: Division,
) -> tuple[Any, Any]:
    """Scans over the chunks of classes and what has an entry for each of them."""
    n, dtype = layer.w.shape[1], tokens.labels.dtype
    count, size = _class_chunks(layer, division)

    def places(low: Array | int, start: Array | int) -> Array:
        here = (tokens.labels >= low) & (tokens.labels < start + size)
        return jnp.where(here, tokens.labels - start, size)

    if count == 1:
        return step(carry, Classes(layer, 0, None, places(0, 0)), of_chunks)

    def body(carry: Any, chunk: tuple[Array, Any]) -> tuple[Any, Any]:
        i, of_chunk = chunk
        low = i * size
        start = jnp.minimum(low, n - size)
        columns = jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, -1) if leaf.ndim else leaf,
            layer,
        )
        fresh = None if n % size == 0 else start + jnp.arange(size, dtype=dtype) >= low
        return step(carry, Classes(columns, start, fresh, places(low, start)), of_chunk)

    body = jax.checkpoint(body, prevent_cse=False)
    return lax.scan(body, carry, (jnp.arange(count, dtype=dtype), of_chunks))
