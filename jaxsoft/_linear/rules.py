"""The losses of tokens, and their weighted sum, each with its rule."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

from jaxsoft._core import devices
from jaxsoft._core.autodiff import jvp_from_vjp, transposable, values_and_live
from jaxsoft._core.devices import Mesh
from jaxsoft._functions.token_loss import weighted
from jaxsoft._linear import chunks, online
from jaxsoft._linear.chunks import Division, Live
from jaxsoft._linear.online import Layer, Tokens


def _values(tokens: Any, layer: Any) -> tuple[Tokens, Layer, Live]:
    """The arguments of a rule, and which of them are being differentiated."""
    (tokens, layer), (of_tokens, of_layer) = values_and_live((tokens, layer))
    live = Live(of_tokens.x, of_tokens.temperature, of_layer.w, of_layer.options)
    return tokens, layer, live


def _cotangents(bars: Any, dtype: DTypeLike, mesh: Mesh | None) -> tuple[Tokens, Layer]:
    """`Gradients` as cotangents of the arguments: of w in its own type, of x on one device too."""
    w: Any = None if bars.w is None else bars.w.astype(dtype)
    x = bars.x if bars.x is None or mesh else bars.x.astype(dtype)
    constant: Any = None  # labels, and which tokens exist or are ignored
    tokens = Tokens(x, constant, constant, constant, bars.temperature)
    return tokens, Layer(w, bars.options)


# Under reverse-over-reverse JAX strips an outer checkpoint from code that does not depend on the
# tangents; a nested one survives. (`jvp_from_vjp` does the same.)
def _in_chunks(fun: Callable[..., Any], *args: Any) -> Any:
    """The result of a function with checkpoints that survive a further derivative."""
    policy = jax.checkpoint_policies.everything_saveable
    return jax.checkpoint(fun, prevent_cse=False, policy=policy)(*args)


# The loss of each token. Between the passes stay the arguments and the statistics.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _losses(tokens: Tokens, layer: Layer, division: Division, dtype: DTypeLike) -> Array:
    statistics = chunks.statistics(tokens, layer, division)
    return online.loss(statistics, tokens, layer, division.mesh)


losses = jvp_from_vjp(_losses)


def _losses_fwd(tokens: Any, layer: Any, division: Division, dtype: DTypeLike) -> tuple[Array, Any]:
    tokens, layer, live = _values(tokens, layer)
    statistics = _in_chunks(functools.partial(chunks.statistics, division=division), tokens, layer)
    out = online.loss(statistics, tokens, layer, division.mesh)
    return devices.evenly(out, division.mesh), (tokens, layer, statistics, live)


def _losses_bwd(division: Division, dtype: DTypeLike, residuals: Any, cotangent: Array) -> Any:
    tokens, layer, statistics, live = residuals

    def gradients(cotangent: Array) -> tuple[Tokens, Layer]:
        _, bars = chunks.gradients(tokens, layer, cotangent, live, division, statistics)
        return _cotangents(bars, dtype, division.mesh)

    return transposable(gradients, cotangent)


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


# Σ_i weights_i loss_i. Between the passes stay its gradients, in the compute dtype: the cotangent
# may be large, as where a loss is scaled for float16, and they are rounded after it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _weighted_sum(
    tokens: Tokens, layer: Layer, weights: Array, division: Division, dtype: DTypeLike
) -> Array:
    return jnp.sum(weighted(weights, losses(tokens, layer, division, dtype)))


weighted_sum = jvp_from_vjp(_weighted_sum)


def _weighted_sum_fwd(
    tokens: Any, layer: Any, weights: Any, division: Division, dtype: DTypeLike
) -> tuple[Array, Any]:
    tokens, layer, live = _values(tokens, layer)
    gradients = functools.partial(chunks.gradients, live=live, division=division)
    out, bars = _in_chunks(gradients, tokens, layer, weights.value)
    total = jnp.sum(weighted(weights.value, out))
    residuals = devices.shares(out, out, division.mesh), bars
    return devices.evenly(total, division.mesh), residuals


def _weighted_sum_bwd(
    division: Division, dtype: DTypeLike, residuals: Any, cotangent: Array
) -> Any:
    out, bars = jax.tree.map(lambda residual: cotangent * residual, residuals)
    return *_cotangents(bars, dtype, division.mesh), out


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)
