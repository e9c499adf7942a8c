"""How tokens and classes are divided into chunks, and the loops over both."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._core import options
from jaxsoft._core.devices import Mesh
from jaxsoft._core.sizes import known
from jaxsoft._linear.operands import Classes, Layer, Tokens

# On a CPU the product of a chunk of so many classes stays in the cache. Elsewhere each chunk of
# classes costs kernels and passes over memory, so by default there is one.
_CLASSES = 2048
_LEAST_TOKENS = 384  # products of matrices with fewer rows are slow


# An argument of rules that is no tree: JAX_CUSTOM_VJP3 would wrap its leaves.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Division:
    """How the tokens and the classes are divided.

    Attributes:
        tokens: how many tokens make a chunk, at most.
        classes: how many classes make a chunk, at most.
        keep: whether the logits of a chunk of tokens are kept for all classes where they are needed
            twice, rather than made again.
        mesh: the axes of a mesh over which the classes go on.
    """

    tokens: int
    classes: int
    keep: bool
    mesh: Mesh | None


def divided(
    function: str, w: Array, token_chunk: Any, vocab_chunk: Any, mesh: Mesh | None, *, once: bool
) -> Division:
    """Checks the sizes of chunks, and divides tokens and classes by default where they are None.

    `once` says whether the logits are made once if those of all classes are kept.
    """
    tokens = options.positive_or_none(function, "token_chunk", token_chunk)
    classes = options.positive_or_none(function, "vocab_chunk", vocab_chunk)
    d, n = w.shape
    keep = classes is None and once
    most = d if known(lambda: d > _LEAST_TOKENS, False) else _LEAST_TOKENS
    if not keep:
        most += most // 3
    together = n
    if jax.default_backend() == "cpu":
        if mesh is None and jax.device_count() > 1:
            # The compiler may have divided the classes among devices: a chunk of them would have to
            # be sent to all. The memory that all classes take at once is saved on tokens.
            most //= 2
        elif known(lambda: n > _CLASSES, False):
            together = _in_cache(n)
    return Division(tokens or most, classes or together, keep, mesh)


def _in_cache(n: int) -> int:
    """About `_CLASSES` of them, and if possible such that all chunks are of one size."""
    count = max(1, round(n / _CLASSES))
    near = sorted(range(count - count // 3, count + count // 3 + 1), key=lambda c: abs(c - count))
    return next((n // c for c in near if n % c == 0), math.ceil(n / count))


# Chunks of one loop have one size, and together little more than there is: the last chunk of
# classes begins earlier if the size does not divide them, and some chunks of tokens repeat the last
# token, with cotangent 0. Of k chunks of tokens each takes every k-th token rather than neighbours.
# If the tokens are divided among devices, each device then has a part of every chunk, and no token
# is sent to another.
def over_tokens(
    of_chunk: Callable[..., tuple[Any, Any]],
    carry: Any,
    tokens: Tokens,
    division: Division,
    *others: Any,
    cotangent: Any = None,
) -> tuple[Any, Any]:
    """Scans over chunks of tokens, of other arrays of theirs, and of their cotangents.

    `of_chunk` gets the others after the tokens, and the cotangents, if there are any, after these.
    """
    given = () if cotangent is None else (cotangent,)

    def body(carry: Any, chunk: tuple[Any, ...]) -> tuple[Any, Any]:
        tokens, *others = chunk
        if tokens.ignored is not None:  # it may hold a NaN, which a cotangent of 0 does not silence
            silent = lambda x: jnp.where(tokens.ignored[:, None], 0, x)
            tokens = tokens._replace(x=jax.tree.map(silent, tokens.x))
        return of_chunk(carry, tokens, *others)

    body = jax.checkpoint(body, prevent_cse=False)
    length = tokens.length
    count = _token_chunks(length, division)
    if count == 1:
        return body(carry, (tokens, *others, *given))
    size = math.ceil(length / count)

    def divided(mode: str, tree: Any) -> Any:
        def chunks(leaf: Array) -> Array:
            widths = [(0, size * count - length)] + [(0, 0)] * (leaf.ndim - 1)
            padded = jnp.pad(leaf, widths, mode=mode)
            return padded.reshape(size, count, *leaf.shape[1:]).swapaxes(0, 1)

        return jax.tree.map(chunks, tree)

    xs = *divided("edge", (tokens, *others)), *divided("constant", given)
    carry, out = lax.scan(body, carry, xs)
    in_order = lambda leaf: leaf.swapaxes(0, 1).reshape(size * count, *leaf.shape[2:])[:length]
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


def over_classes(
    step: Callable[[Any, Classes, Any], tuple[Any, Any]],
    carry: Any,
    of_chunks: Any,
    tokens: Tokens,
    layer: Layer,
    division: Division,
) -> tuple[Any, Any]:
    """Scans over the chunks of classes, and over arrays with an entry for each of them."""
    n, labels = layer.w[0].shape[1], tokens.labels
    if not known(lambda: n > division.classes, False):
        return step(carry, Classes(layer, 0, None, _places(labels, 0, 0, n)), of_chunks)
    count = math.ceil(n / division.classes)
    size = math.ceil(n / count)
    dtype = jnp.int32 if labels is None else labels.dtype

    def body(carry: Any, chunk: tuple[Array, Any]) -> tuple[Any, Any]:
        i, of_chunk = chunk
        low = i * size
        start = jnp.minimum(low, n - size)
        sliced = lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, -1) if leaf.ndim else leaf
        columns = jax.tree.map(sliced, layer)
        fresh = None if n % size == 0 else start + jnp.arange(size, dtype=dtype) >= low
        places = _places(labels, low, start, size)
        return step(carry, Classes(columns, start, fresh, places), of_chunk)

    body = jax.checkpoint(body, prevent_cse=False)
    return lax.scan(body, carry, (jnp.arange(count, dtype=dtype), of_chunks))


def _places(labels: Array | None, low: Array | int, start: Array | int, size: int) -> Array | None:
    """The places of labels in a chunk from `start`, which takes those from `low`; else its size."""
    if labels is None:
        return None
    here = (labels >= low) & (labels < start + size)
    return jnp.where(here, labels - start, size)
