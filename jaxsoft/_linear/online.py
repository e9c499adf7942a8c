"""The loss of tokens from sums over the classes, which are made chunk by chunk of the classes.

A chunk of classes adds to the sums of each token (the exponentials without the label's, the logit
of the label) relative to the maximum so far, and the loss is a function of these sums alone. All
of it is plain arithmetic, differentiated as it stands and exact where a token is confident.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft._core import devices
from jaxsoft._core.axes import ClassAxis, one_hot, take
from jaxsoft._core.devices import Mesh
from jaxsoft._functions import token_loss
from jaxsoft._rows.logits import cap, centred, compute_dtype, maximum, nan_unless, scaled


class Tokens(NamedTuple):
    """What belongs to one token.

    Attributes:
        x: the features, of the dtype of the layer's weight; on several devices of the compute
            dtype.
        labels: the place of the label among the classes of the layer; any other number if it is not
            there.
        valid: whether the label exists or is ignored.
        ignored: tokens without a loss, whatever they hold; None for none of them.
        temperature: T > 0 of each token, or None.
    """

    x: Float[Array, "t d"]
    labels: Int[Array, " t"]
    valid: Bool[Array, " t"]
    ignored: Bool[Array, " t"] | None
    temperature: Float[Array, " t"] | None


class Options(NamedTuple):
    """What all tokens share besides the weight, in the compute dtype; None where not asked for.

    Attributes:
        bias: added to the logits; -inf takes a class out.
        class_weights: the weight of each class in the loss.
        label_smoothing: the part of the target that is spread evenly over the classes.
        z_loss: the weight of the squared logarithm of the partition function.
        softcap: c of c tanh(logits / c).
    """

    bias: Float[Array, " n"] | None
    class_weights: Float[Array, " n"] | None
    label_smoothing: Float[Array, ""] | None
    z_loss: Float[Array, ""] | None
    softcap: Float[Array, ""] | None


class Layer(NamedTuple):
    """The weight of the layer, and the options."""

    w: Float[Array, "d n"]
    options: Options


class Classes(NamedTuple):
    """A chunk of classes.

    Attributes:
        layer: the layer with the columns of the chunk alone.
        start: the first of these columns.
        fresh: the columns that the chunk before does not have as well; None for all of them.
        places: the place of the label of each token; the number of columns if it is elsewhere.
    """

    layer: Layer
    start: Int[Array, ""] | int
    fresh: Bool[Array, " c"] | None
    places: Int[Array, " t"]


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


class Statistics(NamedTuple):
    """What the loss needs of each token.

    Attributes:
        top: m, the maximum of the logits; the lowest finite number for no class. A constant.
        sums: given this maximum.
    """

    top: Float[Array, " t"]
    sums: Sums


def nothing(tokens: Tokens, layer: Layer) -> Statistics:
    """The statistics of no class."""
    dtype, options = compute_dtype(layer.w.dtype), layer.options
    lowest = jnp.full(tokens.labels.shape, jnp.finfo(dtype).min, dtype)
    none = jnp.zeros_like(lowest)
    weight = None if options.class_weights is None else none
    spread = None if options.label_smoothing is None else none
    sums = Sums(none, none, weight, spread, total=spread)
    return devices.typed(Statistics(lowest, sums), tokens.x)


def extended(
    statistics: Statistics, products: Array, tokens: Tokens, classes: Classes
) -> Statistics:
    """The statistics with one chunk of classes more, given its products x w."""
    u = capped(products, classes)
    top = jnp.maximum(statistics.top, maximum(lax.stop_gradient(u), 1))
    new, old = sums(u, top, tokens, classes), _moved(statistics, top, tokens.temperature)
    return Statistics(top, jax.tree.map(jnp.add, new, old))


def of_devices(part: Statistics, tokens: Tokens, mesh: Mesh | None) -> Statistics:
    """The statistics of all classes from those of the classes on each device."""
    if mesh is None:
        return part
    top = devices.largest(part.top, mesh)
    sums = devices.total(_moved(part, top, tokens.temperature), mesh)
    return devices.copied(Statistics(top, sums), tokens.x, mesh)


def _moved(statistics: Statistics, top: Array, temperature: Array | None) -> Sums:
    """The sums given a maximum that is at least as large."""
    before, sums = statistics
    others = sums.others * jnp.exp(_gap(before, top, temperature))
    spread = sums.spread
    if spread is not None and sums.total is not None:
        before = jnp.where(sums.total == 0, top, before)  # of no class there is nothing to move
        spread = spread - sums.total * _gap(before, top, temperature)
    return sums._replace(others=others, spread=spread)


def capped(products: Array, classes: Classes) -> Array:
    """u = c tanh((x w + b) / c), -inf in the columns that count elsewhere."""
    options = classes.layer.options
    u = products if options.bias is None else products + options.bias[None]
    u = u if options.softcap is None else cap(u, options.softcap)
    return u if classes.fresh is None else jnp.where(classes.fresh[None], u, -jnp.inf)


def sums(u: Array, top: Array, tokens: Tokens, classes: Classes) -> Sums:
    """What a chunk of classes with the logits u adds, given the maximum."""
    n, temperature = u.shape[1], tokens.temperature
    scale = None if temperature is None else temperature[:, None]
    z = _gap(u, top[:, None], scale)
    on_label = one_hot(classes.places, u.shape, 1)
    others = jnp.sum(jnp.where(on_label, 0, jnp.exp(z)), 1)
    place, here = jnp.minimum(classes.places, n - 1), classes.places < n
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


def _class_weights(classes: Classes) -> Array:
    """The class weights of a chunk, 0 for a class that is out or whose column counts elsewhere."""
    options, w = classes.layer.options, classes.layer.w
    weights = options.class_weights
    if weights is None:
        weights = devices.typed(jnp.ones(w.shape[1], compute_dtype(w.dtype)), w)
    if options.bias is not None:
        weights = jnp.where(options.bias == -jnp.inf, 0, weights)
    return weights if classes.fresh is None else jnp.where(classes.fresh, weights, 0)


def _class_count(layer: Layer, mesh: Mesh | None) -> Array | int:
    """How many classes there are in all, but for those that a bias of -inf takes out."""
    bias = layer.options.bias
    if bias is None:
        return ClassAxis(1, mesh).count(layer.w)
    here = jnp.sum(lax.stop_gradient(bias) != -jnp.inf, dtype=bias.dtype)
    return devices.copied(devices.total(here, mesh), bias, mesh)


# l_y = (m - u_y)/T + log Z with A = `others`, e_y = exp((u_y - m)/T) and Z = A + e_y. Of a label on
# the maximum it is written as log(1 + A/e_y), whose derivatives 1/Z by A and -A/Z by u_y are exact
# as automatic differentiation makes them, and so is every further one. Of another label e_y/Z is
# at most 1/2, and l_y is the sum of two terms that are not negative.
def loss(
    statistics: Statistics, tokens: Tokens, layer: Layer, mesh: Mesh | None
) -> Float[Array, " t"]:
    """The loss of each token."""
    top, (others, label, weight, spread, total) = statistics
    options, temperature = layer.options, tokens.temperature
    others = nan_unless(tokens.valid, others)
    label = jnp.where(label == -jnp.inf, -jnp.inf, label)  # a constant
    gap = _gap(label, top, temperature)
    own = jnp.exp(gap)
    empty = others + own == 0
    log_normalizer = jnp.log1p(jnp.where(empty, 0, others + (own - 1)))
    on_top = label >= top
    out = jnp.where(on_top, jnp.log1p(others / jnp.where(on_top, own, 1)), log_normalizer - gap)
    n: Array | int | None = None
    log_partition = None
    if spread is not None and total is not None:
        spread, n = spread + total * log_normalizer, _class_count(layer, mesh)
    if options.z_loss is not None:
        shift = top if temperature is None else scaled(top, temperature)
        log_partition = jnp.where(empty, 0, log_normalizer + shift)
    smoothing = options.label_smoothing, n, spread
    out = token_loss.combined(out, weight, *smoothing, options.z_loss, log_partition)
    return out if tokens.ignored is None else jnp.where(tokens.ignored, 0, out)


def _gap(u: Array, top: Array, temperature: Array | None) -> Array:
    """(u - m) / T."""
    return u - top if temperature is None else centred(u, top, temperature)
