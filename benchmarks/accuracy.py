"""The error of jaxsoft and its peers on the same rows, against 50-digit arithmetic."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax

import jaxsoft
from benchmarks.tables import Grid
from jaxsoft.testing import error_in_eps
from tests.exact import DTYPES, EPS, Exact, rows

Row = np.ndarray
Computation = Callable[[Row], Any]  # of a row of logits; labels and one-hot vectors are of its top

ROWS = {
    "float32": (
        "random n=10",
        "random n=1000",
        "all tied",
        "offset 1e+06",
        "gap 17",
        "gap 20, spread",
        "gap 40",
        "gap 80, spread",
    ),
    "bfloat16": ("random n=1000", "gap 10", "gap 20"),
    "float16": ("random n=1000", "gap 10"),
}

CAPTION = (
    "The largest error of an entry of one row, in eps of its dtype, against 50 digits: relative to "
    "the entry; of logsumexp to max(|out|, Σ p |x|); of the VJP to p_i Σ_j p_j |g_i − g_j|. The "
    "label, and the 1 of the one-hot cotangent g, are at the maximum. “all” means that no digit is "
    "right, as where a result is exactly 0 and should not be. allowed: the contract of jaxsoft, in "
    "which gap/2, the rounding of the logits' own distance, is contained."
)

_PEERS = ("jax.nn", "optax", "torch", "scipy", "jaxsoft")


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is computed.

    Attributes:
        exact: its value and the scale of its error, None for the value itself.
        allowed: the contract in eps, given the widest gap.
        of: how each library computes it.
    """

    exact: Callable[[Exact], tuple[Any, Any]]
    allowed: Callable[[str, float], float]
    of: dict[str, Computation]


# ----------------------------------------------------------------------------------- quantities


def _top(row: Row) -> int:
    return int(np.argmax(row))


def _one_hot(row: Row) -> Row:
    return np.eye(1, row.size, _top(row))[0].astype(row.dtype)


def _pulled_back(function: Callable[..., Any]) -> Computation:
    return jax.jit(
        lambda x: jax.vjp(function, x)[1](jax.nn.one_hot(jnp.argmax(x), x.size, dtype=x.dtype))[0]
    )


def _labelled(loss: Callable[..., Any]) -> Computation:
    return jax.jit(lambda x: loss(x, jnp.argmax(x)))


def _gradient(loss: Callable[..., Any]) -> Computation:
    return jax.jit(jax.grad(lambda x: loss(x, jnp.argmax(x))))


def _plain_loss(x: Any, label: Any) -> Any:
    return -jax.nn.log_softmax(x)[label]


def in_torch(function: Callable[[Any, Any, Any], Any]) -> Computation:
    """Calls it with torch, a row and its label, and takes what it returns back to numpy."""

    def computed(row: Row) -> Any:
        torch = importlib.import_module("torch")
        wide = torch.tensor(row.astype(np.float32), requires_grad=True)
        x = wide.detach().to(getattr(torch, row.dtype.name)).requires_grad_()
        return function(torch, x, torch.tensor(_top(row))).detach().float().numpy()

    return computed


def _torch_vjp(torch: Any, x: Any, label: Any) -> Any:
    return torch.autograd.grad(torch.softmax(x, -1)[label], x)[0]


def _torch_loss(torch: Any, x: Any, label: Any) -> Any:
    return torch.nn.functional.cross_entropy(x, label)


def _torch_gradient(torch: Any, x: Any, label: Any) -> Any:
    return torch.autograd.grad(_torch_loss(torch, x, label), x)[0]


def _in_scipy(name: str) -> Computation:
    def computed(row: Row) -> Any:
        return getattr(importlib.import_module("scipy.special"), name)(row)

    return computed


def _of_logsumexp(exact: Exact) -> tuple[Any, Any]:
    mean = mpmath.fsum(p * abs(x) for p, x in zip(exact.p, exact.x, strict=True))
    return exact.logsumexp, max(abs(exact.logsumexp), mean)


def _of_gradient(exact: Exact) -> tuple[Any, Any]:
    top = _top(exact.row)
    others = mpmath.fsum(p for i, p in enumerate(exact.p) if i != top)
    return exact.rounded([-others if i == top else p for i, p in enumerate(exact.p)]), None


def _of_vjp(exact: Exact) -> tuple[Any, Any]:
    product, scale = exact.jacobian_product(_one_hot(exact.row))
    return exact.rounded(product), scale


