"""The loss of tokens from sums over the classes, which are made chunk by chunk of the classes.

A chunk of classes adds to the sums of each token (the exponentials without the label's, the logit
of the label) relative to the maximum so far, and the loss is a function of these sums alone. All
of it is plain arithmetic, differentiated as it stands and exact where a token is confident.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft._core import devices
from jaxsoft._core.axes import ClassAxis, one_hot, take
from jaxsoft._core.devices import Mesh
from jaxsoft._functions import token_loss
from jaxsoft._linear.chunks import Found
from jaxsoft._linear.operands import Classes, Layer, PerModel, Tokens
from jaxsoft._rows.logits import compute_dtype, gap, gaps_of_rows, maximum, nan_unless, scaled


class LossStatistics(NamedTuple):
    """What `linear_cross_entropy` with `has_aux` tells of each token; in the shape of the labels.

    Attributes:
        log_partition: log Σ_j exp(z_j) of the logits z, differentiable; 0 for an ignored token.
        correct: whether no logit is larger than that of the label; False for an ignored token.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> x, w, labels = jnp.eye(2, 3), 20.0 * jnp.eye(3, 5), jnp.array([0, 2])
        >>> loss, found = jaxsoft.linear_cross_entropy(x, w, labels, has_aux=True)
        >>> print(found.correct, found.log_partition)
        [ True False] [20. 20.]
    """

    log_partition: Float[Array, "..."]
    correct: Bool[Array, "..."]


class Sums(NamedTuple):
    """What the loss needs of the logits u of each token, given a maximum m: sums over the classes.

    Attributes:
        others: Σ exp((u - m) / T) over all classes but the label.
        label: u of the label.
        weight: the class weight of the label; None without class weights.
        spread: Σ w (m - u) / T with the class weights w; None without label smoothing.
        total: Σ w, the same for every token; None without label smoothing.
    """

    others: Float[Array, " t"]
    label: Float[Array, " t"]
    weight: Float[Array, " t"] | None
    spread: Float[Array, " t"] | None
    total: Float[Array, " t"] | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Losses:
    """The loss of each token, as a `Loss`.

    Its constants are m, the maxima of the logits; the lowest finite number for no class.
    """

    @property
    def relative(self) -> bool:
        """The sums are made along with the maximum."""
        return False

    def nothing(self, tokens: Tokens, layer: Layer) -> Found:
        """What is known of no class."""
        dtype, options = layer.dtype, layer.options
        lowest = jnp.full(tokens.length, jnp.finfo(dtype).min, dtype)
        none = jnp.zeros_like(lowest)
        weight = None if options.class_weights is None else none
        spread = None if options.label_smoothing is None else none
        sums = Sums(none, none, weight, spread, total=spread)
        return Found(lowest, sums)

    def extended(self, so_far: Found, logits: PerModel, tokens: Tokens, classes: Classes) -> Found:
        """With a chunk of classes more."""
        (u,) = logits
        top = jnp.maximum(so_far.constants, maximum(lax.stop_gradient(u), 1))
        new, old = self.sums(logits, top, tokens, classes), _moved(so_far, top, tokens)
        return Found(top, jax.tree.map(jnp.add, new, old))

    def of_devices(self, part: Found, tokens: Tokens, _: Layer, mesh: Mesh) -> Found:
        """Of all classes from those on each device."""
        top = devices.largest(part.constants, mesh)
        return Found(top, devices.total(_moved(part, top, tokens), mesh))

    def found(self, so_far: Found) -> Found:
        """As it is."""
        return so_far

    def sums(self, logits: PerModel, constants: Array, tokens: Tokens, classes: Classes) -> Sums:
        """What a chunk of classes adds."""
        (u,), top, places = logits, constants, classes.places
        assert places is not None
        z = gaps_of_rows(u, top, tokens.temperature)
        others = jnp.sum(jnp.where(one_hot(places, u.shape, 1), 0, jnp.exp(z)), 1)
        n = u.shape[1]
        place, here = jnp.minimum(places, n - 1), places < n
        label = jnp.where(here, take(u, place, 1), 0)
        options, weight = classes.layer.options, None
        if options.class_weights is not None:
            of_place = options.class_weights.at[place].get(mode="promise_in_bounds")
            weight = jnp.where(here, of_place, 0)
        if options.label_smoothing is None:
            return Sums(others, label, weight, None, None)
        weights = _class_weights(classes)[None]
        # A class without a probability counts for nothing if it has no weight, and is a constant.
        absent = u == -jnp.inf
        terms = weights * -jnp.where(absent, 0, z)
        terms = jnp.where(absent & (weights != 0), jnp.inf, terms)
        total = jnp.broadcast_to(jnp.sum(weights), top.shape)
        return Sums(others, label, weight, jnp.sum(terms, 1), total)

    # l_y = (m - u_y)/T + log Z with A = `others`, e_y = exp((u_y - m)/T) and Z = A + e_y. Where
    # p_y > 1/2 it is written as log(1 + A/e_y), whose derivatives 1/Z by A and -A/Z by u_y are
    # exact as automatic differentiation makes them, and so is every further one. Elsewhere l_y is
    # the sum of two terms that are not negative. (That p_y > 1/2 is told by A < e_y, not by
    # u_y = m: a logit may be computed twice, with a rounding more or less.)
    def loss(self, found: Found, tokens: Tokens, layer: Layer, mesh: Mesh | None) -> Array:
        """The loss of each token."""
        top, (_, label, weight, spread, total) = found
        options, temperature = layer.options, tokens.temperature
        assert tokens.valid is not None
        others = nan_unless(tokens.valid, found.sums.others)
        label = jnp.where(label == -jnp.inf, -jnp.inf, label)  # a constant
        below = gap(label, top, temperature)
        own = jnp.exp(below)
        log_normalizer, empty = _log_normalizer(others, own)
        likely = others < own
        likely_loss = jnp.log1p(others / jnp.where(likely, own, 1))
        out = jnp.where(likely, likely_loss, log_normalizer - below)
        n: Array | int | None = None
        log_partition = None
        if spread is not None and total is not None:
            spread, n = spread + total * log_normalizer, _class_count(layer, mesh)
        if options.z_loss is not None:
            log_partition = jnp.where(empty, 0, log_normalizer + scaled(top, temperature))
        smoothing = options.label_smoothing, n, spread
        out = token_loss.combined(out, weight, *smoothing, options.z_loss, log_partition)
        return out if tokens.ignored is None else jnp.where(tokens.ignored, 0, out)


def _moved(part: Found, top: Array, tokens: Tokens) -> Sums:
    """The sums given a maximum that is at least as large."""
    sums: Sums = part.sums
    before, temperature = part.constants, tokens.temperature
    others = sums.others * jnp.exp(gap(before, top, temperature))
    spread = sums.spread
    if spread is not None and sums.total is not None:
        before = jnp.where(sums.total == 0, top, before)  # of no class there is nothing to move
        spread = spread - sums.total * gap(before, top, temperature)
    return sums._replace(others=others, spread=spread)


def _class_weights(classes: Classes) -> Array:
    """The class weights of a chunk, 0 for a class that is out or whose column counts elsewhere."""
    options, w = classes.layer.options, classes.layer.w[0]
    weights = options.class_weights
    if weights is None:
        weights = devices.typed(jnp.ones(w.shape[1], compute_dtype(w.dtype)), w)
    (bias,) = options.bias
    if bias is not None:
        weights = jnp.where(bias == -jnp.inf, 0, weights)
    return weights if classes.fresh is None else jnp.where(classes.fresh, weights, 0)


def _class_count(layer: Layer, mesh: Mesh | None) -> Array | int:
    """How many classes there are in all, but for those that a bias of -inf takes out."""
    (bias,) = layer.options.bias
    if bias is None:
        return ClassAxis(1, mesh).count(layer.w[0])
    here = jnp.sum(lax.stop_gradient(bias) != -jnp.inf, dtype=bias.dtype)
    return devices.total(here, mesh)


def loss_statistics(found: Found, tokens: Tokens) -> LossStatistics:
    """What else is known of each token."""
    top, temperature, label = found.constants, tokens.temperature, found.sums.label
    assert tokens.valid is not None
    correct = tokens.valid & (label >= top)
    own = jnp.exp(gap(jnp.where(tokens.valid, label, -jnp.inf), top, temperature))
    log_normalizer, empty = _log_normalizer(found.sums.others, own)
    log_partition = jnp.where(empty, -jnp.inf, log_normalizer + scaled(top, temperature))
    if tokens.ignored is not None:
        log_partition = jnp.where(tokens.ignored, 0, log_partition)
        correct = correct & ~tokens.ignored
    return LossStatistics(log_partition, correct)


def _log_normalizer(others: Array, own: Array) -> tuple[Array, Array]:
    """log(A + e_y), and whether there is no class."""
    empty = others + own == 0
    return jnp.log1p(jnp.where(empty, 0, others + (own - 1))), empty
