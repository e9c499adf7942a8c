"""entropy and its rule."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import devices, options, programs, validation
from jaxsoft._core.autodiff import analytic
from jaxsoft._core.axes import ClassAxis
from jaxsoft._functions.softmax import probabilities
from jaxsoft._rows.jacobian_product import Vector, jacobian_product
from jaxsoft._rows.logits import compute_dtype, prepare
from jaxsoft._rows.rowwise import from_statistics, rowwise
from jaxsoft._rows.statistics import Row


def entropy(
    x: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    axis_name: validation.AxisName = None,
) -> Float[Array, "..."]:
    r"""The entropy of softmax(x), in nats, from the logits.

        H = -Σ_j p_j log p_j = log1p(Σ_{j≠k} exp(z_j - m)) + Σ_j p_j (m - z_j),  z = x / T
        ∂H/∂x = -J (z - m) / T

    Both terms of H are non-negative: nothing cancels, and the entropy of a confident row keeps
    its last bits.

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcastable to `x`; classes where it is False do not count.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        axis_name: mesh axes over which the axis of the classes goes on; as in `softmax`. The result
            is alike on their devices.

    Returns:
        The entropy in nats, with the shape of `x` without the axis, in float32 or wider: a
        statistic of 16-bit logits needs more digits than they have.

    Raises:
        TypeError, ValueError: as `softmax`.

    Numerics:
        A row that is masked or -inf throughout has entropy 0 and derivative 0. A class of
        probability 0 contributes 0, however far below the maximum it lies.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> print(f"{jaxsoft.entropy(jnp.array([40.0, 0.0])):.4g}")
        1.742e-16
    """
    (*args, _), along = options.of_softmax("entropy", x, axis, where, temperature, None, axis_name)
    return _entropy(*args, **along)


@rowwise(places=programs.rows, empty=lambda x, rows: jnp.zeros(rows, compute_dtype(x.dtype)))
def _entropy(x: Array, where: Array | None, temperature: Array | None, axis: ClassAxis) -> Array:
    logits = functools.partial(prepare, x, axis, where, temperature)
    _, out = from_statistics(lambda logits, row: row_entropy(logits.z, row, axis), logits, axis)
    return devices.joined(out, axis.mesh)


# ∇H = -J log p = -J (z - m), for J is blind to a constant; in a confident row z_k - m = 0 and the
# entry of class k is p_k Σ_j p_j (m - z_j), without a cancellation.
def _row_entropy(z: Array, row: Row, axis: ClassAxis) -> Array:
    gaps = _gaps(z, row, axis)
    mean_gap = axis.sum(jnp.exp(-gaps) * gaps) / row.normalizer.divisor
    return devices.copied(row.log_normalizer + mean_gap, z, axis.mesh)


def _row_entropy_pullback(z: Array, row: Row, axis: ClassAxis, cotangent: Array) -> Any:
    p = probabilities(z, None, row.normalizer, axis, z.dtype)
    gaps = _gaps(z, row, axis)
    slope = jacobian_product(p, Vector(gaps, None), axis).classes
    return axis.expand(cotangent) * slope, None


row_entropy = analytic(_row_entropy, _row_entropy_pullback, static=(2,))


# At 1000 an exponential is 0 in every type, and so is what the class adds: no selection is needed.
def _gaps(z: Array, row: Row, axis: ClassAxis) -> Array:
    """m - z, the distance to the maximum; 1000 where it is more."""
    return jnp.minimum(axis.expand(row.top) - z, 1000)
