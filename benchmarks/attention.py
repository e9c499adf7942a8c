"""Attention: its time, memory, digits and compilation against jax.nn, and tokamax in chunks."""

import dataclasses
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxsoft
from benchmarks import speed
from benchmarks.accuracy import relative
from benchmarks.compilation import compiled
from benchmarks.memory import mebibytes
from benchmarks.tables import Grid
from jaxsoft._demo.speed import scratch_bytes
from jaxsoft._demo.timing import compared
from tests.exact import Exact

Operands = tuple[Array, Array, Array]  # queries, keys, values
Attention = Callable[..., Array]
Computation = Callable[[Operands, Array, Operands], Any]  # of operands, a cotangent, tangents

HEADS, FEATURES = 8, 64
LENGTHS = (512, 2048, 8192)
QUICK_LENGTHS = (256,)
SIXTEEN_BIT = 2048
GAPS = (5, 17, 20, 30, 40)

OWN, PEER, OPTIONAL = NAMES = ("jaxsoft", "jax.nn", "tokamax")

COLUMNS = (
    f"attention, T = S, {HEADS} heads of {FEATURES} features",
    "jaxsoft, ms",
    "time / jax.nn",
    "time / tokamax",
    *(f"temporary of {name}, MiB" for name in NAMES),
)
CAPTION = (
    "jaxsoft.dot_product_attention against jax.nn.dot_product_attention and "
    'tokamax.dot_product_attention with implementation="xla_chunked", under jit, one sequence; '
    "loss: Σ g ∘ O with a random g; derivatives are those by queries, keys and values. Time of "
    "jaxsoft divided by that of the other: the median over rounds that time all in turn in one "
    "process, and its quartiles. temporary: what the compiled program needs besides arguments and "
    "results, by XLA's memory_analysis. At the largest size there are two rounds, of what takes no "
    "minute. A program that needs more than 5 GiB is not run."
)
ACCURACY_CAPTION = (
    "The relative error of the gradient of the loss by the score of the dominant key, in float32 "
    "and by way of the bias, against 50 digits: the largest of 16 queries, whose other scores are "
    "lower by the gap and more. The terms of the exact sum have one sign, so nothing cancels in "
    "it. “all”: no digit is right."
)
COMPILE_CAPTION = (
    "Seconds from the function of loss + gradient to its compiled program, all of JAX's caches "
    "cleared before: the median over rounds that compile all in turn, and the ratios as above."
)

_ROUNDS, _FEW = 6, 2
_LIMIT = 5 * 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """A quantity at one size; what has no rounds is compiled and not timed."""

    quantity: str
    length: int
    dtype: str
    causal: bool = False
    rounds: int = _ROUNDS

    @property
    def title(self) -> str:
        """What it is called."""
        causal = ", causal" if self.causal else ""
        return f"{self.quantity}{causal}, {self.dtype}, {self.length}"


class Result(NamedTuple):
    """A row of the table, under `COLUMNS`, and why tokamax is left out of it, if it is."""

    row: tuple[str, ...]
    left_out: str | None


# --------------------------------------------------------------------------------- quantities


def _tokamax(*args: Any, **options: Any) -> Array:
    attention = importlib.import_module("tokamax").dot_product_attention
    # It would take the options of this command for its own.
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
    return attention(*args, implementation="xla_chunked", **options)


ATTENTIONS: Mapping[str, Attention] = {
    OWN: jaxsoft.dot_product_attention,
    PEER: jax.nn.dot_product_attention,
    OPTIONAL: _tokamax,
}


def _installed() -> list[str]:
    """Those of `NAMES` that are there."""
    try:
        importlib.import_module(OPTIONAL)
    except ImportError:
        return [OWN, PEER]
    return list(NAMES)


def _loss(attention: Attention) -> Callable[[Operands, Array], Array]:
    return lambda x, g: jnp.vdot(attention(*x), g, preferred_element_type=jnp.float32)


def _forward(attention: Attention) -> Computation:
    return lambda x, g, tangents: attention(*x)


def _loss_and_gradient(attention: Attention) -> Computation:
    return lambda x, g, tangents: jax.value_and_grad(_loss(attention))(x, g)


def _jvp(attention: Attention) -> Computation:
    return lambda x, g, tangents: jax.jvp(lambda x: attention(*x), (x,), (tangents,))


def _hessian_vector_product(attention: Attention) -> Computation:
    gradient = jax.grad(_loss(attention))
    return lambda x, g, tangents: jax.jvp(lambda x: gradient(x, g), (x,), (tangents,))[1]


GRADIENT = "loss + gradient"
QUANTITIES: dict[str, Callable[[Attention], Computation]] = {
    "forward": _forward,
    GRADIENT: _loss_and_gradient,
    "jvp": _jvp,
    "Hessian-vector product": _hessian_vector_product,
}
_CHEAPER = ("forward", GRADIENT)  # timed at the largest size and in 16 bits as well


def cases(*, quick: bool) -> list[Case]:
    """All that is measured, in the order of the table."""
    found = []
    for length in QUICK_LENGTHS if quick else LENGTHS:
        for quantity in QUANTITIES:
            few = _FEW if quantity in _CHEAPER else 0
            rounds = few if length == LENGTHS[-1] else _ROUNDS
            found.append(Case(quantity, length, "float32", rounds=rounds))
            if quantity == GRADIENT:
                found.append(Case(quantity, length, "float32", causal=True, rounds=rounds))
    narrow = QUICK_LENGTHS[0] if quick else SIXTEEN_BIT
    return found + [Case(quantity, narrow, "bfloat16") for quantity in _CHEAPER]


