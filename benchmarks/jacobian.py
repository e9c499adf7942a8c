"""The largest eigenvalue of every row's Jacobian, against the dense way."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jaxsoft
from jaxsoft._demo.timing import Computation, Shape, arguments

COLUMNS = ("‖J‖₂, float32, under jax.jit", "jaxsoft, ms", "dense, ms", "times as fast")

_CALLS = 200  # of jaxsoft in a round: the first hundred after an idle second are slower


@dataclasses.dataclass(frozen=True)
class Case:
    """`softmax_jacobian(x).norm(2)` at one size, against a dense computation or alone."""

    against: str
    shape: Shape
    peers: Computation | None
    rounds: int


def cases(*, quick: bool) -> list[Case]:
    """All that is timed. The eigenvalues of dense matrices take ten seconds: two rounds."""
    shape = (16, 1000) if quick else (256, 1000)
    return [
        Case("vmap(jacfwd(jax.nn.softmax)) alone", shape, _dense, 6),
        Case("the same and eigvalsh", shape, _dense_norm, 2),
        Case("alone", (1, 100_000), None, 6),
    ]


def measure(case: Case, seed: int) -> tuple[str, ...]:
    """Times one case, after compilation; returns its row of the table, under `COLUMNS`."""
    args = arguments(case.shape, "float32", seed)
    own, peers = jax.jit(_norm), None if case.peers is None else jax.jit(case.peers)
    samples: list[float] = []
    peer_samples: list[float] = []
    for program in (own, peers or own):
        _seconds(program, args)  # the first call compiles
    # Medians of single calls: the gigabyte that the peer leaves may be released during one of them.
    for _ in range(case.rounds):
        if peers is not None:
            peer_samples.append(_seconds(peers, args))
        samples += [_seconds(own, args) for _ in range(_CALLS)]
    size, n = case.shape
    seconds = statistics.median(samples)
    row = (f"{size}×{n}, {case.against}", f"{seconds * 1e3:.2f}")
    if not peer_samples:
        return (*row, "–", "–")
    peer_seconds = statistics.median(peer_samples)
    return (*row, f"{peer_seconds * 1e3:.0f}", f"{peer_seconds / seconds:.0f}")


def _seconds(program: Callable[..., Any], args: tuple[Array, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def _norm(x: Array, g: Array, labels: Array) -> Array:
    return jaxsoft.softmax_jacobian(x).norm(2)


def _dense(x: Array, g: Array, labels: Array) -> Array:
    return jax.vmap(jax.jacfwd(jax.nn.softmax))(x)


def _dense_norm(x: Array, g: Array, labels: Array) -> Array:
    return jnp.linalg.eigvalsh(_dense(x, g, labels))[:, -1]
