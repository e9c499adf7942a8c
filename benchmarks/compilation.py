"""How long a training step of a deep model takes to trace, lower and compile."""

import dataclasses
import gc
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxsoft
from benchmarks.tables import Grid
from jaxsoft._demo.timing import compared

WIDTH, HEADS, WORDS = 64, 4, 1000
STAGES = ("trace", "lower", "compile", "all three")
CAPTION = (
    "A step of training of a transformer as pure functions: attention by softmax, the mean "
    "cross-entropy of the next word, Adam. The layers are unrolled, so that each of them is traced "
    "and compiled. jaxsoft's functions against jax.nn.softmax and optax, in turns, all of JAX's "
    "caches cleared before each; medians, and for the ratio its quartiles. Equations are counted "
    "with those of inner functions, instructions with those inside fusions."
)

Softmax = Callable[..., Array]
Loss = Callable[[Array, Array], Array]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """The depth, the words of a sequence, and how often each program is compiled."""

    layers: int
    length: int
    rounds: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of one program.

    Attributes:
        seconds: of each of the `STAGES`.
        equations: of its jaxpr.
        instructions: of the HLO that XLA compiled.
    """

    seconds: tuple[float, ...]
    equations: int
    instructions: int


def cases(*, quick: bool) -> list[Case]:
    """All that is measured: with many keys to attend to, and with few."""
    return [Case(2, 16, 2)] if quick else [Case(12, 64, 6), Case(12, 16, 6)]


# ---------------------------------------------------------------------------------------- model


def _init(key: Array, case: Case) -> Params:
    keys = iter(jax.random.split(key, 2 + 6 * case.layers))

    def normal(*shape: int) -> Array:
        return shape[-2] ** -0.5 * jax.random.normal(next(keys), shape, jnp.float32)

    square, wide = (WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
    shapes = {"query": square, "key": square, "value": square, "mix": square, "up": wide}
    return {
        "words": normal(WORDS, WIDTH),
        "head": normal(WIDTH, WORDS),
        "layers": [
            {name: normal(*shape) for name, shape in (shapes | {"down": wide[::-1]}).items()}
            for _ in range(case.layers)
        ],
    }


def _normalised(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _logits(params: Params, words: Array, softmax: Softmax) -> Array:
    batch, length = words.shape
    x = params["words"][words]
    mask = jnp.tri(length, dtype=bool)
    for layer in params["layers"]:
        y = _normalised(x)
        query, key, value = (
            (y @ layer[name]).reshape(batch, length, HEADS, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (WIDTH // HEADS) ** -0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", softmax(scores, where=mask), value)
        x = x + mixed.reshape(x.shape) @ layer["mix"]
        x = x + jax.nn.relu(_normalised(x) @ layer["up"]) @ layer["down"]
    return _normalised(x) @ params["head"]


def step(softmax: Softmax, loss: Loss) -> Callable[..., tuple[Params, Any, Array]]:
    """A step of Adam on the mean loss. It is another function at each call."""
    adam = optax.adam(1e-3)

    def mean_loss(params: Params, words: Array) -> Array:
        return jnp.mean(loss(_logits(params, words[:, :-1], softmax), words[:, 1:]))

    def step(params: Params, state: Any, words: Array) -> tuple[Params, Any, Array]:
        value, gradient = jax.value_and_grad(mean_loss)(params, words)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    return step


PROGRAMS: tuple[tuple[Softmax, Loss], ...] = (
    (jaxsoft.softmax, jaxsoft.cross_entropy),
    (jax.nn.softmax, optax.softmax_cross_entropy_with_integer_labels),
)


def arguments(case: Case) -> tuple[Params, Any, Array]:
    """Parameters, the state of Adam, and a batch."""
    params = _init(jax.random.key(0), case)
    words = jax.random.randint(jax.random.key(1), (8, case.length + 1), 0, WORDS, jnp.int32)
    return params, optax.adam(1e-3).init(params), words


# ---------------------------------------------------------------------------------- measurement


def measure(case: Case) -> Grid:
    """The table of one case."""
    args = jax.eval_shape(lambda: arguments(case))
    for program in PROGRAMS:
        compiled(step(*program), args)  # the first of a process imports, and starts threads
    found: tuple[list[Compiled], list[Compiled]] = ([], [])
    order = [0, 1]
    for _ in range(case.rounds):
        for i in order:
            found[i].append(compiled(step(*PROGRAMS[i]), args))
        order.reverse()
    seconds = [list(zip(*(one.seconds for one in runs), strict=True)) for runs in found]
    rows = []
    for stage, own, peer in zip(STAGES, *seconds, strict=True):
        t = compared(own, peer)
        ratio = f"{t.ratio:.2f} ({t.low:.2f}–{t.high:.2f})"
        rows.append((f"{stage}, s", f"{t.seconds:.2f}", f"{t.peer_seconds:.2f}", ratio))
    own, peer = (runs[-1] for runs in found)
    for name in ("equations", "instructions"):
        ours, theirs = getattr(own, name), getattr(peer, name)
        rows.append((_SIZES[name], f"{ours:,}", f"{theirs:,}", f"{ours / theirs:.2f}"))
    heading = f"{case.layers} layers, {case.length} keys"
    return Grid((heading, "jaxsoft", "jax.nn and optax", "ratio"), tuple(rows))


_SIZES = {
    "equations": "equations of the jaxpr",
    "instructions": "instructions of the compiled HLO",
}


def compiled(function: Callable[..., Any], args: tuple[Any, ...]) -> Compiled:
    """Compiles a function that nothing has been kept of."""
    jax.clear_caches()
    gc.collect()  # else what is left of one program is cleared away in the time of the next
    times = [time.perf_counter()]
    traced = jax.jit(function).trace(*args)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    program = lowered.compile()
    times.append(time.perf_counter())
    stages = [after - before for before, after in itertools.pairwise(times)]
    instructions = re.findall(r"^ +(?:ROOT )?%?[\w.-]+ = ", program.as_text(), re.MULTILINE)
    return Compiled(
        seconds=(*stages, times[-1] - times[0]),
        equations=equations(traced.jaxpr.jaxpr),
        instructions=len(instructions),
    )


def equations(jaxpr: Any) -> int:
    """The equations of a jaxpr; those that hold others do not count themselves."""
    count = 0
    for equation in jaxpr.eqns:
        held = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(equation.params)]
        inner = [leaf for leaf in held if hasattr(leaf, "eqns")]
        count += sum(map(equations, inner)) if inner else 1
    return count
