"""Time and memory against jax.nn and optax."""

import dataclasses
import statistics
from typing import Any

import jax

from jaxsoft._demo import Track
from jaxsoft._demo.timing import QUANTITIES, Shape, arguments, timing


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
    rounds = 8 if quick else 16
    dtypes = ("float32", "bfloat16")
    cases = [(q, shape, dtype) for dtype in dtypes for shape in shapes for q in QUANTITIES]
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


def _comparison(name: str, shape: Shape, dtype: str, seed: int, rounds: int) -> Comparison:
    quantity, args = QUANTITIES[name], arguments(shape, dtype, seed)
    own, peers = (
        jax.jit(computation).lower(*args).compile()
        for computation in (quantity.own, quantity.peers)
    )
    return Comparison(
        quantity=name,
        peer=quantity.peer,
        shape=shape,
        dtype=dtype,
        **dataclasses.asdict(timing(own, peers, args, rounds=rounds)),
        scratch_bytes=scratch_bytes(own),
        peer_scratch_bytes=scratch_bytes(peers),
    )


def scratch_bytes(program: Any) -> int | None:
    """The temporary memory of a compiled program, where XLA says."""
    try:
        return int(program.memory_analysis().temp_size_in_bytes)
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None  # Not every backend has the analysis.
