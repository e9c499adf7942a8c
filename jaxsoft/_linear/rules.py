"""Sums over the classes, and the weighted sum of a loss, each with its rule."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike

from jaxsoft._core import devices
from jaxsoft._core.autodiff import instantiated, jvp_from_vjp, transposable, values_and_live
from jaxsoft._core.devices import Mesh
from jaxsoft._functions.token_loss import Reduction, weighted
from jaxsoft._linear import chunks
from jaxsoft._linear.chunks import Found, Gradients, Live, Loss, Quantity
from jaxsoft._linear.loops import Division, over_tokens
from jaxsoft._linear.operands import Layer, Tokens


def _values(args: Any) -> tuple[Any, Live]:
    """The arguments of a rule, and by which of them it is being differentiated."""
    values, (of_tokens, of_layer, *_) = values_and_live(args)
    return values, Live(of_tokens.x, of_tokens.temperature, of_layer.w, of_layer.options)


Dtypes = tuple[tuple[DTypeLike, ...], tuple[DTypeLike, ...]]  # of x and of w


def _dtypes(tokens: Tokens, layer: Layer) -> Dtypes:
    return tuple(x.dtype for x in tokens.x), tuple(w.dtype for w in layer.w)


def _cotangents(bars: Gradients, dtypes: Dtypes) -> tuple[Tokens, Layer]:
    """As cotangents of the arguments, in their types."""

    def cast(bars: Any, dtypes: tuple[DTypeLike, ...]) -> Any:
        both = zip(bars, dtypes, strict=True)
        return tuple(bar if bar is None else bar.astype(dtype) for bar, dtype in both)

    constant: Any = None  # labels, and which tokens exist or are ignored
    x, w = map(cast, (bars.x, bars.w), dtypes)
    return Tokens(x, constant, constant, constant, bars.temperature), Layer(w, bars.options)


# ------------------------------------------------------------------------ sums over the classes


def found_of(quantity: Quantity, tokens: Tokens, layer: Layer, division: Division) -> Found:
    """What is found of each token, alike on all devices; the sums have derivatives."""
    given = lax.stop_gradient(_copies(tokens, layer, division.mesh))
    found = chunks.of_all_tokens(quantity, *given, division)
    return with_derivatives(found, quantity, tokens, layer, division)


def with_derivatives(
    found: Found,
    quantity: Quantity,
    tokens: Tokens,
    layer: Layer,
    division: Division,
) -> Found:
    """What was found of each token, and derivatives of the sums."""
    mesh = division.mesh
    found = lax.stop_gradient(found)
    tokens, layer = _copies(tokens, layer, mesh)
    copies = devices.copied(found, tokens.x[0], mesh)
    sums = _sums(tokens, layer, copies, quantity, division)
    return found._replace(sums=jax.tree.map(lambda part: devices.joined(part, mesh), sums))


def _copies(tokens: Tokens, layer: Layer, mesh: Mesh | None) -> tuple[Tokens, Layer]:
    """Copies on each device of what is alike."""
    like = layer.w[0]
    x, temperature = devices.copied((tokens.x, tokens.temperature), like, mesh)
    return tokens._replace(x=x, temperature=temperature), devices.copied(layer, like, mesh)


# The pass over the classes has made the values of the sums. Their pullback makes the logits again,
# chunk by chunk, and needs the constants alone: between the passes stay these and the arguments.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sums_rule(
    tokens: Tokens, layer: Layer, found: Found, quantity: Quantity, division: Division
) -> Any:
    return found.sums


_sums = jvp_from_vjp(_sums_rule)


def _sums_fwd(
    tokens: Any, layer: Any, found: Any, quantity: Quantity, division: Division
) -> tuple[Any, Any]:
    (tokens, layer, found), live = _values((tokens, layer, found))
    sums = _sums(tokens, layer, found, quantity, division)
    return sums, (tokens, layer, found.constants, live)


def _sums_bwd(quantity: Quantity, division: Division, residuals: Any, sums_bar: Any) -> Any:
    tokens, layer, constants, live = residuals
    dtypes = _dtypes(tokens, layer)

    def gradients(sums_bar: Any) -> tuple[Tokens, Layer]:
        def of_chunk(start: Gradients, *args: Any) -> tuple[Gradients, None]:
            tokens, constants, sums_bar = args
            bars = chunks.pulled_back(quantity, start, tokens, layer, constants, sums_bar, division)
            return bars, None

        along = live, tokens, layer, division
        bars, _ = _over_all_tokens(of_chunk, *along, constants, cotangent=sums_bar)
        return _cotangents(bars, dtypes)

    return *transposable(gradients, instantiated(sums_bar)), None


_sums_rule.defvjp(_sums_fwd, _sums_bwd, symbolic_zeros=True)


# Gradients by the layer are added up over all chunks of tokens; those by a token come from one.
def _over_all_tokens(
    of_chunk: Callable[..., tuple[Gradients, Any]],
    live: Live,
    tokens: Tokens,
    layer: Layer,
    division: Division,
    *others: Any,
    cotangent: Any,
) -> tuple[Gradients, Any]:
    """The gradients, and what else `of_chunk` returns, which adds to the gradients it is given."""
    none = (None,) * len(tokens.x)

    def body(of_layer: Gradients, tokens: Tokens, *args: Any) -> tuple[Gradients, Any]:
        of_tokens = chunks.zeros(tokens, layer, live)
        start = of_layer._replace(x=of_tokens.x, temperature=of_tokens.temperature)
        bars, other = of_chunk(start, tokens, *args)
        return bars._replace(x=none, temperature=None), (bars.x, bars.temperature, other)

    start = chunks.zeros(tokens, layer, live)._replace(x=none, temperature=None)
    bars, out = over_tokens(body, start, tokens, division, *others, cotangent=cotangent)
    x, temperature, other = out
    return bars._replace(x=x, temperature=temperature), other


# ------------------------------------------------------------------- the weighted sum of a loss


# Between the passes stay its gradients, in the compute dtype: the cotangent may be large, as where
# a loss is scaled for float16, and they are rounded after it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _weighted_sum(
    tokens: Tokens,
    layer: Layer,
    weights: Array,
    quantity: Loss,
    division: Division,
    dtypes: Dtypes,
) -> tuple[Array, Found]:
    found = chunks.of_all_tokens(quantity, tokens, layer, division)
    found = devices.copied(found, tokens.x[0], division.mesh)
    out = quantity.loss(found, tokens, layer, division.mesh)
    return jnp.sum(weighted(weights, out)), found


_weighted_sum_in_every_mode = jvp_from_vjp(_weighted_sum)


def weighted_sum(
    weights: Array, quantity: Loss, tokens: Tokens, layer: Layer, division: Division
) -> tuple[Array, Found]:
    """Σ_i weights_i loss_i, and what was found of each token: alike on all devices."""
    mesh = division.mesh
    copies = *_copies(tokens, layer, mesh), devices.copied(weights, layer.w[0], mesh)
    along = quantity, division, _dtypes(tokens, layer)
    total, found = _weighted_sum_in_every_mode(*copies, *along)
    alike = lambda x: devices.largest(x, mesh)
    return devices.joined(total, mesh), jax.tree.map(alike, found)


def weighted_losses(
    weights: Array,
    reduction: Reduction,
    quantity: Loss,
    tokens: Tokens,
    layer: Layer,
    division: Division,
) -> tuple[Array, Found]:
    """weights_i loss_i, or their sum for another reduction than "none", and what was found."""
    if reduction != "none":
        return weighted_sum(weights, quantity, tokens, layer, division)
    found = found_of(quantity, tokens, layer, division)
    return weighted(weights, quantity.loss(found, tokens, layer, division.mesh)), found


def _weighted_sum_fwd(
    tokens: Any,
    layer: Any,
    weights: Any,
    quantity: Loss,
    division: Division,
    dtypes: Dtypes,
) -> tuple[tuple[Array, Found], Any]:
    (tokens, layer, weights), live = _values((tokens, layer, weights))
    gradients = functools.partial(_gradients, quantity, division, live)
    out, found, bars = _in_chunks(gradients, tokens, layer, weights)
    total = jnp.sum(weighted(weights, out))
    residuals = devices.shares(out, out, division.mesh), bars
    return (devices.evenly(total, division.mesh), lax.stop_gradient(found)), residuals


def _weighted_sum_bwd(
    quantity: Loss, division: Division, dtypes: Dtypes, residuals: Any, cotangent: Any
) -> Any:
    total_bar = instantiated(cotangent[0])
    out, bars = jax.tree.map(lambda residual: total_bar * residual, residuals)
    return *_cotangents(bars, dtypes), out


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


# Under reverse-over-reverse JAX strips an outer checkpoint from code that does not depend on the
# tangents; a nested one survives. (`jvp_from_vjp` does the same.)
def _in_chunks(fun: Callable[..., Any], *args: Any) -> Any:
    """The result of a function with checkpoints that survive a further derivative."""
    policy = jax.checkpoint_policies.everything_saveable
    return jax.checkpoint(fun, prevent_cse=False, policy=policy)(*args)


# With `division.keep` the logits are made once, without it twice.
def _gradients(
    quantity: Loss,
    division: Division,
    live: Live,
    tokens: Tokens,
    layer: Layer,
    weights: Array,
) -> tuple[Array, Found, Gradients]:
    """The loss of each token, what was found of it, and the gradients of Σ_i weights_i loss_i."""

    def of_chunk(
        start: Gradients, tokens: Tokens, weights: Array
    ) -> tuple[Gradients, tuple[Array, Found]]:
        found, kept = chunks.of_chunk_of_tokens(
            quantity, tokens, layer, division, keep=division.keep
        )
        found = devices.copied(found, tokens.x[0], division.mesh)
        found = found._replace(constants=lax.stop_gradient(found.constants))

        def loss_of(sums: Any, temperature: Array | None, options: Any) -> Array:
            of_tokens = tokens._replace(temperature=temperature)
            of_layer = layer._replace(options=options)
            return quantity.loss(found._replace(sums=sums), of_tokens, of_layer, division.mesh)

        out, pullback = jax.vjp(loss_of, found.sums, tokens.temperature, layer.options)
        sums_bar, *bars = pullback(weights)
        temperature_bar, options_bar = devices.shares(bars, tokens.x[0], division.mesh)
        none = (None,) * len(layer.w)
        start = chunks.added(start, Gradients(none, temperature_bar, none, options_bar), 0)
        along = tokens, layer, found.constants, sums_bar, division, kept
        return chunks.pulled_back(quantity, start, *along), (out, found)

    along = live, tokens, layer, division
    bars, (out, found) = _over_all_tokens(of_chunk, *along, cotangent=weights)
    return out, found, bars
