"""softmax_jacobian and softmax_and_jacobian: the structured Jacobian from logits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import devices, options, programs, validation
from jaxsoft._core.axes import ClassAxis, classes_last, merged_axis, unmerge_axes
from jaxsoft._core.devices import Mesh
from jaxsoft._core.programs import Places
from jaxsoft._functions.softmax import of_rows
from jaxsoft._rows.logits import compute_dtype
from jaxsoft._simplex.formulas import quotient
from jaxsoft._simplex.operator import SimplexJacobian


def softmax_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
    axis_name: validation.AxisName = None,
) -> SimplexJacobian:
    r"""The Jacobian of softmax at logits x, as an operator of n numbers.

        C = (diag(p) - p pᵀ) / T,    p = softmax(x / T)

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the classes, a tuple of axes, or None for all of them. In the result it
            comes last, several axes merged into one.
        where: boolean mask, broadcastable to `x`; classes where it is False have weight 0.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        sink: an extra logit that takes mass but has no row; as in `softmax`.
        axis_name: mesh axes over which the axis of the classes goes on; as in `softmax`.

    Returns:
        A `SimplexJacobian` with the other axes of `x` as its batch; float32 or wider, also where
        `x` has 16 bits.

    Raises:
        TypeError, ValueError: as `softmax`.

    Numerics:
        A row that is masked or -inf throughout has C = 0; one with NaN or +inf is NaN, and no other
        row is touched.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> jacobian = jaxsoft.softmax_jacobian(jnp.array([[0.0, 0.0], [40.0, 0.0]]))
        >>> print(*(f"{value:.4g}" for value in jacobian.norm(2)))
        0.5 8.497e-18
        >>> print(jacobian.mv(jnp.array([1.0, 0.0]))[0])
        [ 0.25 -0.25]
    """
    return _both("softmax_jacobian", x, axis, where, temperature, sink, axis_name)[1]


def softmax_and_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
    axis_name: validation.AxisName = None,
) -> tuple[Float[Array, "..."], SimplexJacobian]:
    r"""softmax(x) and its Jacobian, from the same exponentials.

    Args:
        x: logits, shape [..., n, ...]; as in `softmax_jacobian`.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcastable to `x`.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        sink: an extra logit that takes mass but has no row; as in `softmax`.
        axis_name: mesh axes over which the axis of the classes goes on; as in `softmax`.

    Returns:
        The probabilities, as `softmax` returns them, and the `SimplexJacobian`.

    Raises:
        TypeError, ValueError: as `softmax`.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> p, jacobian = jaxsoft.softmax_and_jacobian(jnp.array([1.0, 1.0]))
        >>> print(p, jacobian.trace())
        [0.5 0.5] 0.5
    """
    return _both("softmax_and_jacobian", x, axis, where, temperature, sink, axis_name)


def _both(function: str, *args: Any) -> tuple[Array, SimplexJacobian]:
    *_, axis_name = args
    arrays, along = options.of_softmax(function, *args)
    p, weights, mass = _at_logits(*arrays, **along)
    return p, SimplexJacobian(weights, mass, axis_name)


def _places(ndim: int, *, axes: tuple[int, ...], **_: Any) -> tuple[Places, Places, Places]:
    rows = programs.rows(ndim, axes=axes)
    return programs.as_given(ndim), (*rows, axes[0] if len(axes) == 1 else None), rows


@programs.program(static=("axes", "mesh"), places=_places)
def _at_logits(
    x: Array, *given: Array | None, axes: tuple[int, ...], mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    """Probabilities as of `softmax`, and the weights and the sink of the Jacobian.

    Given are the mask, the temperature and the sink.
    """
    shape, dtype = x.shape, compute_dtype(x.dtype)
    args = devices.aligned(x, *given, mesh=mesh)
    row, where, scale, sink = (classes_last(arg, axes) for arg in args)
    mass = jnp.zeros(row.shape[:-1], dtype)
    if not x.size:
        return x, row.astype(dtype), mass
    p, p_sink, _ = of_rows(row, where, scale, sink, ClassAxis(row.ndim - 1, mesh), dtype)
    mass = mass if p_sink is None else p_sink
    weights = p
    if scale is not None:
        scale = scale.astype(dtype)
        weights, mass = quotient(weights, scale), quotient(mass, scale.squeeze(-1))
    p = unmerge_axes(jnp.moveaxis(p, -1, merged_axis(x.ndim, axes)), axes, shape)
    return p.astype(x.dtype), weights, mass
