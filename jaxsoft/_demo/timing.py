"""The time of softmax and cross-entropy, in turns with jax.nn and optax; for `benchmarks` too."""

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

_SAMPLE_SECONDS = 2e-3  # shorter samples would measure the clock

Shape = tuple[int, int]
Computation = Callable[[Array, Array, Array], Any]  # of logits, a cotangent and labels


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of a program and of its peer.

    Attributes:
        seconds: median time of the program.
        peer_seconds: median time of the peer.
        ratio: median of the ratios of samples of the same round, the program over the peer: below 1
            the program is faster.
        low: the first quartile of these ratios.
        high: the third quartile.
    """

    seconds: float
    peer_seconds: float
    ratio: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is computed.

    Attributes:
        peer: the library that computes it as well.
        own: how jaxsoft computes it.
        peers: how the peer does.
    """

    peer: str
    own: Computation
    peers: Computation


# ----------------------------------------------------------------------------------- quantities


def _forward(function: Callable[[Array], Array]) -> Computation:
    return lambda x, g, labels: function(x)


def _forward_and_vjp(function: Callable[[Array], Array]) -> Computation:
    def both(x: Array, g: Array, labels: Array) -> tuple[Array, Array]:
        out, pullback = jax.vjp(function, x)
        return out, pullback(g)[0]

    return both


def _loss(loss: Callable[[Array, Array], Array]) -> Computation:
    return lambda x, g, labels: loss(x, labels)


def _loss_and_gradient(loss: Callable[[Array, Array], Array]) -> Computation:
    def both(x: Array, g: Array, labels: Array) -> tuple[Array, Array]:
        losses, pullback = jax.vjp(lambda x: loss(x, labels), x)
        return losses, pullback(jnp.ones_like(losses))[0]

    return both


def _peer_loss(x: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


QUANTITIES = {
    "softmax": Quantity("jax.nn", _forward(jaxsoft.softmax), _forward(jax.nn.softmax)),
    "softmax + VJP": Quantity(
        "jax.nn", _forward_and_vjp(jaxsoft.softmax), _forward_and_vjp(jax.nn.softmax)
    ),
    "cross-entropy": Quantity("optax", _loss(jaxsoft.cross_entropy), _loss(_peer_loss)),
    "cross-entropy + gradient": Quantity(
        "optax", _loss_and_gradient(jaxsoft.cross_entropy), _loss_and_gradient(_peer_loss)
    ),
}

# ---------------------------------------------------------------------------------- measurement


def arguments(shape: Shape, dtype: str, seed: int) -> tuple[Array, Array, Array]:
    """Random logits, a cotangent and labels."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        (2 * jax.random.normal(keys[0], shape, jnp.float32)).astype(dtype),
        jax.random.normal(keys[1], shape, jnp.float32).astype(dtype),
        jax.random.randint(keys[2], shape[:1], 0, shape[1], jnp.int32),
    )


def timing(
    own: Callable[..., Any],
    peers: Callable[..., Any],
    args: tuple[Array, ...],
    *,
    rounds: int,
    seconds: float = 0.0,
) -> Timing:
    """Times two programs in turns, for at least so many rounds and so many seconds."""
    return timings((own,), peers, args, rounds=rounds, seconds=seconds)[0]


def timings(
    programs: Sequence[Callable[..., Any]],
    peer: Callable[..., Any],
    args: tuple[Array, ...],
    *,
    rounds: int,
    seconds: float = 0.0,
) -> list[Timing]:
    """Times programs in turns with one peer, as `timing` does for one of them."""
    *samples, peer_samples = _interleaved((*programs, peer), args, rounds, seconds)
    return [compared(own_samples, peer_samples) for own_samples in samples]


def compared(samples: Sequence[float], peer_samples: Sequence[float]) -> Timing:
    """Compares two programs by their seconds, round by round."""
    ratios = [a / b for a, b in zip(samples, peer_samples, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(
        seconds=statistics.median(samples),
        peer_seconds=statistics.median(peer_samples),
        ratio=ratio,
        low=low,
        high=high,
    )


# Every round times each program once, and the first of one round is the last of the next: what
# else runs on the machine, and what the caches hold, falls on all alike. So the number of rounds is
# even.
def _interleaved(
    programs: Sequence[Callable[..., Any]], args: tuple[Array, ...], rounds: int, seconds: float
) -> list[list[float]]:
    """Returns the seconds per call of each program, round by round."""

    def sample(program: Callable[..., Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(program(*args))
        return (time.perf_counter() - start) / calls

    for program in programs:
        sample(program, 1)  # the first call compiles, or pays for more than its work
    calls = math.ceil(_SAMPLE_SECONDS / min(sample(program, 1) for program in programs))
    samples: list[list[float]] = [[] for _ in programs]
    order = list(range(len(programs)))
    end = time.perf_counter() + seconds
    while len(samples[0]) < rounds or len(samples[0]) % 2 or time.perf_counter() < end:
        for i in order:
            samples[i].append(sample(programs[i], calls))
        order.reverse()
    return samples
