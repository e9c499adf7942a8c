"""A classifier of the Iris flowers, trained with Optax, and its Jacobian at one flower."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from sklearn import datasets, model_selection

import jaxsoft
from jaxsoft._demo import Track
from jaxsoft.testing import error_in_eps

_HELD_OUT = 30
_LEAST_ACCURACY = 0.75  # a third would be right by chance
_LEARNING_RATE = 0.1
_STEPS_AT_A_TIME = 10
_TOLERANCE = 16.0  # eps of the Jacobian's largest entry, and the logits may be far apart


@dataclasses.dataclass(frozen=True)
class Training:
    """A classifier trained through `jaxsoft.cross_entropy`.

    Attributes:
        classes: names of the species.
        features: names of the measurements.
        train_loss: mean loss on the flowers trained on, before each step.
        held_out_loss: mean loss on the flowers held out, before each step.
        held_out: the number of flowers held out.
        correct: how many of them are classified correctly.
        accuracy: the same as a fraction.
        flower: measurements of the held-out flower that the classifier is least sure of.
        species: its true class.
        logits: of each class, for this flower.
        probabilities: of each class, for this flower.
        jacobian: the derivative of the probability of each class (row) by each logit (column).
        jacobian_error: against diag(p) - p pᵀ in float64, in eps of the largest entry.
        row_sum: the largest absolute sum of a row, which is 0 but for rounding.
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
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    jacobian: tuple[tuple[float, ...], ...]
    jacobian_error: float
    row_sum: float
    failures: tuple[str, ...]


class Params(NamedTuple):
    """Parameters of multinomial logistic regression."""

    weight: Float[Array, "feature class"]
    bias: Float[Array, "1 class"]


class Flowers(NamedTuple):
    """Standardized measurements, and the species."""

    features: Float[Array, "flower feature"]
    labels: Int[Array, " flower"]


def train_on_iris(seed: int, *, quick: bool, track: Track) -> Training:
    """Trains multinomial logistic regression, and differentiates it at one flower."""
    iris: Any = datasets.load_iris()
    train_raw, held_out_raw, train_labels, held_out_labels = model_selection.train_test_split(
        iris.data, iris.target, test_size=_HELD_OUT, stratify=iris.target, random_state=seed
    )
    classes = tuple(str(name) for name in iris.target_names)
    mean, deviation = train_raw.mean(0), train_raw.std(0)

    def flowers(raw: Any, labels: Any) -> Flowers:
        standardized = jnp.asarray((raw - mean) / deviation, jnp.float32)
        return Flowers(standardized, jnp.asarray(labels, jnp.int32))

    train, held_out = flowers(train_raw, train_labels), flowers(held_out_raw, held_out_labels)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    params = Params(zeros((len(iris.feature_names), len(classes))), zeros((1, len(classes))))
    state = params, optax.adam(_LEARNING_RATE).init(params)
    losses: list[Any] = []
    for _ in track(range(10 if quick else 40), "training on Iris"):
        state, of_steps = _train(state, train, held_out)
        losses.append(of_steps)
    train_loss, held_out_loss = np.concatenate(losses, axis=1).tolist()

    logits = _logits(state[0], held_out.features)
    p = jaxsoft.softmax(logits)
    correct = int(jnp.sum(jnp.argmax(p, axis=-1) == held_out.labels))
    unsure = int(jnp.argmax(jaxsoft.entropy(logits)))
    jacobian = np.asarray(jax.jacfwd(jaxsoft.softmax)(logits[unsure]))
    jacobian_error = _jacobian_error(jacobian, np.asarray(logits[unsure], np.float64))
    failures = {
        f"Iris: the loss went from {train_loss[0]:.3g} to {train_loss[-1]:.3g}": (
            train_loss[-1] < train_loss[0]
        ),
        f"Iris: {correct} of {_HELD_OUT} held-out flowers classified correctly": (
            correct >= _LEAST_ACCURACY * _HELD_OUT
        ),
        f"Iris: Jacobian at one flower off by {jacobian_error:.3g} eps": (
            jacobian_error <= _TOLERANCE
        ),
    }
    return Training(
        classes=classes,
        features=tuple(iris.feature_names),
        train_loss=tuple(train_loss),
        held_out_loss=tuple(held_out_loss),
        held_out=_HELD_OUT,
        correct=correct,
        accuracy=correct / _HELD_OUT,
        flower=tuple(held_out_raw[unsure].tolist()),
        species=classes[held_out_labels[unsure]],
        logits=tuple(logits[unsure].tolist()),
        probabilities=tuple(p[unsure].tolist()),
        jacobian=tuple(tuple(row) for row in jacobian.tolist()),
        jacobian_error=jacobian_error,
        row_sum=float(abs(jacobian.astype(np.float64).sum(axis=1)).max()),
        failures=tuple(failure for failure, passed in failures.items() if not passed),
    )


def _logits(params: Params, features: Float[Array, "flower feature"]) -> Float[Array, "flower n"]:
    return features @ params.weight + params.bias


def _mean_loss(params: Params, flowers: Flowers) -> Float[Array, ""]:
    logits = _logits(params, flowers.features)
    return jnp.mean(jaxsoft.cross_entropy(logits, flowers.labels))


@jax.jit
def _train(state: Any, train: Flowers, held_out: Flowers) -> tuple[Any, Float[Array, "2 step"]]:
    """Takes some steps of Adam on the whole training set; returns both losses before each."""

    def step(state: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
        params, moments = state
        loss, gradient = jax.value_and_grad(_mean_loss)(params, train)
        updates, moments = optax.adam(_LEARNING_RATE).update(gradient, moments)
        losses = loss, _mean_loss(params, held_out)
        return (optax.apply_updates(params, updates), moments), losses

    state, losses = jax.lax.scan(step, state, length=_STEPS_AT_A_TIME)
    return state, jnp.stack(losses)


def _jacobian_error(jacobian: Any, logits: Any) -> float:
    exponentials = np.exp(logits - logits.max())
    p = exponentials / exponentials.sum()
    exact = np.diag(p) - np.outer(p, p)
    return float(error_in_eps(jacobian, exact, scale=abs(exact).max()).max())
