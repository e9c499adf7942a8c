"""The losses of tokens, and their weighted sum, each with its rule."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, DTypeLike

from jaxsoft._core import devices
from jaxsoft._core.autodiff import jvp_from_vjp, transposable
from jaxsoft._core.devices import Mesh
from jaxsoft._functions.token_loss import weighted
from jaxsoft._linear import chunks, online
from jaxsoft._linear.chunks import Division, Gradients, Live
from jaxsoft._linear.online import Layer, Statistics, Tokens


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What a forward rule hands to the backward rule that is not an array."""

    live: Live


def _values(tokens: Any, layer: Any) -> tuple[Tokens, Layer, Live]:
    """The arguments of a rule, and which of them are being differentiated."""
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)
    args = (tokens, layer)
    tokens, layer = jax.tree.map(lambda leaf: leaf.value, args, is_leaf=is_primal)
    of_tokens, of_layer = jax.tree.map(lambda leaf: leaf.perturbed, args, is_leaf=is_primal)
    of_temperature = of_tokens.temperature is True  # None without a temperature
    live = Live(of_tokens.x, of_temperature, of_layer.w, tuple(of_layer.options))
    return tokens, layer, live


def _cotangents(bars: Gradients, dtype: DTypeLike, mesh: Mesh | None) -> tuple[Any, Any]:
    """The gradients in the types of the arguments; w has one of its own, and x on one device."""
    w = None if bars.w is None else bars.w.astype(dtype)
    x = bars.x if bars.x is None or mesh else bars.x.astype(dtype)
    # Labels have no gradient, nor has what is ignored.
    return (x, None, None, None, bars.temperature), (w, bars.options)


# Where a forward rule is differentiated in reverse, JAX takes the checkpoints out of what does not
# depend on the tangents, but leaves them in within another one (as in `jvp_from_vjp`).
_in_chunks = functools.partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.everything_saveable,
)


# The loss of each token. Between the passes stay the arguments and the statistics.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _losses(tokens: Tokens, layer: Layer, division: Division, dtype: DTypeLike) -> Array:
    return _loss(chunks.statistics(tokens, layer, division), tokens, layer, division)


def _loss(statistics: Statistics, tokens: Tokens, layer: Layer, division: Division) -> Array:
    count = online.class_count(layer, division.mesh)
    return online.loss(statistics, tokens, layer.options, count)


losses = jvp_from_vjp(_losses)


def _losses_fwd(tokens: Any, layer: Any, division: Division, dtype: DTypeLike) -> tuple[Array, Any]:
    tokens, layer, live = _values(tokens, layer)

    @_in_chunks
    def statistics(tokens: Tokens, layer: Layer) -> Statistics:
        return chunks.statistics(tokens, layer, division)

    of_tokens = statistics(tokens, layer)
    out = _loss(of_tokens, tokens, layer, division)
    return devices.evenly(out, division.mesh), (tokens, layer, of_tokens, _Static(live))


def _losses_bwd(division: Division, dtype: DTypeLike, residuals: Any, cotangent: Array) -> Any:
    tokens, layer, statistics, static = residuals

    def gradients(cotangent: Array) -> tuple[Any, Any]:
        _, bars = chunks.gradients(tokens, layer, cotangent, static.live, division, statistics)
        return _cotangents(bars, dtype, division.mesh)

    tokens_bar, layer_bar = transposable(gradients, cotangent)
    return Tokens(*tokens_bar), Layer(*layer_bar)


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


# Σ_i weights_i loss_i. Between the passes stay its gradients, in the compute dtype: the cotangent
# may be large, as where a loss is scaled for float16, and they are rounded after it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _weighted_sum(
    tokens: Tokens, layer: Layer, weights: Array, division: Division, dtype: DTypeLike
) -> Array:
    out = _loss(chunks.statistics(tokens, layer, division), tokens, layer, division)
    return jnp.sum(weighted(weights, out))


weighted_sum = jvp_from_vjp(_weighted_sum)


def _weighted_sum_fwd(
    tokens: Any, layer: Any, weights: Any, division: Division, dtype: DTypeLike
) -> tuple[Array, Any]:
    tokens, layer, live = _values(tokens, layer)

    @_in_chunks
    def gradients(tokens: Tokens, layer: Layer, weights: Array) -> tuple[Array, Gradients]:
        return chunks.gradients(tokens, layer, weights, live, division)

    out, bars = gradients(tokens, layer, weights.value)
    total = jnp.sum(weighted(weights.value, out))
    residuals = devices.shares(out, out, division.mesh), bars
    return devices.evenly(total, division.mesh), residuals


def _weighted_sum_bwd(
    division: Division, dtype: DTypeLike, residuals: Any, cotangent: Array
) -> Any:
    out, bars = jax.tree.map(lambda residual: cotangent * residual, residuals)
    tokens_bar, layer_bar = _cotangents(bars, dtype, division.mesh)
    return Tokens(*tokens_bar), Layer(*layer_bar), out


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)
