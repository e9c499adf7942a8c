"""The loss of a large vocabulary: its time and memory against optax, tokamax and torch.

`python -m benchmarks.linear` measures the memory of one candidate, for the table of `benchmarks`.
"""

import argparse
import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxsoft
from benchmarks import memory
from jaxsoft._demo.speed import scratch_bytes
from jaxsoft._demo.timing import Timing, timings

Shape = tuple[int, int, int]  # tokens, d, n
Arguments = tuple[Array, Array, Array]  # x, w, labels
Loss = Callable[[Any, Any, Any], Any]

SHAPES: tuple[Shape, ...] = ((2048, 256, 32_768), (4096, 256, 50_304), (8192, 64, 50_304))
QUICK_SHAPES: tuple[Shape, ...] = ((1024, 64, 16_384),)
SIXTEEN_BIT = 1  # so many of the sizes, the smaller ones, in bfloat16 as well

COLUMNS = (
    "mean loss with its gradient by x and w, tokens×d×n",
    "time, ms",
    "time / optax",
    "temporary, MiB",
    "temporary / optax",
    "peak, MiB",
)
CAPTION = (
    "Mean cross-entropy of x w with its gradient by x and w, under jit. Time divided by that of "
    "optax.softmax_cross_entropy_with_integer_labels on x @ w: the median over rounds that time "
    "all in turn in one process, and its quartiles. temporary: what the compiled program needs "
    "besides arguments and results, by XLA's memory_analysis. peak: by how much the resident "
    "memory of a process of its own, which has made the arguments and compiled the program, "
    "rises at most while the program runs once, results included; on Linux alone."
)

_ROUNDS = 6
_VOCAB_CHUNK = 2048
_TORCH_CHUNK = 384  # as many tokens as jaxsoft takes
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes and the dtype of x and w."""

    shape: Shape
    dtype: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A computation of the loss and its gradients, and the temporary memory that it needs."""

    call: Callable[..., Any]
    temporary: int | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Who computes the loss. What is optional is left out where it is not installed, or fails."""

    name: str
    program: Callable[[Arguments], Program]
    optional: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one case.

    Attributes:
        rows: of the table, under `COLUMNS`.
        left_out: why a candidate has no row.
    """

    rows: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...]


def cases(*, quick: bool) -> list[Case]:
    """All that is measured, in the order of the table."""
    shapes = QUICK_SHAPES if quick else SHAPES
    return [
        *(Case(shape, "float32") for shape in shapes),
        *(Case(shape, "bfloat16") for shape in shapes[:SIXTEEN_BIT]),
    ]


# --------------------------------------------------------------------------------- candidates


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


def _under_jax(loss: Loss) -> Callable[[Arguments], Program]:
    def program(args: Arguments) -> Program:
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
        return Program(compiled, scratch_bytes(compiled))

    return program


# float32 logits for every dtype, as jaxsoft and torch's own function make them.
def _optax(x: Array, w: Array, labels: Array) -> Array:
    logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _tokamax(x: Array, w: Array, labels: Array) -> Array:
    loss = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    # It would take the options of this command for its own.
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
    return loss(x, labels, w, reduction="mean")


def _under_torch(loss_of: Callable[[Any], Loss]) -> Callable[[Arguments], Program]:
    def program(args: Arguments) -> Program:
        torch = importlib.import_module("torch")
        if jax.default_backend() != "cpu":
            raise NotImplementedError("torch is compared on CPUs alone")
        torch.set_num_threads(_threads())
        x, w, labels = map(torch.from_dlpack, args)
        x, w = x.clone().requires_grad_(), w.T.contiguous().requires_grad_()  # as torch has them
        labels, loss = labels.long(), loss_of(torch)

        def call(*_: Array) -> tuple[Any, ...]:
            value = loss(x, w, labels)
            return value.detach(), *torch.autograd.grad(value, (x, w))

        call()  # Here, where it may fail: it compiles.
        return Program(call)

    return program


