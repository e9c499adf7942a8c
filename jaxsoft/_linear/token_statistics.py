"""The statistics of tokens from sums over the classes: log-probabilities, entropy, argmax.

A chunk of classes adds to what is known of each token relative to its largest logit so far. Where
one class has most of the probability, its logit stands apart from the sum of the others, so that
neither values nor derivatives are differences of equal numbers.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft._core import devices
from jaxsoft._core.devices import Mesh
from jaxsoft._linear.chunks import Found
from jaxsoft._linear.operands import Classes, Layer, PerModel, Tokens
from jaxsoft._rows import statistics
from jaxsoft._rows.logits import divisor, gap, gaps_of_rows, nan_unless, place_of_maximum, scaled
from jaxsoft._rows.statistics import Row, gaps_at, of_no_entry

# A class is dominant if Z - 1 is below the first of these: then its probability exceeds 1/2, and
# its (u - m) / T alone the second, which it is found by. It need not be equal to 0: a logit may be
# computed twice, with a rounding more or less.
_REST, _NEAR = 0.8, math.log(0.9)


class TokenStatistics(NamedTuple):
    """What `linear_log_probs` returns of each token; float32 or wider, in nats.

    Attributes:
        log_probs: log p of the labels, of the shape of the labels.
        entropy: -Σ_j p_j log p_j, shape [...].
        log_partition: log Σ_j exp(z_j) of the logits z, shape [...].
        argmax: the class with the largest logit, the first of several, shape [...].

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> x, w, labels = jnp.eye(2, 3), 20.0 * jnp.eye(3, 5), jnp.array([[0, 1], [1, 2]])
        >>> found = jaxsoft.linear_log_probs(x, w, labels)  # of two labels for each token
        >>> print(found.log_probs.shape, found.log_partition, found.argmax)
        (2, 2) [20. 20.] [0 1]
    """

    log_probs: Float[Array, "..."]
    entropy: Float[Array, "..."]
    log_partition: Float[Array, "..."]
    argmax: Int[Array, "..."]


class Sums(NamedTuple):
    """Sums over the classes of functions of the logits u, given the maximum m.

    Attributes:
        others: Σ exp((u - m) / T) over all classes but the dominant one.
        dominant: u of the dominant class; m without one.
        gaps: Σ exp(-g) g with g = (m - u) / T, over the same classes as `others`. Its derivative is
            stated to be that of Σ exp(-g) (g + 1), which is -Σ exp(-g) g dg.
        labels: u of the labels.
    """

    others: Float[Array, " t"]
    dominant: Float[Array, " t"]
    gaps: Float[Array, " t"]
    labels: Float[Array, "t k"]


class Constants(NamedTuple):
    """What the sums are relative to, and the class with the largest logit.

    Attributes:
        top: m, the maximum of the logits; the lowest finite number for no class.
        dominated: whether there is a dominant class.
        argmax: the number of the class with the largest logit.
    """

    top: Float[Array, " t"]
    dominated: Bool[Array, " t"]
    argmax: Int[Array, " t"]


class _State(NamedTuple):
    """What is known of each token after some classes.

    Attributes:
        row: m, and Z - 1.
        gaps, labels: as in `Sums`.
        argmax: as in `Constants`.
    """

    row: Row
    gaps: Float[Array, " t"]
    labels: Float[Array, "t k"]
    argmax: Int[Array, " t"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LogProbs:
    """What all statistics of a token are made of, as a `Quantity`."""

    @property
    def relative(self) -> bool:
        """The sums are made along with the maximum."""
        return False

    def nothing(self, tokens: Tokens, layer: Layer) -> _State:
        """What is known of no class."""
        assert tokens.labels is not None
        dtype = layer.dtype
        none, of_labels = jnp.zeros(tokens.length, dtype), jnp.zeros(tokens.labels.shape, dtype)
        return _State(
            of_no_entry(none), none, of_labels, jnp.zeros(tokens.length, tokens.labels.dtype)
        )

    def extended(
        self, so_far: _State, logits: PerModel, tokens: Tokens, classes: Classes
    ) -> _State:
        """With a chunk of classes more."""
        (u,), temperature = logits, tokens.temperature
        row = statistics.of_scaled(u, temperature)
        gaps = jnp.sum(_gap_terms(gaps_of_rows(u, row.top, temperature)), 1)
        argmax = (classes.start + place_of_maximum(u)).astype(so_far.argmax.dtype)
        chunk = _State(row, gaps, _at_labels(u, classes), argmax)
        return _together(so_far, chunk, temperature)

    def of_devices(self, part: _State, tokens: Tokens, layer: Layer, mesh: Mesh) -> _State:
        """Of all classes from those on each device."""
        row = statistics.of_devices(part.row, mesh, tokens.temperature)
        gaps = devices.total(gaps_at(part.gaps, part.row, row.top, tokens.temperature), mesh)
        # The first of the devices with the largest logit has the class.
        n, largest = layer.w[0].shape[1], part.row.top == row.top
        number = part.argmax + devices.index(mesh).astype(part.argmax.dtype) * n
        first = -devices.largest(-jnp.where(largest, number, n * mesh.size), mesh)
        argmax = jnp.where(first < n * mesh.size, first, 0)
        return _State(row, gaps, devices.total(part.labels, mesh), argmax)

    def found(self, so_far: _State) -> Found:
        """The sums, with the dominant class apart."""
        top, rest = so_far.row
        dominated = (rest >= 0) & (rest < _REST)
        others = jnp.where(dominated, rest, rest + 1)
        sums = Sums(others, top, so_far.gaps, so_far.labels)
        return Found(Constants(top, dominated, so_far.argmax), sums)

    def sums(
        self, logits: PerModel, constants: Constants, tokens: Tokens, classes: Classes
    ) -> Sums:
        """What a chunk of classes adds."""
        (u,), temperature = logits, tokens.temperature
        z = gaps_of_rows(u, constants.top, temperature)
        dominant = _is_dominant(z, constants.dominated[:, None])
        z_others = jnp.where(dominant, -jnp.inf, z)
        others, gaps = jnp.sum(jnp.exp(z_others), 1), jnp.sum(_gap_terms(z_others), 1)
        at_dominant = jnp.sum(jnp.where(dominant, u, 0), 1)
        return Sums(others, at_dominant, gaps, _at_labels(u, classes))


def _is_dominant(z: Array, dominated: Array) -> Array:
    return dominated & (z > _NEAR)


def _at_labels(u: Array, classes: Classes) -> Array:
    """u of the labels, 0 of those that are elsewhere."""
    assert classes.places is not None
    n = u.shape[1]
    place = jnp.minimum(classes.places, n - 1)
    taken = jnp.take_along_axis(u, place, 1, mode="promise_in_bounds")
    return jnp.where(classes.places < n, taken, 0)


@jax.custom_jvp
def _gap_terms(z: Array) -> Array:
    """-z exp(z), with the derivative of (1 - z) exp(z), which is the same."""
    return _minus_z_exp(z)


def _minus_z_exp(z: Array) -> Array:
    z = jnp.where(z == -jnp.inf, 0, z)
    return -z * jnp.exp(z)


@_gap_terms.defjvp
def _gap_terms_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (z,), (z_dot,) = primals, tangents
    return _gap_terms(z), _minus_z_exp(z) * z_dot


def _together(a: _State, b: _State, temperature: Array | None) -> _State:
    """What is known of the classes of both."""
    row = statistics.united(a.row, b.row, temperature)
    of_a, of_b = (gaps_at(part.gaps, part.row, row.top, temperature) for part in (a, b))
    argmax = jnp.where(b.row.top > a.row.top, b.argmax, a.argmax)
    return _State(row, of_a + of_b, a.labels + b.labels, argmax)


# ------------------------------------------------------------------------- functions of the sums


# Let t be the dominant class, δ = (u_t - m) / T and A = Σ_{j≠t} exp((u_j - u_t) / T). Then
#
#     log p_t = -log(1 + A),    log p_j = (u_j - u_t) / T - log(1 + A),
#     H = log(1 + A) + G / (1 + A),    G = Σ_{j≠t} exp(-g_j) g_j,    g_j = (u_t - u_j) / T
#
# are sums over the other classes, and so are all their derivatives. δ is 0 but for its derivative,
# as m is held fixed. Without a dominant class δ = 0 and 1 + A is Σ exp((u - m) / T) over all.
def token_statistics(found: Found, tokens: Tokens) -> TokenStatistics:
    """The statistics of each token; NaN for labels that do not exist."""
    top, dominated, argmax = found.constants
    others, dominant, gaps, labels = found.sums
    temperature = tokens.temperature
    delta = jnp.where(dominated, gap(dominant, top, temperature), 0)
    rest = _rest(others, delta, dominated)
    empty = rest == -1
    log_normalizer = jnp.log1p(jnp.where(empty, 0, rest))
    labels = jnp.where(labels == -jnp.inf, -jnp.inf, labels)  # a constant
    z = gaps_of_rows(labels, top, temperature)
    on_top = _is_dominant(z, dominated[:, None])
    below = jnp.where(on_top, 0, z - delta[:, None])
    assert tokens.valid is not None
    log_probs = nan_unless(tokens.valid, below - log_normalizer[:, None])
    entropy = jnp.where(empty, 0, _entropy(gaps, others, delta, dominated))
    log_partition = jnp.where(empty, -jnp.inf, scaled(top, temperature) + (delta + log_normalizer))
    return TokenStatistics(log_probs, entropy, log_partition, argmax)


# dH = (dG + dA) / (1 + A) - G dA / (1 + A)². `gaps` is G with the derivative of K = G + `others`:
# dG + dA, which would cancel, is dK less what δ changes. Elsewhere G is K - `others`.
@jax.custom_jvp
def _entropy(gaps: Array, others: Array, delta: Array, dominated: Array) -> Array:
    rest = _rest(others, delta, dominated)
    return jnp.log1p(jnp.where(rest == -1, 0, rest)) + gaps / divisor(1 + rest)


@_entropy.defjvp
def _entropy_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (gaps, others, delta, dominated), (k_dot, others_dot, delta_dot, _) = primals, tangents
    scale, z = jnp.exp(-delta), divisor(1 + _rest(others, delta, dominated))
    g = gaps + (lax.stop_gradient(others) - others)
    g = (g + delta * others) * scale
    k_dot = (k_dot + delta * others_dot) * scale - g * delta_dot
    a_dot = (others_dot - others * delta_dot) * scale
    return _entropy(*primals), k_dot / z - (g / z) * (a_dot / z)


def _rest(others: Array, delta: Array, dominated: Array) -> Array:
    """A; -1 without a class."""
    return jnp.where(dominated, others * jnp.exp(-delta), others - 1)
