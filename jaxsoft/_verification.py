"""The checks of `python -m jaxsoft`: is softmax, and its derivative, right on this machine?

Every function here checks one thing and returns plain data, in which `failures` says what is
wrong; `_report` displays it.
"""

import dataclasses
import decimal
import functools
import math
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from jaxtyping import Array, Float

import jaxsoft
from jaxsoft import testing

Step = TypeVar("Step")


class Track(Protocol):
    """Hands on steps one by one and shows how many are done."""

    def __call__(self, steps: Sequence[Step], description: str, /) -> Iterable[Step]: ...


# ---------------------------------------------------------------------------------- environment


@dataclasses.dataclass(frozen=True)
class Environment:
    """What the numbers were measured with."""

    jaxsoft: str
    jax: str
    jaxlib: str
    python: str
    system: str
    devices: tuple[str, ...]


def environment() -> Environment:
    """Returns the versions in use and the devices that JAX sees; the first one does the work."""
    return Environment(
        jaxsoft=jaxsoft.__version__,
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        devices=tuple(
            device.platform
            if device.platform == device.device_kind
            else f"{device.platform}: {device.device_kind}"
            for device in jax.devices()
        ),
    )


# ------------------------------------------------------------------------------- worked example

_TOLERANCE = 8.0  # eps: DESIGN section 7
_CLASSES = ("setosa", "versicolor", "virginica")
_PRINTED_PROBABILITIES = (0.69, 0.10, 0.21)
_PRINTED_LOGITS = (1.43, -0.40, 0.23)
_PRINTED_ROUNDING = 0.005  # of two decimals


@dataclasses.dataclass(frozen=True)
class WorkedRow:
    """Three probabilities and two entries of the Jacobian there.

    Attributes:
        source: where the probabilities come from.
        probabilities: one for each class.
        same_class: the derivative of the first probability by its own logit.
        cross_class: the derivative of the first probability by the second logit.
        error: the larger error of anything computed here, in eps.
    """

    source: str
    probabilities: tuple[float, ...]
    same_class: float
    cross_class: float
    error: float


@dataclasses.dataclass(frozen=True)
class WorkedExample:
    """The example of three Iris classes that is often printed with its formulas.

    Attributes:
        classes: the names of the classes.
        logits: the logits usually printed beside the probabilities.
        rows: the printed probabilities, and the softmax of the printed logits.
        outlier: the class whose two probabilities are hardest to reconcile.
        difference: how far these two are apart.
        explained: how much of that rounding to the printed decimals can explain.
        failures: what is wrong.
    """

    classes: tuple[str, ...]
    logits: tuple[float, ...]
    rows: tuple[WorkedRow, ...]
    outlier: str
    difference: float
    explained: float
    failures: tuple[str, ...]


def worked_example() -> WorkedExample:
    """Applies `softmax_derivative` to printed probabilities and to those of printed logits."""
    exponentials = [math.exp(z) for z in _PRINTED_LOGITS]
    exact = [e / math.fsum(exponentials) for e in exponentials]
    rows = (
        _worked_row(
            "as printed", jnp.asarray(_PRINTED_PROBABILITIES, jnp.float32), _PRINTED_PROBABILITIES
        ),
        _worked_row(
            "softmax of the logits",
            jaxsoft.softmax(jnp.asarray(_PRINTED_LOGITS, jnp.float32)),
            exact,
        ),
    )
    # A logit that moves by h takes at most p (1 - p) h from or to its class, and the others moving
    # by -h as much again, to first order; the printed probability is itself rounded by h.
    explained = [_PRINTED_ROUNDING * (1 + 2 * p * (1 - p)) for p in exact]
    differences = [abs(p - q) for p, q in zip(_PRINTED_PROBABILITIES, exact, strict=True)]
    worst = max(range(len(exact)), key=lambda k: differences[k] - explained[k])
    return WorkedExample(
        classes=_CLASSES,
        logits=_PRINTED_LOGITS,
        rows=rows,
        outlier=_CLASSES[worst],
        difference=differences[worst],
        explained=explained[worst],
        failures=tuple(
            f"worked example, {row.source}: off by {row.error:.3g} eps"
            for row in rows
            if not row.error <= _TOLERANCE
        ),
    )


