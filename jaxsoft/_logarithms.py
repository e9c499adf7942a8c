"""log_softmax, with its rule."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft import _axes, _checks, _logits, _mesh, _rows, _sharding
from jaxsoft._autodiff import jvp_from_vjp, linear_map
from jaxsoft._axes import ClassAxis
from jaxsoft._mesh import Mesh
from jaxsoft._pairs import are_few, exchange_with_others, is_small, lead_over_others
from jaxsoft._sizes import is_empty
from jaxsoft._softmax import minus_top, probabilities


def log_softmax(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
    axis_name: _checks.AxisName = None,
) -> Float[Array, "..."]:
    r"""The logarithm of softmax, a drop-in for `jax.nn.log_softmax`, exact to the last bits.

        y_i = x_i / T - log(Σ_j exp(x_j / T) + exp(s))
        ∂y_i/∂x_j = ([i = j] - p_j) / T

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcastable to `x`; -inf where it is False.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        sink: s, an extra logit that takes mass but is not returned; as in `softmax`.
        axis_name: mesh axes over which the axis of the classes goes on; as in `softmax`.

    Returns:
        Logarithms of the probabilities, with the shape and dtype of `x`.

    Raises:
        TypeError, ValueError: as `softmax`.

    Numerics:
        Every entry is within 6 + gap/2 eps, that of a class with probability near 1 included,
        where `jax.nn.log_softmax` returns 0. An entry of -inf stays -inf and has no derivative.
        A row that is masked or -inf throughout is -inf, with derivative 0. A type without
        infinities (float8_e4m3fn) has its lowest number in place of -inf.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> x = jnp.array([20.0, 0.0])
        >>> print(f"{jaxsoft.log_softmax(x)[0]:.4g} {jax.nn.log_softmax(x)[0]:.4g}")
        -2.061e-09 0

    Source: Blanchard, Higham & Higham 2021.
    """
    args, along = _checks.rows("log_softmax", x, axis, where, temperature, sink, axis_name)
    return args[0] if is_empty(args[0]) else _log_softmax(*args, **along)


@_sharding.program(static=("axes", "mesh"), places=_sharding.as_given)
def _log_softmax(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    sink: Array | None,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
) -> Array:
    shape, axis = x.shape, ClassAxis(_axes.merged_axis(x.ndim, axes), mesh)
    args = _mesh.aligned(x, where, temperature, sink, mesh=mesh)
    x, *options = (_axes.merge_axes(arg, axes) for arg in args)

    def logits() -> _logits.Logits:
        return _logits.prepare(x, axis, *options)

    row = _rows.statistics(logits(), axis)

    def logarithms() -> Array:
        prepared = logits()
        z, z_sink = prepared.z, _mesh.copied(prepared.sink, prepared.z, mesh)
        log_p, mask = log_probabilities(z, z_sink, row, axis), options[0]
        log_p = log_p if mask is None else jnp.where(mask, log_p, -jnp.inf)
        return _logits.rounded(log_p, x.dtype)

    return _axes.unmerge_axes(_logits.keep_inputs(logarithms), axes, shape)


# ȳ ↦ z̄ = ȳ - p Σ_j ȳ_j, and its transpose ż ↦ ẏ = ż - Σ_j p_j ż_j. An entry of -inf is a constant:
# its cotangent counts for nothing.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probabilities(z: Array, sink: Array | None, row: _rows.Row, axis: ClassAxis) -> Array:
    return (z - axis.expand(row.top)) - axis.expand(row.log_normalizer)


log_probabilities = jvp_from_vjp(_log_probabilities)


def _log_probabilities_fwd(
    z: Array, sink: Array | None, row: _rows.Row, axis: ClassAxis
) -> tuple[Array, Any]:
    return log_probabilities(z, sink, row, axis), (z, sink, row)


def _log_probabilities_bwd(axis: ClassAxis, residuals: Any, cotangent: Array) -> Any:
    z, sink, row = residuals
    row = _apart(row)
    p, p_sink = probabilities(z, sink, row.top, row.normalizer, axis, z.dtype)
    y_bar = _apart(jnp.where(z == -jnp.inf, 0, cotangent))
    if p_sink is None:
        return _residual(p, y_bar, axis), None, None
    total = axis.expand(_apart(axis.sum(y_bar)))
    p_sink = axis.expand(_mesh.joined(p_sink, axis.mesh))
    z_bar, sink_bar = y_bar - p * total, -p_sink * total
    excess = axis.expand(axis.sum(z_bar)) + sink_bar
    sink_bar = _mesh.shares(sink_bar.squeeze(axis.position), z, axis.mesh)
    return z_bar - jnp.where(p > 0.5, excess, 0), sink_bar, None


_log_probabilities.defvjp(_log_probabilities_fwd, _log_probabilities_bwd)


# Where one p_k exceeds 1/2, z̄_k is minus the sum of the others, for z̄ sums to 0; in the transpose
# ż_k is subtracted from all first. So nothing is subtracted from 1.
def _residual(p: Array, y_bar: Array, axis: ClassAxis) -> Array:
    """ȳ - p Σ_j ȳ_j."""

    def sum_of(terms: Array) -> Array:
        return axis.expand(_apart(axis.sum(terms)))

    def by_sums(y_bar: Array) -> Array:
        z_bar = y_bar - p * sum_of(y_bar)
        return z_bar + minus_top(p) * sum_of(z_bar)

    if is_small(p) or not are_few(p, axis):
        return by_sums(y_bar)
    constant = lax.stop_gradient(p)
    by_pairs = functools.partial(exchange_with_others, constant, axis=axis)
    transpose_by_pairs = functools.partial(lead_over_others, constant, axis=axis)
    return linear_map(by_sums, by_pairs, transpose_by_pairs)(y_bar)


# On the CPU XLA would else mix the forward pass with the backward one, and sums with what they are
# for, and have arrays in memory where kernels do.
def _apart(arrays: Any) -> Any:
    # One by one: of several together JAX takes all to vary over the devices that one varies over.
    barriers = functools.partial(jax.tree.map, lax.optimization_barrier)
    return lax.platform_dependent(arrays, cpu=barriers, default=lambda a: a)


def complement(p: Array, row: _rows.Row, axis: ClassAxis) -> Array:
    """1 - p, as rest / Z for a class above 1/2."""
    # Arithmetic rather than a selection, as in `jacobian_product`.
    return jnp.maximum((1 + minus_top(p)) * (1 - p), _rest_of_largest(p, row, axis))


def _rest_of_largest(p: Array, row: _rows.Row, axis: ClassAxis) -> Array:
    """rest / Z, and 0 in a row without a class above 1/2, with the derivative of 1 - p."""
    largest = row.largest
    rest = row.rest * largest * jnp.ceil(largest - 0.5)
    return _as_complement(axis.expand(_mesh.copied(rest, p, axis.mesh)), p)


@jax.custom_jvp
def _as_complement(of_row: Array, p: Array) -> Array:
    return jnp.broadcast_to(of_row, p.shape)


@_as_complement.defjvp
def _as_complement_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return _as_complement(*primals), -tangents[1]
