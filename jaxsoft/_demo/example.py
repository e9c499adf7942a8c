"""The machine at hand, and a worked example with which softmax is often explained."""

import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import jaxsoft
from jaxsoft.testing import error_in_eps


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
        jaxlib=importlib.metadata.version("jaxlib"),
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

_SOURCE = "StatQuest, Neural Networks Part 5: ArgMax and SoftMax, https://youtu.be/KpKog-L9veg"
_CLASSES = ("setosa", "versicolor", "virginica")
_PRINTED_PROBABILITIES = (0.69, 0.10, 0.21)
_PRINTED_LOGITS = (1.43, -0.40, 0.23)
_PRINTED_ROUNDING = 0.005  # of two decimals
_TOLERANCE = 8.0  # eps


@dataclasses.dataclass(frozen=True)
class WorkedRow:
    """Three probabilities, and two entries of the Jacobian there.

    Attributes:
        source: where the probabilities come from.
        probabilities: one for each class.
        same_class: the derivative of the first probability by its own logit.
        cross_class: the derivative of the first probability by the second logit.
        error: the largest error of the numbers computed here, in eps.
    """

    source: str
    probabilities: tuple[float, ...]
    same_class: float
    cross_class: float
    error: float


@dataclasses.dataclass(frozen=True)
class WorkedExample:
    """The example of three Iris classes.

    Attributes:
        source: where the printed probabilities and logits come from.
        classes: the names of the classes.
        logits: the logits printed there, beside the probabilities.
        rows: the probabilities as printed, and the softmax of the logits.
        outlier: the class whose two probabilities are the hardest to reconcile.
        difference: how far these two are apart.
        explained: how far apart rounding to the printed decimals can bring them.
        failures: what is wrong.
    """

    source: str
    classes: tuple[str, ...]
    logits: tuple[float, ...]
    rows: tuple[WorkedRow, ...]
    outlier: str
    difference: float
    explained: float
    failures: tuple[str, ...]


def worked_example() -> WorkedExample:
    """Applies `softmax_derivative` to the printed probabilities and to those of the logits."""
    exponentials = [math.exp(z) for z in _PRINTED_LOGITS]
    exact = [e / math.fsum(exponentials) for e in exponentials]
    printed = jnp.asarray(_PRINTED_PROBABILITIES, jnp.float32)
    computed = jaxsoft.softmax(jnp.asarray(_PRINTED_LOGITS, jnp.float32))
    rows = (
        _worked_row("as printed", printed, _PRINTED_PROBABILITIES),
        _worked_row("softmax of the logits", computed, exact),
    )
    # With every logit off by up to h, p is off by up to 2 h p (1 - p), to first order: its own
    # logit moves one way, all others the other way. The printed probability is off by h itself.
    explained = [_PRINTED_ROUNDING * (2 * p * (1 - p) + 1) for p in exact]
    differences = [abs(p - q) for p, q in zip(_PRINTED_PROBABILITIES, exact, strict=True)]
    outlier = max(range(len(exact)), key=lambda k: differences[k] - explained[k])
    return WorkedExample(
        source=_SOURCE,
        classes=_CLASSES,
        logits=_PRINTED_LOGITS,
        rows=rows,
        outlier=_CLASSES[outlier],
        difference=differences[outlier],
        explained=explained[outlier],
        failures=tuple(
            f"worked example, probabilities {row.source}: off by {row.error:.3g} eps"
            for row in rows
            if not row.error <= _TOLERANCE
        ),
    )


def _worked_row(source: str, p: Float[Array, " class"], exact: Sequence[float]) -> WorkedRow:
    same_class = jaxsoft.softmax_derivative(p, 0, 0)
    cross_class = jaxsoft.softmax_derivative(p, 0, 1)
    errors = error_in_eps(
        jnp.stack([*p, same_class, cross_class]),
        [*exact, exact[0] * (1 - exact[0]), -exact[0] * exact[1]],
    )
    return WorkedRow(
        source=source,
        probabilities=tuple(p.tolist()),
        same_class=float(same_class),
        cross_class=float(cross_class),
        error=float(errors.max()),
    )
