"""Who computes a quantity, as of a linear layer x w, and what it takes in time and memory."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import environment, memory, speed
from jaxsoft._demo.speed import scratch_bytes
from jaxsoft._demo.timing import Timing, timings

Shape = tuple[int, int, int]  # tokens, d, n
Sizes = tuple[int, ...]
Arguments = tuple[Array, ...]  # x, w, and what else belongs to a quantity

SIXTEEN_BIT = 1  # so many of the sizes, the smaller ones, in bfloat16 as well

_ROUNDS = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes, as of x and w, and the dtype."""

    shape: Sizes
    dtype: str

    @property
    def title(self) -> str:
        """What it is called."""
        return f"{self.dtype}, {'×'.join(map(str, self.shape))}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A computation, as of a loss and its gradients, and the temporary memory that it needs."""

    call: Callable[..., Any]
    temporary: int | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Who computes it. What is optional is left out where it is not installed, or fails."""

    name: str
    program: Callable[[Arguments], Program]
    optional: str | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one candidate takes.

    Attributes:
        timing: its time, against that of the peer.
        temporary: what its program needs besides arguments and results, in bytes.
        share: the same, divided by that of the peer.
        peak: by how much it raises the resident memory of a process of its own, in bytes.
    """

    timing: Timing
    temporary: int | None
    share: float | None
    peak: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one case.

    Attributes:
        case: which one.
        measured: of each candidate, the peer first.
        left_out: why a candidate is not there.
    """

    case: Case
    measured: Mapping[Candidate, Measured]
    left_out: tuple[str, ...]

    def of(self, name: str) -> Measured:
        """What the candidate of this name takes."""
        return next(found for candidate, found in self.measured.items() if candidate.name == name)


def cases(shapes: Sequence[Shape]) -> list[Case]:
    """All that is measured, in the order of the table."""
    return [
        *(Case(shape, "float32") for shape in shapes),
        *(Case(shape, "bfloat16") for shape in shapes[:SIXTEEN_BIT]),
    ]


@functools.partial(jax.jit, static_argnames="case")
def arguments(case: Case, seed: int) -> Arguments:
    """Random features, a layer whose logits have a variance of 1, and labels."""
    tokens, d, n = case.shape
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (tokens, d), jnp.float32).astype(case.dtype),
        (d**-0.5 * jax.random.normal(keys[1], (d, n), jnp.float32)).astype(case.dtype),
        jax.random.randint(keys[2], (tokens,), 0, n, jnp.int32),
    )


def logits(x: Array, w: Array) -> Array:
    """x @ w in float32 for every dtype, as jaxsoft makes it."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def under_jax(loss: Callable[..., Any], *, has_aux: bool = False) -> Callable[[Arguments], Program]:
    """The program of a loss and its gradients by x and w."""
    return jitted(jax.value_and_grad(loss, (0, 1), has_aux=has_aux))


def jitted(computation: Callable[..., Any]) -> Callable[[Arguments], Program]:
    """The program of what is computed of the arguments."""

    def program(args: Arguments) -> Program:
        compiled = jax.jit(computation).lower(*args).compile()
        return Program(compiled, scratch_bytes(compiled))

    return program


# ------------------------------------------------------------------------------- measurement


def measure(
    case: Case,
    candidates: Sequence[Candidate],
    args: Arguments,
    seconds: float,
    peak: Callable[[Candidate], int | None] = lambda candidate: None,
) -> Result:
    """Times the candidates in turns, for about `seconds`; the first is the peer of the others."""
    programs: dict[Candidate, Program] = {}
    peaks: dict[Candidate, int | None] = {}
    left_out = []
    for candidate in candidates:
        try:
            program = candidate.program(args)
            peaks[candidate] = peak(candidate)
            programs[candidate] = program
        except Exception as error:
            if candidate.optional is None:
                raise
            left_out.append(_reason(candidate, error))
    peer, *others = programs.values()
    timed = timings([p.call for p in others], peer.call, args, rounds=_ROUNDS, seconds=seconds)
    alone = Timing(timed[0].peer_seconds, timed[0].peer_seconds, 1.0, 1.0, 1.0)
    measured = {
        candidate: Measured(
            timing,
            program.temporary,
            _share(program.temporary, peer.temporary),
            peaks[candidate],
        )
        for (candidate, program), timing in zip(programs.items(), (alone, *timed), strict=True)
    }
    return Result(case, measured, tuple(left_out))


def _reason(candidate: Candidate, error: Exception) -> str:
    optional = candidate.optional or ""
    if isinstance(error, ImportError) and error.name == optional:
        package = environment.PEERS.get(optional, optional)
        return f"{candidate.name}: left out, not installed (pip install {package})"
    first, *_ = str(error).splitlines() or [""]
    return f"{candidate.name}: left out, {type(error).__name__}: {first}"


def _share(size: int | None, peer: int | None) -> float | None:
    return size / peer if size is not None and peer else None


# ------------------------------------------------------------------------------------- table


def columns(quantity: str, peer: str, sizes: str = "tokens×d×n") -> tuple[str, ...]:
    """The headings over `cells`, given the shortest name of the peer."""
    of_time, of_memory = f"time / {peer}", f"temporary / {peer}"
    return f"{quantity}, {sizes}", "time, ms", of_time, "temporary, MiB", of_memory


def cells(result: Result, candidate: Candidate) -> tuple[str, ...]:
    """The row of a candidate: its name, time and temporary memory."""
    found = result.measured[candidate]
    is_peer = candidate is next(iter(result.measured))
    milliseconds = found.timing.seconds * 1e3
    return (
        f"{result.case.title}: {candidate.name}",
        f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}",
        "1" if is_peer else speed.ratio(found.timing),
        memory.mebibytes(found.temporary),
        "–" if found.share is None else f"{found.share:.3f}",
    )
