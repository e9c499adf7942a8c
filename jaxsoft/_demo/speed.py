"""Time and memory against jax.nn and optax."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import jaxsoft
from jaxsoft._demo import Track

_SAMPLE_SECONDS = 2e-3  # shorter samples would measure the clock

Shape = tuple[int, int]
Computation = Callable[[Array, Array, Array], Any]  # of logits, a cotangent and labels


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Time and memory of one quantity, jaxsoft against a peer.

    Attributes:
        quantity: what is computed.
        peer: the library that computes it as well.
        shape: of the logits.
        dtype: of the logits.
        seconds: median time of jaxsoft.
        peer_seconds: median time of the peer.
        ratio: median of the ratios of adjacent samples, jaxsoft over the peer.
        low: the first quartile of these ratios.
        high: the third quartile.
        scratch_bytes: temporary memory of the compiled program, None where XLA does not say.
        peer_scratch_bytes: that of the peer.
    """

    quantity: str
    peer: str
    shape: Shape
    dtype: str
    seconds: float
    peer_seconds: float
    ratio: float
    low: float
    high: float
    scratch_bytes: int | None
    peer_scratch_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Speed:
    """All comparisons, and for each dtype the geometric mean of their ratios."""

    comparisons: tuple[Comparison, ...]
    geometric_means: dict[str, float]


def speed(seed: int, *, quick: bool, track: Track) -> Speed:
    """Times softmax and cross-entropy, forward and with their gradients."""
    shapes: list[Shape] = [(4096, 100)] if quick else [(32768, 10), (2048, 1000), (32, 50304)]
    rounds = 7 if quick else 15
    dtypes = ("float32", "bfloat16")
    cases = [(q, shape, dtype) for dtype in dtypes for shape in shapes for q in _QUANTITIES]
    comparisons = tuple(
        _comparison(*case, seed, rounds) for case in track(cases, "time and memory")
    )
    return Speed(
        comparisons=comparisons,
        geometric_means={
            dtype: statistics.geometric_mean(c.ratio for c in comparisons if c.dtype == dtype)
            for dtype in dtypes
        },
    )


# ----------------------------------------------------------------------------------- quantities


def _softmax(softmax: Callable[[Array], Array]) -> Computation:
    return lambda x, g, labels: softmax(x)


def _softmax_and_vjp(softmax: Callable[[Array], Array]) -> Computation:
    def forward_and_backward(x: Array, g: Array, labels: Array) -> tuple[Array, Array]:
        p, pullback = jax.vjp(softmax, x)
        return p, pullback(g)[0]

    return forward_and_backward


def _loss(loss: Callable[[Array, Array], Array]) -> Computation:
    return lambda x, g, labels: loss(x, labels)


def _loss_and_gradient(loss: Callable[[Array, Array], Array]) -> Computation:
    return lambda x, g, labels: jax.value_and_grad(lambda x: jnp.mean(loss(x, labels)))(x)


def _optax_loss(x: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


# For each quantity the peer's name, how jaxsoft computes it, and how the peer does.
_QUANTITIES: dict[str, tuple[str, Computation, Computation]] = {
    "softmax": ("jax.nn", _softmax(jaxsoft.softmax), _softmax(jax.nn.softmax)),
    "softmax + VJP": (
        "jax.nn",
        _softmax_and_vjp(jaxsoft.softmax),
        _softmax_and_vjp(jax.nn.softmax),
    ),
    "cross-entropy": ("optax", _loss(jaxsoft.cross_entropy), _loss(_optax_loss)),
    "cross-entropy + gradient": (
        "optax",
        _loss_and_gradient(jaxsoft.cross_entropy),
        _loss_and_gradient(_optax_loss),
    ),
}

# ---------------------------------------------------------------------------------- measurement


def _comparison(quantity: str, shape: Shape, dtype: str, seed: int, rounds: int) -> Comparison:
    keys = jax.random.split(jax.random.key(seed), 3)
    args = (
        (4 * jax.random.normal(keys[0], shape, jnp.float32)).astype(dtype),
        jax.random.normal(keys[1], shape, jnp.float32).astype(dtype),
        jax.random.randint(keys[2], shape[:1], 0, shape[1], jnp.int32),
    )
    peer, *computations = _QUANTITIES[quantity]
    programs = [jax.jit(computation).lower(*args).compile() for computation in computations]
    seconds, peer_seconds = _interleaved(programs, args, rounds)
    ratios = [own / other for own, other in zip(seconds, peer_seconds, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    scratch, peer_scratch = (_scratch_bytes(program) for program in programs)
    return Comparison(
        quantity=quantity,
        peer=peer,
        shape=shape,
        dtype=dtype,
        seconds=statistics.median(seconds),
        peer_seconds=statistics.median(peer_seconds),
        ratio=ratio,
        low=low,
        high=high,
        scratch_bytes=scratch,
        peer_scratch_bytes=peer_scratch,
    )


# The programs take turns, and each goes first in every other round: what else runs on the machine,
# and what the caches hold, falls on both alike.
def _interleaved(
    programs: Sequence[Callable[..., Any]], args: tuple[Array, ...], rounds: int
) -> list[list[float]]:
    def sample(program: Callable[..., Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(program(*args))
        return (time.perf_counter() - start) / calls

    for program in programs:
        sample(program, 1)  # the first call pays for more than its work
    calls = math.ceil(_SAMPLE_SECONDS / min(sample(program, 1) for program in programs))
    seconds: list[list[float]] = [[] for _ in programs]
    for turn in range(rounds):
        for i in range(len(programs)) if turn % 2 else reversed(range(len(programs))):
            seconds[i].append(sample(programs[i], calls))
    return seconds


def _scratch_bytes(program: Any) -> int | None:
    try:
        return int(program.memory_analysis().temp_size_in_bytes)
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None  # Not every backend has the analysis.
