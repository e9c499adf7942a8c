"""The loss of a large vocabulary: its time and memory against optax, tokamax and torch.

`python -m benchmarks.linear` measures the memory of one candidate, for the table of `benchmarks`.
"""

import argparse
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
from benchmarks import candidates, memory
from benchmarks.candidates import (
    Arguments,
    Candidate,
    Case,
    Program,
    Result,
    Shape,
    arguments,
    under_jax,
)
from benchmarks.tables import Grid

Loss = Callable[[Any, Any, Any], Any]  # of x, w and labels

SHAPES: tuple[Shape, ...] = ((2048, 256, 32_768), (4096, 256, 50_304), (8192, 64, 50_304))
QUICK_SHAPES: tuple[Shape, ...] = ((1024, 64, 16_384),)
VOCAB_CHUNK, TOKEN_CHUNK = 2048, 512

COLUMNS = (*candidates.columns("mean loss with its gradient by x and w", "optax"), "peak, MiB")
CAPTION = (
    "Mean cross-entropy of x w with its gradient by x and w, under jit. Time divided by that of "
    "optax.softmax_cross_entropy_with_integer_labels on x @ w: the median over rounds that time "
    "all in turn in one process, and its quartiles. temporary: what the compiled program needs "
    "besides arguments and results, by XLA's memory_analysis. peak: by how much the resident "
    "memory of a process of its own, which has made the arguments and compiled the program, "
    "rises at most while the program runs once, results included; on Linux alone."
)

_TORCH_CHUNK = 384  # as many tokens as jaxsoft takes


def cases(*, quick: bool) -> list[Case]:
    """All that is measured, in the order of the table."""
    return candidates.cases(QUICK_SHAPES if quick else SHAPES)


# --------------------------------------------------------------------------------- candidates


def _optax(x: Array, w: Array, labels: Array) -> Array:
    logits = candidates.logits(x, w)
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


PEER = Candidate("optax on x @ w", under_jax(_optax))
CANDIDATES = (
    Candidate("jaxsoft", under_jax(jaxsoft.linear_cross_entropy)),
    Candidate(
        f"jaxsoft, vocab_chunk={VOCAB_CHUNK}",
        under_jax(functools.partial(jaxsoft.linear_cross_entropy, vocab_chunk=VOCAB_CHUNK)),
    ),
    Candidate(
        f"jaxsoft, token_chunk={TOKEN_CHUNK}",
        under_jax(functools.partial(jaxsoft.linear_cross_entropy, token_chunk=TOKEN_CHUNK)),
    ),
    Candidate("tokamax", under_jax(_tokamax), "tokamax"),
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
    peak = lambda candidate: _peak(case, candidate, seed)
    args = arguments(case, seed)
    return candidates.measure(case, (PEER, *CANDIDATES), args, seconds, peak)


def grid(results: Sequence[Result]) -> Grid:
    """One table of all."""
    rows = [
        (*candidates.cells(result, candidate), memory.mebibytes(found.peak))
        for result in results
        for candidate, found in result.measured.items()
    ]
    return Grid(COLUMNS, tuple(rows))


def _peak(case: Case, candidate: Candidate, seed: int) -> int | None:
    if jax.default_backend() != "cpu":
        return None  # The arrays lie elsewhere.
    sizes = map(str, case.shape)
    options = ("--dtype", case.dtype, "--seed", str(seed))
    return memory.in_own_process("benchmarks.linear", (candidate.name, *sizes, *options))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the bytes by which one candidate raises the resident memory of this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear")
    choices = {candidate.name: candidate for candidate in (PEER, *CANDIDATES)}
    parser.add_argument("candidate", choices=choices)
    for size in ("tokens", "d", "n"):
        parser.add_argument(size, type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    case = Case((options.tokens, options.d, options.n), options.dtype)
    args = jax.block_until_ready(arguments(case, options.seed))
    program = choices[options.candidate].program(args)
    print(memory.rise(lambda: program.call(*args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
