"""What `python -m jaxsoft` shows beside its checks: speed, memory, and a classifier for Iris.

Every function here measures one thing and returns plain data; `_report` displays it.
"""

import dataclasses
import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import jaxsoft
from jaxsoft.testing import error_in_eps

Step = TypeVar("Step")


class Track(Protocol):
    """Passes steps on one by one, and displays how many are done."""

    def __call__(self, steps: Sequence[Step], description: str, /) -> Iterable[Step]: ...


# ------------------------------------------------------------------------------ time and memory

_SAMPLE_SECONDS = 2e-3  # shorter samples would measure the clock and the dispatch


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Time and memory of one quantity: jaxsoft against a peer, interleaved in one process.

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
        temporary_bytes: scratch memory of the compiled program, None where XLA does not say.
        peer_temporary_bytes: that of the peer.
    """

    quantity: str
    peer: str
    shape: tuple[int, int]
    dtype: str
    seconds: float
    peer_seconds: float
    ratio: float
    low: float
    high: float
    temporary_bytes: int | None
    peer_temporary_bytes: int | None


def compare(seed: int, *, quick: bool, track: Track) -> tuple[Comparison, ...]:
    """Times the softmax and the cross-entropy, forward and with their gradient."""
    shapes = [(8192, 10), (256, 1000)] if quick else [(65536, 10), (4096, 1000), (64, 50304)]
    rounds = 7 if quick else 15
    cases = [
        (quantity, shape, dtype)
        for dtype in (jnp.float32, jnp.bfloat16)
        for shape in shapes
        for quantity in _QUANTITIES
    ]
    return tuple(
        _comparison(quantity, shape, jnp.dtype(dtype), seed, rounds)
        for quantity, shape, dtype in track(cases, "time and memory")
    )


def geometric_mean(comparisons: Iterable[Comparison]) -> float:
    """The geometric mean of the ratios."""
    return statistics.geometric_mean(comparison.ratio for comparison in comparisons)


def _with_pullback(softmax: Callable[[Array], Array]) -> Callable[[Array, Array], Any]:
    def forward_and_backward(x: Array, cotangent: Array) -> tuple[Array, Array]:
        p, pullback = jax.vjp(softmax, x)
        return p, pullback(cotangent)[0]

    return forward_and_backward


def _with_gradient(loss: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Any]:
    return jax.value_and_grad(lambda x, labels: jnp.mean(loss(x, labels)))


def _optax_loss(x: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


# Functions of (logits, cotangent, labels): those of jaxsoft, the peer's name and its function.
_QUANTITIES: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "softmax": (
        "jax.nn",
        lambda x, g, y: jaxsoft.softmax(x),
        lambda x, g, y: jax.nn.softmax(x),
    ),
    "softmax + VJP": (
        "jax.nn",
        lambda x, g, y: _with_pullback(jaxsoft.softmax)(x, g),
        lambda x, g, y: _with_pullback(jax.nn.softmax)(x, g),
    ),
    "cross-entropy": (
        "optax",
        lambda x, g, y: jaxsoft.cross_entropy(x, y),
        lambda x, g, y: _optax_loss(x, y),
    ),
    "… + gradient": (
        "optax",
        lambda x, g, y: _with_gradient(jaxsoft.cross_entropy)(x, y),
        lambda x, g, y: _with_gradient(_optax_loss)(x, y),
    ),
}


def _comparison(
    quantity: str, shape: tuple[int, int], dtype: jnp.dtype, seed: int, rounds: int
) -> Comparison:
    keys = jax.random.split(jax.random.key(seed), 3)
    args = (
        4 * jax.random.normal(keys[0], shape, dtype),
        jax.random.normal(keys[1], shape, dtype),
        jax.random.randint(keys[2], shape[:1], 0, shape[1]),
    )
    peer, *functions = _QUANTITIES[quantity]
    programs = [jax.jit(function).lower(*args).compile() for function in functions]
    own, other = _interleaved_seconds(programs, args, rounds)
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    memory = [_temporary_bytes(program) for program in programs]
    return Comparison(
        quantity=quantity,
        peer=peer,
        shape=shape,
        dtype=dtype.name,
        seconds=statistics.median(own),
        peer_seconds=statistics.median(other),
        ratio=ratio,
        low=low,
        high=high,
        temporary_bytes=memory[0],
        peer_temporary_bytes=memory[1],
    )


# One sample of each in turn, the first of a pair changing: what else the machine does meanwhile,
# and what the caches hold, falls on both alike.
def _interleaved_seconds(
    programs: Sequence[Callable[..., Any]], args: tuple[Array, ...], rounds: int
) -> tuple[list[float], ...]:
    def sample(program: Callable[..., Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(program(*args))
        return (time.perf_counter() - start) / calls

    for program in programs:
        sample(program, 1)  # the first call pays for more than its work
    longest = max(sample(program, 1) for program in programs)
    calls = math.ceil(_SAMPLE_SECONDS / longest)
    seconds: tuple[list[float], ...] = tuple([] for _ in programs)
    for turn in range(rounds):
        order = range(len(programs)) if turn % 2 else reversed(range(len(programs)))
        for i in order:
            seconds[i].append(sample(programs[i], calls))
    return seconds


def _temporary_bytes(program: Any) -> int | None:
    try:
        analysis = program.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    return None if analysis is None else int(analysis.temp_size_in_bytes)


# ----------------------------------------------------------------------------------------- Iris

_HELD_OUT = 30
_LEAST_ACCURACY = 0.8  # a third of the flowers would be right by chance
_JACOBIAN_TOLERANCE = 32.0  # eps of its largest entry


@dataclasses.dataclass(frozen=True)
class Training:
    """A classifier of Iris flowers, trained with Optax through `jaxsoft.cross_entropy`.

    Attributes:
        classes: names of the species.
        features: names of the measurements.
        train_loss: mean loss on the flowers trained on, before each step.
        held_out_loss: mean loss on the others, before each step.
        held_out: the number of flowers held out.
        correct: how many of them are classified correctly.
        accuracy: the same as a fraction.
        flower: measurements of the held-out flower that the classifier is least sure of.
        species: its true class.
        probabilities: of each class, for this flower.
        jacobian: entry [i][j] is the derivative of probability i with respect to logit j.
        jacobian_error: of the Jacobian against diag(p) - p pᵀ in float64, in eps of its largest
            entry.
        failures: what is wrong.
    """

    classes: tuple[str, ...]
    features: tuple[str, ...]
    train_loss: tuple[float, ...]
    held_out_loss: tuple[float, ...]
    held_out: int
    correct: int
    accuracy: float
    flower: tuple[float, ...]
    species: str
    probabilities: tuple[float, ...]
    jacobian: tuple[tuple[float, ...], ...]
    jacobian_error: float
    failures: tuple[str, ...]


def train_on_iris(seed: int, *, quick: bool, track: Track) -> Training:
    """Trains multinomial logistic regression on the Iris data, and looks at one flower."""
    # Imported by name, for scikit-learn has no types.
    datasets = importlib.import_module("sklearn.datasets")
    model_selection = importlib.import_module("sklearn.model_selection")
    iris: Any = datasets.load_iris()
    train, held_out, train_labels, held_out_labels = model_selection.train_test_split(
        iris.data, iris.target, test_size=_HELD_OUT, stratify=iris.target, random_state=seed
    )
    mean, deviation = train.mean(0), train.std(0)

    def prepared(flowers: Any) -> Float[Array, "flower feature"]:
        return jnp.asarray((flowers - mean) / deviation, jnp.float32)

    train_set = prepared(train), jnp.asarray(train_labels, jnp.int32)
    held_out_set = prepared(held_out), jnp.asarray(held_out_labels, jnp.int32)
    classes = tuple(str(name) for name in iris.target_names)
    params = Params(jnp.zeros((train.shape[1], len(classes))), jnp.zeros(len(classes)))
    optimizer = optax.adam(0.1)
    state = params, optimizer.init(params)
    losses: list[Any] = []
    for _ in track(range(10 if quick else 40), "training on Iris"):
        state, chunk = _train_ten_steps(optimizer, state, train_set, held_out_set)
        losses.append(chunk)
    train_loss, held_out_loss = np.concatenate(losses, axis=1).tolist()

    logits = _logits(state[0], held_out_set[0])
    p = jaxsoft.softmax(logits)
    correct = int(jnp.sum(jnp.argmax(p, axis=-1) == held_out_set[1]))
    unsure = int(jnp.argmax(jaxsoft.entropy(logits)))
    jacobian = jax.jacfwd(jaxsoft.softmax)(logits[unsure])
    error = _jacobian_error(np.asarray(jacobian), np.asarray(logits[unsure], np.float64))
    failures: list[str] = []
    if not train_loss[-1] < train_loss[0]:
        failures.append(f"Iris: the loss went from {train_loss[0]:.3g} to {train_loss[-1]:.3g}")
    if correct < _LEAST_ACCURACY * _HELD_OUT:
        failures.append(f"Iris: {correct} of {_HELD_OUT} held-out flowers are right")
    if not error <= _JACOBIAN_TOLERANCE:
        failures.append(f"Iris: the Jacobian at one flower is off by {error:.3g} eps")
    return Training(
        classes=classes,
        features=tuple(iris.feature_names),
        train_loss=tuple(train_loss),
        held_out_loss=tuple(held_out_loss),
        held_out=_HELD_OUT,
        correct=correct,
        accuracy=correct / _HELD_OUT,
        flower=tuple(held_out[unsure].tolist()),
        species=classes[held_out_labels[unsure]],
        probabilities=tuple(p[unsure].tolist()),
        jacobian=tuple(tuple(row) for row in jacobian.tolist()),
        jacobian_error=error,
        failures=tuple(failures),
    )


