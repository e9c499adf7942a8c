"""A linear layer and its cross-entropy in chunks of tokens and classes, and the gradients of both.

Nothing here holds the logits of all tokens and classes. A chunk of tokens goes through the classes
once for its statistics (the maximum, the sum of the exponentials without the label's, the logit of
the label) and, for the gradients, once more; with all classes in one chunk the second pass has the
logits of the first. All of it is plain arithmetic, exact where a token is confident, and it is
differentiated as it stands for the derivatives of higher order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _axes, _logits, _rows


class Tokens(NamedTuple):
    """What belongs to one token.

    Attributes:
        x: the features, of the dtype of the layer's weight.
        labels: class ids.
        ignored: tokens without a loss, whatever they hold; None for none of them.
        temperature: T > 0 of each token, or None.
    """

    x: Float[Array, "t d"]
    labels: Int[Array, " t"]
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


class Sizes(NamedTuple):
    """The sizes of the chunks.

    Attributes:
        tokens: how many tokens make a chunk, at most.
        classes: how many classes make a chunk, at most.
        keep: whether the gradients keep the logits of a chunk of tokens for all classes, rather
            than making them twice.
    """

    tokens: int
    classes: int
    keep: bool


class Live(NamedTuple):
    """Which arguments a gradient is wanted for."""

    x: bool
    temperature: bool
    w: bool
    options: tuple[bool | None, ...]


class Gradients(NamedTuple):
    """Gradients in the compute dtype; None for those not wanted."""

    x: Float[Array, "t d"] | None
    temperature: Float[Array, " t"] | None
    w: Float[Array, "d n"] | None
    options: Options


class _Classes(NamedTuple):
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


class _Sums(NamedTuple):
    """What the loss needs of the logits u of each token, given a maximum m: sums over the classes.

    Attributes:
        others: Σ exp((u - m) / T) over all classes but the label.
        label: u of the label.
        spread: Σ w (m - u) / T with the class weights w; None without label smoothing.
    """

    others: Float[Array, " t"]
    label: Float[Array, " t"]
    spread: Float[Array, " t"] | None


class _Running(NamedTuple):
    """Sums over the classes so far, with the maximum so far and the sum of their class weights."""

    top: Float[Array, " t"]
    sums: _Sums
    seen: Float[Array, ""]


# ------------------------------------------------------------------------------------ the loss


def losses(tokens: Tokens, layer: Layer, sizes: Sizes) -> Float[Array, " t"]:
    """The loss of each token. Reverse mode makes the logits again, chunk by chunk."""

    def of_chunk(carry: None, chunk: tuple[Tokens, None]) -> tuple[None, Array]:
        tokens = _silenced(chunk[0])
        running, _ = _running(tokens, layer, sizes, keep=False)
        return carry, _loss(running, tokens, layer)

    return _over_tokens(of_chunk, None, tokens, None, sizes)[1]


def _silenced(tokens: Tokens) -> Tokens:
    """An ignored token may hold a NaN, which a cotangent of 0 does not silence."""
    temperature = tokens.temperature
    if temperature is not None:
        temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    x = tokens.x if tokens.ignored is None else jnp.where(tokens.ignored[:, None], 0, tokens.x)
    return tokens._replace(x=x, temperature=temperature)


def _products(x: Array, w: Array) -> Array:
    """x w, accumulated in the compute dtype."""
    return jnp.matmul(x, w, preferred_element_type=_logits.compute_dtype(w.dtype))


def _running(
    tokens: Tokens, layer: Layer, sizes: Sizes, *, keep: bool
) -> tuple[_Running, Array | None]:
    """The sums over all classes and, if they are to be kept, the products x w of every chunk."""

    def step(running: _Running, classes: _Classes, kept: None) -> tuple[_Running, Array | None]:
        products = _products(tokens.x, classes.layer.w)
        return _extended(running, products, tokens, classes), products if keep else None

    return _over_classes(step, _nothing(tokens, layer), None, tokens, layer, sizes)


def _nothing(tokens: Tokens, layer: Layer) -> _Running:
    dtype = _logits.compute_dtype(layer.w.dtype)
    zero = jnp.zeros(tokens.labels.shape, dtype)
    sums = _Sums(zero, zero, None if layer.options.label_smoothing is None else zero)
    return _Running(jnp.full_like(zero, jnp.finfo(dtype).min), sums, jnp.zeros((), dtype))


def _extended(running: _Running, products: Array, tokens: Tokens, classes: _Classes) -> _Running:
    """The sums with one chunk of classes more, given its products x w."""
    u = _capped(products, classes)
    top = jnp.maximum(running.top, _logits.maximum(lax.stop_gradient(u), 1))
    new, old = _sums(u, top, tokens, classes), running.sums
    others = new.others + old.others * jnp.exp(_gap(running.top, top, tokens.temperature))
    seen, spread = running.seen, None
    if new.spread is not None and old.spread is not None:
        before = jnp.where(seen == 0, top, running.top)
        spread = new.spread + (old.spread - seen * _gap(before, top, tokens.temperature))
        seen += _total_weight(classes)
    return _Running(top, _Sums(others, old.label + new.label, spread), seen)


def _capped(products: Array, classes: _Classes) -> Array:
    """u = c tanh((x w + b) / c), -inf in the columns that count elsewhere."""
    options = classes.layer.options
    u = products if options.bias is None else products + options.bias[None]
    u = u if options.softcap is None else _logits.cap(u, options.softcap)
    return u if classes.fresh is None else jnp.where(classes.fresh[None], u, -jnp.inf)


def _sums(u: Array, top: Array, tokens: Tokens, classes: _Classes) -> _Sums:
    n, temperature = u.shape[1], tokens.temperature
    scale = None if temperature is None else temperature[:, None]
    z = _gap(u, top[:, None], scale)
    others = jnp.sum(_rows.other_exponentials(z, jnp.zeros_like(top), classes.places, 1), 1)
    label = _axes.take(u, jnp.minimum(classes.places, n - 1), 1)
    label = jnp.where(classes.places < n, label, 0)
    if classes.layer.options.label_smoothing is None:
        return _Sums(others, label, None)
    weights = _class_weights(classes)[None]
    # A class without a probability counts for nothing if it has no weight, and is a constant.
    absent = u == -jnp.inf
    terms = weights * -jnp.where(absent, 0, z)
    terms = jnp.where(absent & (weights != 0), jnp.inf, terms)
    return _Sums(others, label, jnp.sum(terms, 1))


def _class_weights(classes: _Classes) -> Array:
    """The class weights of a chunk, 0 in the columns that count elsewhere."""
    weights, w = classes.layer.options.class_weights, classes.layer.w
    if weights is None:
        weights = jnp.ones(w.shape[1], _logits.compute_dtype(w.dtype))
    return weights if classes.fresh is None else jnp.where(classes.fresh, weights, 0)


def _total_weight(classes: _Classes) -> Array:
    return jnp.sum(_class_weights(classes))


# loss = (1 - α) w_y l_y + (α/n) Σ_j w_j l_j + ζ (log Z + m/T)² with l_j = (m - u_j)/T + log Z,
# A = `others`, e_y = exp((u_y - m)/T) and Z = A + e_y. Of a label on the maximum l_y is written as
# log(1 + A/e_y), whose derivatives 1/Z by A and -A/Z by u_y are exact as automatic differentiation
# makes them, and so is every further one. Of another label e_y/Z is at most 1/2, and l_y is the sum
# of two terms that are not negative.
def _loss(running: _Running, tokens: Tokens, layer: Layer) -> Array:
    top, n, temperature = running.top, layer.w.shape[1], tokens.temperature
    others, label, spread = running.sums
    label = jnp.where(label == -jnp.inf, -jnp.inf, label)  # a constant
    gap = _gap(label, top, temperature)
    own = jnp.exp(gap)
    empty = others + own == 0
    log_normalizer = jnp.log1p(jnp.where(empty, 0, others + (own - 1)))
    on_top = label >= top
    loss = jnp.where(
        on_top,
        jnp.log1p(others / jnp.where(on_top, own, 1)),
        log_normalizer - gap,
    )
    options, weight = layer.options, None
    if options.class_weights is not None:
        weight = options.class_weights.at[tokens.labels].get(mode="clip")
    if options.label_smoothing is not None and spread is not None:
        smoothing = options.label_smoothing
        smoothing = jnp.where((smoothing >= 0) & (smoothing <= 1), smoothing, jnp.nan)
        total = n if options.class_weights is None else jnp.sum(options.class_weights)
        even = weighted(smoothing / n, spread + total * log_normalizer)
        loss = weighted(1 - smoothing if weight is None else (1 - smoothing) * weight, loss) + even
    elif weight is not None:
        loss = weighted(weight, loss)
    if options.z_loss is not None:
        shift = top if temperature is None else _logits.scaled(top, temperature)
        log_partition = jnp.where(empty, 0, log_normalizer + shift)
        loss += options.z_loss * log_partition**2
    # By multiplication, for the gradient of a label that does not exist is NaN as well.
    valid = (tokens.labels >= 0) & (tokens.labels < n)
    loss *= jnp.where(valid if tokens.ignored is None else valid | tokens.ignored, 1, jnp.nan)
    return loss if tokens.ignored is None else jnp.where(tokens.ignored, 0, loss)


def weighted(weight: Array, loss: Array) -> Array:
    """The product, with 0 · inf = 0: what has no weight has no loss."""
    return weight * jnp.where((weight == 0) & (loss == jnp.inf), 0, loss)


def _gap(u: Array, top: Array, temperature: Array | None) -> Array:
    """(u - m) / T."""
    return u - top if temperature is None else _logits.centred(u, top, temperature)


# ------------------------------------------------------------------------------- its gradients


def gradients(
    tokens: Tokens, layer: Layer, cotangent: Float[Array, " t"], live: Live, sizes: Sizes
) -> tuple[Float[Array, " t"], Gradients]:
    """The loss of each token, and the gradients of Σ_i cotangent_i loss_i.

    Either of x and w takes one product of matrices more than the loss alone; with `sizes.keep`
    False the logits, and so the product that makes them, are made twice.
    """
    dtype = _logits.compute_dtype(layer.w.dtype)

    def zeros(leaf: Array | None, wanted: bool | None) -> Array | None:
        return jnp.zeros(leaf.shape, dtype) if wanted and leaf is not None else None

    options = Options(*map(zeros, layer.options, live.options))

    def of_chunk(so_far: Gradients, chunk: tuple[Tokens, Array]) -> tuple[Gradients, Any]:
        tokens, cotangent = chunk
        out, sums = _chunk_gradients(_silenced(tokens), layer, cotangent, live, sizes, so_far)
        return sums._replace(x=None, temperature=None), (out, sums.x, sums.temperature)

    start = Gradients(None, None, zeros(layer.w, live.w), options)
    sums, (out, x_bar, temperature_bar) = _over_tokens(of_chunk, start, tokens, cotangent, sizes)
    return out, sums._replace(x=x_bar, temperature=temperature_bar)


def _chunk_gradients(
    tokens: Tokens, layer: Layer, cotangent: Array, live: Live, sizes: Sizes, so_far: Gradients
) -> tuple[Array, Gradients]:
    """The losses of a chunk of tokens, and what comes to the gradients by it."""
    running, kept = _running(tokens, layer, sizes, keep=sizes.keep)

    def loss_of(sums: _Sums, temperature: Array | None, options: Options) -> Array:
        of_tokens = tokens._replace(temperature=temperature)
        return _loss(running._replace(sums=sums), of_tokens, layer._replace(options=options))

    out, pullback = jax.vjp(loss_of, running.sums, tokens.temperature, layer.options)
    sums_bar, temperature_bar, options_bar = pullback(cotangent)

    def step(so_far: Gradients, classes: _Classes, kept: Array | None) -> tuple[Gradients, None]:
        def sums_of(products: Array, temperature: Array | None, options: Options) -> _Sums:
            part = classes._replace(layer=classes.layer._replace(options=options))
            of_tokens = tokens._replace(temperature=temperature)
            return _sums(_capped(products, part), running.top, of_tokens, part)

        w = classes.layer.w
        products = _products(tokens.x, w) if kept is None else kept
        _, pullback = jax.vjp(sums_of, products, tokens.temperature, classes.layer.options)
        products_bar, temperature_bar, options_bar = pullback(sums_bar)
        # p - y is formed in the compute dtype. It stays there for types with fewer exponents than
        # float32, where it would vanish for a confident example before a loss scale meets it.
        factor = w.dtype if float(jnp.finfo(w.dtype).tiny) < 2.0**-100 else out.dtype
        products_bar = products_bar.astype(factor)
        part = Gradients(
            _products(products_bar, w.T.astype(factor)) if live.x else None,
            temperature_bar,
            _products(tokens.x.T.astype(factor), products_bar) if live.w else None,
            options_bar,
        )
        return _added(so_far, part, classes.start), None

    so_far = so_far._replace(
        x=jnp.zeros(tokens.x.shape, out.dtype) if live.x else None,
        temperature=jnp.zeros_like(out) if live.temperature else None,
    )
    so_far = _added(so_far, Gradients(None, temperature_bar, None, options_bar), 0)
    so_far, _ = _over_classes(step, so_far, kept, tokens, layer, sizes)
    return out, so_far


def _added(total: Gradients, part: Gradients, start: Array | int) -> Gradients:
    """Adds what comes from a chunk of classes that begins at `start` to the gradients wanted."""

    def added(total: Array | None, part: Array | None) -> Array | None:
        if total is None or part is None:
            return total
        if total.shape == part.shape:
            return total + part
        here = lax.dynamic_slice_in_dim(total, start, part.shape[-1], -1)
        return lax.dynamic_update_slice_in_dim(total, here + part, start, -1)

    return Gradients(
        added(total.x, part.x),
        added(total.temperature, part.temperature),
        added(total.w, part.w),
        Options(*map(added, total.options, part.options)),
    )


# ----------------------------------------------------------------------------------- the chunks


# Chunks are of equal size, so that the last one wastes little; of the classes the last chunk begins
# earlier where they do not divide, and of the tokens it repeats the last token, with cotangent 0.
def _over_tokens(
    of_chunk: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    tokens: Tokens,
    cotangent: Array | None,
    sizes: Sizes,
) -> tuple[Any, Any]:
    """Scans over chunks of tokens; the results have one entry for each token."""
    body = jax.checkpoint(of_chunk, prevent_cse=False)
    length = tokens.labels.shape[0]
    count = math.ceil(length / sizes.tokens)
    if count == 1:
        return body(carry, (tokens, cotangent))
    size = math.ceil(length / count)

    def padded(leaf: Array, mode: str) -> Array:
        widths = [(0, count * size - length)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, widths, mode=mode).reshape(count, size, *leaf.shape[1:])

    chunks = (
        jax.tree.map(lambda leaf: padded(leaf, "edge"), tokens),
        None if cotangent is None else padded(cotangent, "constant"),
    )
    carry, out = lax.scan(body, carry, chunks)
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:length], out)


def _class_chunks(layer: Layer, sizes: Sizes) -> tuple[int, int]:
    """The number of chunks of classes, and how many classes each of them has."""
    n = layer.w.shape[1]
    count = math.ceil(n / sizes.classes)
    return count, math.ceil(n / count)


def _over_classes(
    step: Callable[[Any, _Classes, Any], tuple[Any, Any]],
    carry: Any,
    of_chunks: Any,
    tokens: Tokens,
    layer: Layer,
    sizes: Sizes,
) -> tuple[Any, Any]:
    """Scans over the chunks of classes and what has an entry for each of them."""
    n, dtype = layer.w.shape[1], tokens.labels.dtype
    count, size = _class_chunks(layer, sizes)

    def places(low: Array | int, start: Array | int) -> Array:
        here = (tokens.labels >= low) & (tokens.labels < start + size)
        return jnp.where(here, tokens.labels - start, size)

    if count == 1:
        return step(carry, _Classes(layer, 0, None, places(0, 0)), of_chunks)

    def body(carry: Any, chunk: tuple[Array, Any]) -> tuple[Any, Any]:
        i, of_chunk = chunk
        low = i * size
        start = jnp.minimum(low, n - size)
        columns = jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, -1) if leaf.ndim else leaf,
            layer,
        )
        fresh = None if n % size == 0 else start + jnp.arange(size, dtype=dtype) >= low
        return step(carry, _Classes(columns, start, fresh, places(low, start)), of_chunk)

    body = jax.checkpoint(body, prevent_cse=False)
    return lax.scan(body, carry, (jnp.arange(count, dtype=dtype), of_chunks))