def _threads() -> int:
    """How many XLA takes: one for each processor that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


# By default it takes chunks of some 8 to 32 tokens at these sizes, which are slow on CPUs.
def _chunked_in_torch(torch: Any) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=_TORCH_CHUNK, chunking_method=None
    )
    return functools.partial(torch.nn.functional.linear_cross_entropy, options=options)


def _compiled_in_torch(torch: Any) -> Loss:
    def loss(x: Any, w: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy((x @ w.T).float(), labels)

    return torch.compile(loss, dynamic=False)


PEER = Candidate("optax on x @ w", _under_jax(_optax))
CANDIDATES = (
    Candidate("jaxsoft", _under_jax(jaxsoft.linear_cross_entropy)),
    Candidate(
        f"jaxsoft, vocab_chunk={_VOCAB_CHUNK}",
        _under_jax(functools.partial(jaxsoft.linear_cross_entropy, vocab_chunk=_VOCAB_CHUNK)),
    ),
    Candidate("tokamax", _under_jax(_tokamax), "tokamax"),
    Candidate(
        f"torch, linear_cross_entropy, {_TORCH_CHUNK} tokens a chunk",
        _under_torch(_chunked_in_torch),
        "torch",
    ),
    Candidate("torch.compile on x @ w", _under_torch(_compiled_in_torch), "torch"),
)

# ------------------------------------------------------------------------------- measurement


def measure(case: Case, seconds: float, seed: int) -> Result:
    """Measures memory, each candidate in a process of its own, and time, for about `seconds`."""
    args = arguments(case, seed)
    programs: dict[Candidate, Program] = {}
    peaks: dict[Candidate, int | None] = {}
    left_out = []
    for candidate in (PEER, *CANDIDATES):
        try:
            program = candidate.program(args)
            peaks[candidate] = _peak(case, candidate, seed)
            programs[candidate] = program
        except Exception as error:
            if candidate.optional is None:
                raise
            left_out.append(_reason(candidate, error))
    peer, *others = programs.values()
    compared = timings([p.call for p in others], peer.call, args, rounds=_ROUNDS, seconds=seconds)
    alone = Timing(compared[0].peer_seconds, compared[0].peer_seconds, 1.0, 1.0, 1.0)
    rows = [
        (
            f"{case.dtype}, {'×'.join(map(str, case.shape))}: {candidate.name}",
            f"{timing.seconds * 1e3:.0f}",
            "1" if timing is alone else f"{timing.ratio:.2f} ({timing.low:.2f}–{timing.high:.2f})",
            _mebibytes(program.temporary),
            _ratio(program.temporary, peer.temporary),
            _mebibytes(peaks[candidate]),
        )
        for (candidate, program), timing in zip(programs.items(), (alone, *compared), strict=True)
    ]
    return Result(tuple(rows), tuple(left_out))


def _reason(candidate: Candidate, error: Exception) -> str:
    if isinstance(error, ImportError) and error.name == candidate.optional:
        return f"{candidate.name}: left out, not installed (pip install {candidate.optional})"
    first, *_ = str(error).splitlines() or [""]
    return f"{candidate.name}: left out, {type(error).__name__}: {first}"


def _peak(case: Case, candidate: Candidate, seed: int) -> int | None:
    if jax.default_backend() != "cpu":
        return None  # The arrays lie elsewhere.
    sizes = map(str, case.shape)
    options = ("--dtype", case.dtype, "--seed", str(seed))
    return memory.in_own_process("benchmarks.linear", (candidate.name, *sizes, *options))


def _ratio(size: int | None, peer: int | None) -> str:
    return f"{size / peer:.3f}" if size is not None and peer else "–"


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / _MIB:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the bytes by which one candidate raises the resident memory of this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear")
    candidates = {candidate.name: candidate for candidate in (PEER, *CANDIDATES)}
    parser.add_argument("candidate", choices=candidates)
    for size in ("tokens", "d", "n"):
        parser.add_argument(size, type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    case = Case((options.tokens, options.d, options.n), options.dtype)
    args = jax.block_until_ready(arguments(case, options.seed))
    program = candidates[options.candidate].program(args)
    print(memory.rise(lambda: program.call(*args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
