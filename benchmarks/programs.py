"""The size of the programs of functions and their derivatives, and how long they take to trace."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxsoft
from benchmarks.compilation import Compiled, compiled

CAPTION = (
    "The gradient of a function, a Hessian-vector product (forward mode over reverse), and the "
    "gradient of that, for 8 rows of n classes: jaxsoft divided by jax.nn, or by optax for the "
    "loss. Equations are counted with those of inner functions, instructions with those inside "
    "fusions. First trace: the median over rounds that trace both in turn, all of JAX's caches "
    "cleared before each; in brackets the milliseconds."
)

ROWS = 8
SIZES = (2, 10, 16, 17, 1000)
QUICK_SIZES = (10,)
_ROUNDS = 5

Function = Callable[[Array], Array]

LABELS = jnp.arange(ROWS) % 2
QUANTITIES: dict[str, tuple[Function, Function]] = {
    "softmax": (jaxsoft.softmax, jax.nn.softmax),
    "log_softmax": (jaxsoft.log_softmax, jax.nn.log_softmax),
    "loss": (
        lambda x: jaxsoft.cross_entropy(x, LABELS),
        lambda x: optax.softmax_cross_entropy_with_integer_labels(x, LABELS),
    ),
}


class Case(NamedTuple):
    """A quantity, how it is differentiated, and the number of classes."""

    quantity: str
    derivative: str
    n: int


def _gradient(function: Function) -> Function:
    return jax.grad(lambda x: jnp.sum(jnp.sin(function(x))))


def _hessian_vector_product(function: Function) -> Function:
    return lambda x: jax.jvp(_gradient(function), (x,), (jnp.cos(x),))[1]


def _third(function: Function) -> Function:
    return jax.grad(lambda x: jnp.sum(_hessian_vector_product(function)(x) ** 2))


DERIVATIVES = {
    "gradient": _gradient,
    "Hessian-vector product": _hessian_vector_product,
    "gradient of that": _third,
}

COLUMNS = ("quantity", "n", "equations", "instructions", "first trace")


def cases(*, quick: bool) -> list[Case]:
    """All that is measured."""
    return [
        Case(quantity, derivative, n)
        for quantity in QUANTITIES
        for derivative in DERIVATIVES
        for n in (QUICK_SIZES if quick else SIZES)
    ]


def measure(case: Case, *, quick: bool) -> tuple[str, ...]:
    """One row of the table."""
    x = jax.ShapeDtypeStruct((ROWS, case.n), jnp.float32)
    derivative = DERIVATIVES[case.derivative]
    found: tuple[list[Compiled], list[Compiled]] = ([], [])
    order = [0, 1]
    for _ in range(1 if quick else _ROUNDS):
        for i in order:
            function = derivative(QUANTITIES[case.quantity][i])
            found[i].append(compiled(function, (x,)))
        order.reverse()
    own, peer = found
    traces = [[one.seconds[0] for one in runs] for runs in found]
    ratio = statistics.median(a / b for a, b in zip(*traces, strict=True))
    times = "/".join(f"{1e3 * statistics.median(runs):.0f}" for runs in traces)
    return (
        f"{case.quantity}, {case.derivative}",
        f"{case.n}",
        _ratio(own[-1].equations, peer[-1].equations),
        _ratio(own[-1].instructions, peer[-1].instructions),
        f"{ratio:.1f} ({times})",
    )


def _ratio(own: int, peer: int) -> str:
    return f"{own / peer:.2f} ({own}/{peer})"