def _worked_row(
    source: str, p: Float[Array, " class"], exact: Sequence[float]
) -> WorkedRow:
    same_class = jaxsoft.softmax_derivative(p, 0, 0)
    cross_class = jaxsoft.softmax_derivative(p, 0, 1)
    errors = testing.error_in_eps(
        jnp.stack([*p, same_class, cross_class]),
        [*exact, exact[0] * (1 - exact[0]), -exact[0] * exact[1]],
    )
    return WorkedRow(
        source, tuple(p.tolist()), float(same_class), float(cross_class), float(errors.max())
    )


# ---------------------------------------------------------------------------------- derivatives

_CLASS_COUNT = 4
_LEAD = 9.0  # of one logit: in float32, 1 - p then has three digits left and jaxsoft's has seven
_QUICK_MODES = ("value", "jvp", "vjp", "jacfwd(jacrev)")


@dataclasses.dataclass(frozen=True)
class Case:
    """A public function of one array, and the same written plainly."""

    name: str
    function: Callable[[Array], Array]
    reference: Callable[[Array], Array]
    argument: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Derivatives:
    """The errors of public functions in every mode of differentiation.

    Attributes:
        modes: names of the modes.
        errors: for each function the largest error in each mode, in eps; infinite for a mode that
            raises.
        tolerance: the largest error allowed.
        failures: what is wrong.
    """

    modes: tuple[str, ...]
    errors: dict[str, dict[str, float]]
    tolerance: float
    failures: tuple[str, ...]


def derivatives(seed: int, *, quick: bool, track: Track) -> Derivatives:
    """Compares values and derivatives with `jax.jacfwd` of plain references in float64."""
    modes = _QUICK_MODES if quick else testing.MODES
    errors = {
        case.name: _errors(case, modes) for case in track(cases(seed), "derivatives")
    }
    return Derivatives(
        modes=modes,
        errors=errors,
        tolerance=_DERIVATIVE_TOLERANCE,
        failures=tuple(
            f"{name} under {mode}: off by {error:.3g} eps"
            for name, of_modes in errors.items()
            for mode, error in of_modes.items()
            if not error <= _DERIVATIVE_TOLERANCE
        ),
    )


_DERIVATIVE_TOLERANCE = 32.0


def _errors(case: Case, modes: Sequence[str]) -> dict[str, float]:
    def errors(modes: Sequence[str]) -> dict[str, float]:
        return testing.assert_derivatives(
            case.function,
            case.argument,
            reference=case.reference,
            modes=modes,
            tolerance=sys.float_info.max,
        )

    try:
        return errors(modes)
    except AssertionError:
        found: dict[str, float] = {}
        for mode in modes:
            try:
                found |= errors([mode])
            except AssertionError:  # it raised, or returned what is no number
                found[mode] = math.inf
        return found


def _plain_softmax(x: Array) -> Array:
    return jnp.exp(x) / jnp.sum(jnp.exp(x))


def _plain_cross_entropy(x: Array, q: Array) -> Array:
    return -jnp.sum(q * jnp.log(_plain_softmax(x)))


