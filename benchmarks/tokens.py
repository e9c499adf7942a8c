"""What else a large vocabulary is asked for: log-probabilities, entropy, divergence, statistics."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
from jax import Array

import jaxsoft
from benchmarks import candidates, linear
from benchmarks.accuracy import relative
from benchmarks.candidates import Arguments, Candidate, Case, Program, Result, logits, under_jax
from benchmarks.linear import VOCAB_CHUNK
from benchmarks.tables import Grid
from tests.exact import Exact

SHAPES, QUICK_SHAPES = linear.SHAPES[:2], linear.QUICK_SHAPES
GAPS = (5, 17, 20, 30, 40)

CAPTION = (
    "Quantities of the logits x w with their gradient by x and w, under jit. The first row of each "
    "size is the peer: jaxsoft's functions of the logits or, in the last table, the loss alone. "
    "Below it are the functions of x and w, which never hold the logits, and then what is written "
    "without them. Time divided by that of the peer: the median over rounds that time all in turn "
    "in one process, and its quartiles. temporary: what the compiled program needs besides "
    "arguments and results, by XLA's memory_analysis. time / others: that ratio over the one of "
    "the fastest of what is written without functions of x and w, in the last table without "
    "has_aux."
)
ACCURACY_CAPTION = (
    "The largest relative error among 16 tokens, and among the entries of their gradients by the "
    "logits, in float32 against 50 digits. x is the identity and w the logits: those of 7 classes "
    "are lower than that of the dominant one by the gap and more, and higher by up to 1e-4 in the "
    "student than in the teacher. jax.nn: the formulas of jax.nn.log_softmax. “all”: no digit is "
    "right."
)

_ENTROPY_WEIGHT = 0.01

# -------------------------------------------------------------- log-probabilities and entropies

TokenFunction = Callable[[Array, Array, Array], tuple[Array, Array]]  # of x, w and labels


def _linear_log_probs(x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
    found = jaxsoft.linear_log_probs(x, w, labels)
    return found.log_probs, found.entropy


def _by_jaxsoft(x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
    z = logits(x, w)
    return -jaxsoft.cross_entropy(z, labels), jaxsoft.entropy(z)


def _by_log_softmax(x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
    log_p = jax.nn.log_softmax(logits(x, w))
    return jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0], _entropy(log_p)


def _by_optax(x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
    z = logits(x, w)
    losses = optax.softmax_cross_entropy_with_integer_labels(z, labels)
    return -losses, _entropy(jax.nn.log_softmax(z))


def _by_tunix(x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
    log_probs = importlib.import_module("tunix.rl.common").selective_log_softmax
    z = logits(x, w)
    return log_probs(z, labels), _entropy(jax.nn.log_softmax(z))


def _entropy(log_p: Array) -> Array:
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def _of_policy(function: TokenFunction) -> Callable[[Arguments], Program]:
    def loss(x: Array, w: Array, labels: Array) -> Array:
        log_probs, entropy = function(x, w, labels)
        return -jnp.mean(log_probs) - _ENTROPY_WEIGHT * jnp.mean(entropy)

    return under_jax(loss)


# ------------------------------------------------------------- divergence of teacher and student

Divergence = Callable[[Array, Array, Array, Array], Array]  # of each token; the teacher is last


def student_and_teacher(case: Case, seed: int) -> Arguments:
    """Two layers, each with features of its own."""
    (x, w, _), (teacher_x, teacher_w, _) = (candidates.arguments(case, seed + i) for i in (0, 1))
    return x, w, teacher_x, teacher_w


def _kl_of_logits(x: Array, w: Array, teacher_x: Array, teacher_w: Array) -> Array:
    return jaxsoft.kl_divergence(logits(teacher_x, teacher_w), logits(x, w))


def _kl_by_optax(x: Array, w: Array, teacher_x: Array, teacher_w: Array) -> Array:
    log_p, log_q = (
        jax.nn.log_softmax(logits(*model)) for model in ((teacher_x, teacher_w), (x, w))
    )
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def _mean(divergence: Divergence) -> Divergence:
    return lambda *models: jnp.mean(divergence(*models))


# ------------------------------------------------------------------------ statistics of the loss

_with_aux = functools.partial(jaxsoft.linear_cross_entropy, has_aux=True)


# Most write argmax(z) == labels, with which XLA:CPU takes 1.5 of the time of this program (jax
# 0.10.2, two cores, 1024×64×16384).
def _with_a_second_product(x: Array, w: Array, labels: Array) -> tuple[Array, Any]:
    z = logits(x, w)
    correct = jnp.take_along_axis(z, labels[:, None], 1)[:, 0] >= jnp.max(z, -1)
    return jaxsoft.linear_cross_entropy(x, w, labels), (jax.nn.logsumexp(z, -1), correct)


# ------------------------------------------------------------------------------------- quantities


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is computed.

    Attributes:
        peer: whose time and memory the others are divided by, and how it is called in a heading.
        own: the functions of jaxsoft that take x and w.
        others: what is written without them.
        arguments: what all are functions of.
        smaller: whether the peer holds all logits, so that `own` is meant to take less memory.
    """

    peer: tuple[Candidate, str]
    own: tuple[Candidate, ...]
    others: tuple[Candidate, ...]
    arguments: Callable[[Case, int], Arguments] = candidates.arguments
    smaller: bool = True


