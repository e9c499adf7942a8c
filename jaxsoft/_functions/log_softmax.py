"""log_softmax and its rule."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import devices, options, programs, validation
from jaxsoft._core.autodiff import analytic
from jaxsoft._core.axes import ClassAxis
from jaxsoft._functions.softmax import probabilities
from jaxsoft._rows.jacobian_product import log_pullback
from jaxsoft._rows.logits import Logits, prepare, rounded
from jaxsoft._rows.rowwise import as_given, from_statistics, rowwise
from jaxsoft._rows.statistics import Row


def log_softmax(
    x: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
    axis_name: validation.AxisName = None,
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
    args, along = options.of_softmax("log_softmax", x, axis, where, temperature, sink, axis_name)
    return _log_softmax(*args, **along)


@rowwise(places=programs.as_given, empty=as_given)
def _log_softmax(
    x: Array, where: Array | None, temperature: Array | None, sink: Array | None, axis: ClassAxis
) -> Array:
    def logarithms(logits: Logits, row: Row) -> Array:
        of_sink = devices.copied(logits.sink, logits.z, axis.mesh)
        log_p = log_probabilities(logits.z, of_sink, row, axis)
        return rounded(log_p if where is None else jnp.where(where, log_p, -jnp.inf), x.dtype)

    logits = functools.partial(prepare, x, axis, where, temperature, sink)
    return from_statistics(logarithms, logits, axis, prevent_cse=True)[1]


# y = (z - m) - log Z, and z̄ = ȳ - p Σ_j ȳ_j. An entry of -inf is a constant: its cotangent counts
# for nothing.
def _log_probabilities(z: Array, sink: Array | None, row: Row, axis: ClassAxis) -> Array:
    return (z - axis.expand(row.top)) - axis.expand(row.log_normalizer)


def _log_probabilities_pullback(
    z: Array, sink: Array | None, row: Row, axis: ClassAxis, cotangent: Array
) -> Any:
    p = probabilities(z, sink, row.normalizer, axis, z.dtype)
    if p.sink is not None:
        p = p._replace(sink=devices.joined(p.sink, axis.mesh))
    y_bar = jnp.where(z == -jnp.inf, 0, cotangent)
    return *log_pullback(p, y_bar, axis), None


log_probabilities = analytic(_log_probabilities, _log_probabilities_pullback, static=(3,))