def cases(seed: int) -> tuple[Case, ...]:
    """The public functions, at one row of logits of which one leads, and plain references.

    Several arguments are stacked into one array, which has one Hessian instead of four.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    n = _CLASS_COUNT
    x = jax.random.uniform(keys[0], (n,), jnp.float32, 0.5, 2.0).at[1].add(_LEAD)
    y = jax.random.uniform(keys[1], (n,), jnp.float32, 0.5, 2.0)
    v = jax.random.uniform(keys[2], (n,), jnp.float32, -1.0, 1.0)
    q = _plain_softmax(jax.random.normal(keys[3], (n,), jnp.float32))
    mask = jnp.arange(n) != 0
    weights = jnp.asarray([1.0, 0.5, 2.0, 1.0], jnp.float32)
    pairs = jnp.arange(n)[:, None], jnp.arange(n)[None, :]
    options = jnp.concatenate([x, jnp.asarray([1.5, 0.5], jnp.float32)])  # temperature, sink

    def with_options(x: Array) -> Array:
        return jaxsoft.softmax(x[:n], where=mask, temperature=x[n:-1], sink=x[-1:])

    def plain_with_options(x: Array) -> Array:
        e = jnp.where(mask, jnp.exp(x[:n] / x[n]), 0)
        return e / (jnp.sum(e) + jnp.exp(x[-1]))

    def entries(x: Array) -> Array:
        p = jnp.broadcast_to(_plain_softmax(x), (n, n, n))
        return jaxsoft.softmax_derivative(p, *pairs)

    def loss_with_options(x: Array) -> Array:
        return jaxsoft.cross_entropy(
            x[:n],
            1,
            where=mask,
            label_smoothing=0.125,
            z_loss=0.0625,
            class_weights=weights,
            temperature=x[n:-1],
            softcap=16.0,
        )

    def plain_loss_with_options(x: Array) -> Array:
        z = 16.0 * jnp.tanh(x[:n] / 16.0) / x[n]
        total = jnp.sum(jnp.where(mask, jnp.exp(z), 0))
        target = 0.875 * (jnp.arange(n) == 1) + jnp.where(mask, 0.125 / jnp.sum(mask), 0)
        return jnp.sum(weights * target * (jnp.log(total) - z)) + 0.0625 * jnp.log(total) ** 2

    def plain_kl(xy: Array) -> Array:
        p, r = _plain_softmax(xy[0]), _plain_softmax(xy[1])
        return jnp.sum(p * (jnp.log(p) - jnp.log(r)))

    return (
        Case("softmax", jaxsoft.softmax, _plain_softmax, x),
        Case("softmax, options", with_options, plain_with_options, options),
        Case("log_softmax", jaxsoft.log_softmax, lambda x: jnp.log(_plain_softmax(x)), x),
        Case("logsumexp", jaxsoft.logsumexp, lambda x: jnp.log(jnp.sum(jnp.exp(x))), x),
        Case(
            "entropy", jaxsoft.entropy, lambda x: _plain_cross_entropy(x, _plain_softmax(x)), x
        ),
        Case(
            "kl_divergence",
            lambda xy: jaxsoft.kl_divergence(xy[0], xy[1]),
            plain_kl,
            jnp.stack([x, y]),
        ),
        Case(
            "softmax_jvp",
            lambda xv: jaxsoft.softmax_jvp(_plain_softmax(xv[0]), xv[1]),
            lambda xv: jax.jvp(_plain_softmax, (xv[0],), (xv[1],))[1],
            jnp.stack([x, v]),
        ),
        Case(
            "softmax_vjp",
            lambda xg: jaxsoft.softmax_vjp(_plain_softmax(xg[0]), xg[1]),
            lambda xg: jax.vjp(_plain_softmax, xg[0])[1](xg[1])[0],
            jnp.stack([x, v]),
        ),
        Case("softmax_derivative", entries, jax.jacfwd(_plain_softmax), x),
        Case(
            "cross_entropy, ids",
            lambda x: jaxsoft.cross_entropy(x, 1),
            lambda x: -jnp.log(_plain_softmax(x)[1]),
            x,
        ),
        Case(
            "… soft labels",
            lambda xq: jaxsoft.cross_entropy(xq[0], xq[1]),
            lambda xq: _plain_cross_entropy(xq[0], xq[1]),
            jnp.stack([x, q]),
        ),
        Case("… options", loss_with_options, plain_loss_with_options, options),
    )