_kl = jaxsoft.linear_kl_divergence
QUANTITIES = {
    "−mean(log p) − 0.01 mean(entropy)": Quantity(
        (Candidate("jaxsoft.cross_entropy, entropy of x @ w", _of_policy(_by_jaxsoft)), "logits"),
        (Candidate("jaxsoft.linear_log_probs", _of_policy(_linear_log_probs)),),
        (
            Candidate("jax.nn.log_softmax of x @ w", _of_policy(_by_log_softmax)),
            Candidate("optax on x @ w", _of_policy(_by_optax)),
            Candidate("tunix on x @ w", _of_policy(_by_tunix), "tunix"),
        ),
    ),
    "mean KL(teacher ‖ student)": Quantity(
        (
            Candidate("jaxsoft.kl_divergence of both x @ w", under_jax(_mean(_kl_of_logits))),
            "logits",
        ),
        (
            Candidate("jaxsoft.linear_kl_divergence", under_jax(_kl)),
            Candidate(
                f"jaxsoft.linear_kl_divergence, vocab_chunk={VOCAB_CHUNK}",
                under_jax(functools.partial(_kl, vocab_chunk=VOCAB_CHUNK)),
            ),
        ),
        (Candidate("optax on jax.nn.log_softmax of both", under_jax(_mean(_kl_by_optax))),),
        student_and_teacher,
    ),
    "mean loss, log Z and accuracy": Quantity(
        (
            Candidate("jaxsoft.linear_cross_entropy", under_jax(jaxsoft.linear_cross_entropy)),
            "loss alone",
        ),
        (
            Candidate(
                "jaxsoft.linear_cross_entropy, has_aux=True", under_jax(_with_aux, has_aux=True)
            ),
        ),
        (
            Candidate(
                "jaxsoft.linear_cross_entropy, x @ w once more",
                under_jax(_with_a_second_product, has_aux=True),
            ),
        ),
        smaller=False,
    ),
}

# ---------------------------------------------------------------------------------- measurement


def cases(*, quick: bool) -> list[Case]:
    """All that is measured of each quantity, in the order of the table."""
    return candidates.cases(QUICK_SHAPES if quick else SHAPES)


def measure(name: str, case: Case, seconds: float, seed: int) -> Result:
    """Times all who compute a quantity, for about `seconds`."""
    quantity = QUANTITIES[name]
    chosen = (quantity.peer[0], *quantity.own, *quantity.others)
    return candidates.measure(case, chosen, quantity.arguments(case, seed), seconds)


