"""The products of matrices that a large vocabulary costs, by how w lies in memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks import speed
from jaxsoft._core.slices import added
from jaxsoft._demo.timing import timings

Sizes = tuple[int, int, int]  # tokens, d and classes of a chunk

# Those of the chunks that jaxsoft takes, and larger ones.
SIZES: tuple[Sizes, ...] = ((384, 256, 2096), (512, 256, 4192))
QUICK_SIZES: tuple[Sizes, ...] = ((64, 16, 128),)
CHUNKS = 12  # of classes

COLUMNS = (
    "product, tokens×d×classes of a chunk",
    "10⁹ operations / s",
    "time / w as it is: w transposed",
    "w packed",
    "10⁹ operations / s of NumPy",
)
CAPTION = (
    f"The products of matrices within that, in float32, of a chunk of tokens with {CHUNKS} chunks "
    "of classes one after another: x w, the gradient ȳ wᵀ by x, and the gradient xᵀ ȳ by w, which "
    "is added in place. w is as it is, [d, n], or transposed, [n, d], or packed, with the classes "
    "of a chunk together, [chunks, d, classes]: in turns, with the quartiles of the ratios. NumPy, "
    "whose products are those of a library, has w as it is, and runs by itself, for its threads "
    "stay awake and slow down what comes next."
)

_ROUNDS = 6


@dataclasses.dataclass(frozen=True)
class Layout:
    """How w and its gradient lie in memory.

    Attributes:
        of: the arrangement of a [chunks, d, classes].
        part: the [d, classes] of a chunk.
        added: adds a [d, classes] to that of a chunk.
    """

    of: Callable[[Array], Array]
    part: Callable[[Array, Any, int], Array]
    added: Callable[[Array, Any, Array], Array]


LAYOUTS = {
    "as it is": Layout(
        of=lambda w: w.swapaxes(0, 1).reshape(w.shape[1], -1),
        part=lambda w, i, size: lax.dynamic_slice_in_dim(w, i * size, size, 1),
        added=lambda total, i, product: added(total, product, (0, i * product.shape[1])),
    ),
    "transposed": Layout(
        of=lambda w: w.swapaxes(1, 2).reshape(-1, w.shape[1]),
        part=lambda w, i, size: lax.dynamic_slice_in_dim(w, i * size, size, 0).T,
        added=lambda total, i, product: added(total, product.T, (i * product.shape[1], 0)),
    ),
    "packed": Layout(
        of=lambda w: w,
        part=lambda w, i, size: w[i],
        added=lambda total, i, product: added(total, product[None], (i, 0, 0)),
    ),
}

# ------------------------------------------------------------------------------------- products


# Each gets x, ȳ of every chunk, and w, and each chunk another part of these: a product that is the
# same for all would be taken once.
def _forward(layout: Layout, x: Array, y_bar: Array, w: Array) -> Array:
    count, _, size = y_bar.shape
    return lax.map(lambda i: x @ layout.part(w, i, size), jnp.arange(count))


def _by_x(layout: Layout, x: Array, y_bar: Array, w: Array) -> Array:
    count, _, size = y_bar.shape
    add = lambda i, total: total + y_bar[i] @ layout.part(w, i, size).T
    return lax.fori_loop(0, count, add, jnp.zeros_like(x))


def _by_w(layout: Layout, x: Array, y_bar: Array, w: Array) -> Array:
    add = lambda i, total: layout.added(total, i, x.T @ y_bar[i])
    return lax.fori_loop(0, len(y_bar), add, jnp.zeros_like(w))


def _forward_in_numpy(x: Any, y_bar: Any, w: Any, out: Any) -> None:
    for i in range(len(y_bar)):
        np.matmul(x, w[:, _columns(i, y_bar)], out=out[i])


def _by_x_in_numpy(x: Any, y_bar: Any, w: Any, out: Any) -> None:
    out[:] = 0
    for i, bar in enumerate(y_bar):
        out += bar @ w[:, _columns(i, y_bar)].T


def _by_w_in_numpy(x: Any, y_bar: Any, w: Any, out: Any) -> None:
    out[:] = 0
    for i, bar in enumerate(y_bar):
        out[:, _columns(i, y_bar)] += x.T @ bar


def _columns(i: int, y_bar: Any) -> slice:
    size = y_bar.shape[2]
    return slice(i * size, (i + 1) * size)


PRODUCTS = {
    "x w": (_forward, _forward_in_numpy),
    "ȳ wᵀ": (_by_x, _by_x_in_numpy),
    "xᵀ ȳ": (_by_w, _by_w_in_numpy),
}

# ---------------------------------------------------------------------------------- measurement


def measure(sizes: Sizes, seconds: float, seed: int) -> list[tuple[str, ...]]:
    """The rows of a chunk of this size, one for each product."""
    tokens, d, size = sizes
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (tokens, d))
    y_bar = jax.random.normal(keys[1], (CHUNKS, tokens, size))
    chunks_of_w = jax.random.normal(keys[2], (CHUNKS, d, size))
    ws = {name: layout.of(chunks_of_w) for name, layout in LAYOUTS.items()}
    args_of_numpy = tuple(map(np.asarray, (x, y_bar, ws["as it is"])))
    operations = 2 * tokens * d * size * CHUNKS
    rows = []
    for name, (function, in_numpy) in PRODUCTS.items():
        programs = [
            _program(functools.partial(function, layout), x, y_bar, ws[where])
            for where, layout in LAYOUTS.items()
        ]
        plain, *others = programs
        timed = timings(others, plain, (), rounds=_ROUNDS, seconds=seconds)
        alone = functools.partial(in_numpy, *args_of_numpy, np.array(plain()))
        of_numpy = timings((alone,), alone, (), rounds=_ROUNDS, seconds=seconds)
        per_second = lambda duration: f"{operations / duration / 1e9:.0f}"
        rows.append(
            (
                f"{name}, {'×'.join(map(str, sizes))}",
                per_second(timed[0].peer_seconds),
                *map(speed.ratio, timed),
                per_second(of_numpy[0].seconds),
            )
        )
    return rows


def _program(function: Callable[..., Array], *args: Array) -> Callable[[], Array]:
    return functools.partial(jax.jit(function).lower(*args).compile(), *args)