def _allowed(wide: float, narrow: float, gaps: float = 0.5) -> Callable[[str, float], float]:
    return lambda dtype, gap: wide + gaps * gap if dtype == "float32" else narrow


_optax = optax.softmax_cross_entropy_with_integer_labels
QUANTITIES = {
    "softmax": Quantity(
        lambda exact: (exact.rounded(exact.p), None),
        _allowed(6, 0.6),
        {
            "jax.nn": jax.jit(jax.nn.softmax),
            "torch": in_torch(lambda torch, x, _: torch.softmax(x, -1)),
            "scipy": _in_scipy("softmax"),
            "jaxsoft": jaxsoft.softmax,
        },
    ),
    "log_softmax": Quantity(
        lambda exact: (exact.rounded(exact.log_p), None),
        _allowed(6, 0.6),
        {
            "jax.nn": jax.jit(jax.nn.log_softmax),
            "torch": in_torch(lambda torch, x, _: torch.log_softmax(x, -1)),
            "scipy": _in_scipy("log_softmax"),
            "jaxsoft": jaxsoft.log_softmax,
        },
    ),
    "logsumexp": Quantity(
        _of_logsumexp,
        _allowed(3, 0.6, gaps=0),
        {
            "jax.nn": jax.jit(jax.nn.logsumexp),
            "torch": in_torch(lambda torch, x, _: torch.logsumexp(x, -1)),
            "scipy": _in_scipy("logsumexp"),
            "jaxsoft": jaxsoft.logsumexp,
        },
    ),
    "softmax's VJP": Quantity(
        _of_vjp,
        _allowed(8, 2, gaps=1),  # an entry is a product of two probabilities
        {
            "jax.nn": _pulled_back(jax.nn.softmax),
            "torch": in_torch(_torch_vjp),
            "jaxsoft": _pulled_back(jaxsoft.softmax),
        },
    ),
    "cross-entropy": Quantity(
        lambda exact: (-exact.log_p[_top(exact.row)], None),
        _allowed(6, 0.6),
        {
            "jax.nn": _labelled(_plain_loss),
            "optax": _labelled(_optax),
            "torch": in_torch(_torch_loss),
            "jaxsoft": _labelled(jaxsoft.cross_entropy),
        },
    ),
    "its gradient": Quantity(
        _of_gradient,
        _allowed(8, 0.6),
        {
            "jax.nn": _gradient(_plain_loss),
            "optax": _gradient(_optax),
            "torch": in_torch(_torch_gradient),
            "jaxsoft": _gradient(jaxsoft.cross_entropy),
        },
    ),
}

# ---------------------------------------------------------------------------------- measurement


@dataclasses.dataclass(frozen=True)
class Case:
    """One quantity of one row."""

    quantity: str
    dtype: str
    row: str


def cases() -> list[Case]:
    """All that is measured, in the order of the table."""
    return [Case(q, dtype, row) for q in QUANTITIES for dtype in ROWS for row in ROWS[dtype]]


def measure(case: Case) -> dict[str, float]:
    """The error of each library that is installed and computes this, and what is allowed."""
    quantity = QUANTITIES[case.quantity]
    exact = Exact(rows(case.dtype)[case.row].astype(DTYPES[case.dtype]))
    value, scale = quantity.exact(exact)
    found = {}
    for peer, computed in quantity.of.items():
        try:
            result = np.asarray(computed(exact.row))
        except ImportError:
            continue
        # The loss of 16-bit logits is a float32 number, in the eps of the logits all the same.
        error = error_in_eps(result, value, scale=scale, dtype=case.dtype)
        found[peer] = float(np.max(error))
    found["allowed"] = quantity.allowed(case.dtype, float(exact.gaps.max()))
    return found


def grid(errors: dict[Case, dict[str, float]]) -> Grid:
    """One table of all."""
    peers = [
        peer for peer in (*_PEERS, "allowed") if any(peer in found for found in errors.values())
    ]
    lines = []
    for case, found in errors.items():
        values = [in_eps(found[peer], case.dtype) if peer in found else "–" for peer in peers]
        lines.append((f"{case.quantity}, {case.dtype}, {case.row}", *values))
    return Grid(("error in eps", *peers), tuple(lines))


def in_eps(error: float, dtype: str) -> str:
    """An error that is counted in eps."""
    return "all" if error > 0.99 / EPS[dtype] else f"{error:.2f}" if error < 100 else f"{error:.2g}"


def relative(error: float) -> str:
    """A relative error that is not counted in eps."""
    return f"{error:.1e}" if error < 0.99 else "all"