def columns(name: str) -> tuple[str, ...]:
    """The headings of the table of a quantity."""
    return *candidates.columns(name, QUANTITIES[name].peer[1]), "time / others"


def grid(name: str, results: Sequence[Result]) -> Grid:
    """The table of a quantity."""
    rows = []
    for result in results:
        of_others = [result.measured[c] for c in QUANTITIES[name].others if c in result.measured]
        # By the ratios, which are those of one round: of medians the rounds may differ.
        fastest = min(found.timing.ratio for found in of_others)
        for candidate, found in result.measured.items():
            ratio = f"{found.timing.ratio / fastest:.2f}"
            rows.append((*candidates.cells(result, candidate), ratio))
    return Grid(columns(name), tuple(rows))


# ------------------------------------------------------------------------------------- accuracy

LIBRARIES: dict[str, tuple[TokenFunction, Divergence]] = {
    "jaxsoft": (_linear_log_probs, functools.partial(_kl, reduction="none")),
    "jax.nn": (_by_log_softmax, _kl_by_optax),
}


def digits() -> Grid:
    """The relative errors of all, a row for each quantity and gap."""
    found = {gap: errors(gap) for gap in GAPS}
    rows = [
        (f"{name}, gap {gap}", *map(relative, found[gap][name].values()))
        for name in next(iter(found.values()))
        for gap in GAPS
    ]
    return Grid(("relative error", *LIBRARIES), tuple(rows))


def errors(gap: float) -> dict[str, dict[str, float]]:
    """The largest relative error of each quantity and library."""
    tokens, n = 16, 8
    rng = np.random.default_rng(0)
    # The distances of the teacher are exact in float32.
    teacher = -rng.integers(0, 8, (tokens, n)).astype(np.float32) / 4
    teacher[:, 0] = gap
    student = teacher + rng.uniform(0.5e-4, 1e-4, (tokens, n)).astype(np.float32)
    student[:, 0] = gap
    wanted = [_exact(p, q) for p, q in zip(teacher, student, strict=True)]
    found: dict[str, dict[str, float]] = {name: {} for name in wanted[0]}
    for library in LIBRARIES:
        for name, computed in _computed(library, teacher, student).items():
            exact = np.array([one[name] for one in wanted], np.float64)
            found[name][library] = float(np.max(np.abs(np.asarray(computed) / exact - 1)))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _computed(library: str, teacher: Array, student: Array) -> dict[str, Array]:
    function, divergence = LIBRARIES[library]
    x, labels = jnp.eye(len(teacher)), jnp.zeros(len(teacher), jnp.int32)
    entropy = lambda w: function(x, w, labels)[1]
    kl = lambda w: divergence(x, w, x, teacher)
    return {
        "log p of the dominant class": function(x, teacher, labels)[0],
        "entropy": entropy(teacher),
        "gradient of the entropy": jax.grad(lambda w: jnp.sum(entropy(w)))(teacher),
        "KL(teacher ‖ student)": kl(student),
        "gradient of KL by the student": jax.grad(lambda w: jnp.sum(kl(w)))(student),
    }


def _exact(teacher: np.ndarray, student: np.ndarray) -> dict[str, Any]:
    """The quantities of one token, by the same names."""
    p, q = Exact(teacher), Exact(student)
    entropy = -mpmath.fsum(a * b for a, b in zip(p.p, p.log_p, strict=True))
    kl = mpmath.fsum(a * (b - c) for a, b, c in zip(p.p, p.log_p, q.log_p, strict=True))
    return {
        "log p of the dominant class": p.log_p[0],
        "entropy": entropy,
        "gradient of the entropy": [-a * (b + entropy) for a, b in zip(p.p, p.log_p, strict=True)],
        "KL(teacher ‖ student)": kl,
        "gradient of KL by the student": [b - a for a, b in zip(p.p, q.p, strict=True)],
    }