def program(case: Case, name: str) -> Computation:
    """What is compiled of one case, by the name of who computes it."""
    attention = functools.partial(ATTENTIONS[name], is_causal=case.causal)
    return QUANTITIES[case.quantity](attention)


@functools.partial(jax.jit, static_argnames="case")
def arguments(case: Case, seed: int) -> tuple[Operands, Array, Operands]:
    """Random queries, keys and values; a cotangent of the output; tangents."""
    shape = (7, 1, case.length, HEADS, FEATURES)
    drawn = jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(case.dtype)
    q, k, v, g, *tangents = drawn
    return (q, k, v), g, tuple(tangents)


# ------------------------------------------------------------------------------ time and memory


def measure(case: Case, seconds: float, seed: int) -> Result:
    """Compiles all, and times those that may run, for about `seconds` or the rounds of the case."""
    args = jax.eval_shape(lambda: arguments(case, seed))
    programs: dict[str, Any] = {}
    left_out = None
    for name in _installed():
        try:
            programs[name] = jax.jit(program(case, name)).lower(*args).compile()
        except Exception as error:
            if name != OPTIONAL:
                raise
            first, *_ = f"{type(error).__name__}: {error}".splitlines()
            left_out = f"{name}, {case.quantity}: left out, {first}"
    memory = {name: scratch_bytes(run) for name, run in programs.items()}
    samples: dict[str, list[float]] = {}
    if case.rounds:
        args = jax.block_until_ready(arguments(case, seed))
        chosen = [name for name in programs if (memory[name] or 0) <= _LIMIT]
        timed = {name: lambda run=programs[name]: _seconds(run, args) for name in chosen}
        samples = _samples(timed, case.rounds, 0 if case.rounds == _FEW else seconds)
    row = case.title, *_times(samples, 1e3, 0), *(mebibytes(memory.get(name)) for name in NAMES)
    return Result(row, left_out)


def _seconds(run: Callable[..., Any], args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


# `timings` of the demonstration calls each program twice before the rounds; at the largest size a
# call takes ten seconds.
def _samples(
    timed: Mapping[str, Callable[[], float]], rounds: int, seconds: float = 0.0
) -> dict[str, list[float]]:
    """The seconds of each, round by round; the first of one round is the last of the next."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    end = time.perf_counter() + seconds
    order = list(timed)
    done = 0
    while done < rounds or done % 2 or time.perf_counter() < end:
        for name in order:
            samples[name].append(timed[name]())
        order.reverse()
        done += 1
    return samples


def _times(samples: Mapping[str, list[float]], units: float, digits: int) -> tuple[str, ...]:
    """The median time of jaxsoft, given the units of a second, and its ratios to the others."""
    own = samples.get(OWN)
    if own is None:
        return "–", "–", "–"
    peers = (samples.get(name) for name in (PEER, OPTIONAL))
    ratios = ("–" if peer is None else speed.ratio(compared(own, peer)) for peer in peers)
    return f"{units * statistics.median(own):.{digits}f}", *ratios


# ------------------------------------------------------------------------------------- accuracy


def digits() -> Grid:
    """The error of the gradient by the score of the dominant key, one row for each gap."""
    rows = [(f"gap {gap}", *map(relative, errors(gap).values())) for gap in GAPS]
    return Grid(("relative error of ∂loss/∂s", *_installed()), tuple(rows))


def errors(gap: float) -> dict[str, float]:
    """The largest relative error of each library that is installed."""
    queries, keys, features = 16, 8, FEATURES
    rng = np.random.default_rng(0)
    # The distances are exact in float32. The dominant key has the only positive values.
    scores = -rng.integers(0, 8, (queries, keys)).astype(np.float32) / 4
    scores[:, 0] = gap
    values = -np.abs(rng.normal(size=(keys, features))).astype(np.float32)
    values[0] *= -1
    g = np.abs(rng.normal(size=(queries, features))).astype(np.float32)
    u = g.astype(np.float64) @ values.T.astype(np.float64)
    exact = [Exact(row).jacobian_product(v)[0][0] for row, v in zip(scores, u, strict=True)]
    wanted = np.array(exact, np.float64)
    found = {}
    for name in _installed():
        computed = _by_bias(name, scores[None, None], values[None, :, None], g[None, :, None])
        found[name] = float(np.max(np.abs(np.asarray(computed)[0, 0, :, 0] / wanted - 1)))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _by_bias(name: str, bias: Array, v: Array, g: Array) -> Array:
    """The gradient by the bias, where keys are 0 and the bias makes the scores."""
    operands = jnp.ones_like(g), jnp.zeros_like(v), v
    return jax.grad(lambda bias: jnp.vdot(ATTENTIONS[name](*operands, bias), g))(bias)


# ---------------------------------------------------------------------------------- compilation


def compilation(*, quick: bool) -> Grid:
    """The time of tracing, lowering and compiling loss and gradient."""
    length = QUICK_LENGTHS[0] if quick else SIXTEEN_BIT
    chosen = [Case(GRADIENT, length, "float32", causal) for causal in (False, True)]
    rows = [_compilation(case, _FEW if quick else 2 * _FEW) for case in chosen]
    columns = ("jaxsoft, s", "time / jax.nn", "time / tokamax")
    return Grid(("trace, lower and compile", *columns), tuple(rows))


def _compilation(case: Case, rounds: int) -> tuple[str, ...]:
    args = jax.eval_shape(lambda: arguments(case, 0))
    programs = {name: program(case, name) for name in _installed()}
    timed = {
        name: lambda function=function: compiled(function, args).seconds[-1]
        for name, function in programs.items()
    }
    for each in timed.values():
        each()  # the first of a process imports, and starts threads
    return case.title, *_times(_samples(timed, rounds), 1, 2)
