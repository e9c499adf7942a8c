"""softmax_jacobian and softmax_and_jacobian: the structured Jacobian from logits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft import _axes, _checks, _mesh, _sharding
from jaxsoft._axes import ClassAxis
from jaxsoft._jacobian import SimplexJacobian
from jaxsoft._logits import compute_dtype
from jaxsoft._mesh import Mesh
from jaxsoft._sharding import Places
from jaxsoft._simplex import quotient
from jaxsoft._softmax import of_rows


def softmax_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
    axis_name: _checks.AxisName = None,
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
    args, along = _checks.rows("softmax_jacobian", x, axis, where, temperature, sink, axis_name)
    _, weights, mass = _at_logits(*args, **along)
    return SimplexJacobian(weights, mass, axis_name)


def softmax_and_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
    axis_name: _checks.AxisName = None,
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
    args, along = _checks.rows("softmax_and_jacobian", x, axis, where, temperature, sink, axis_name)
    p, weights, mass = _at_logits(*args, **along)
    return p, SimplexJacobian(weights, mass, axis_name)


def _places(ndim: int, *, axes: tuple[int, ...], **_: Any) -> tuple[Places, Places, Places]:
    rows = _sharding.rows(ndim, axes=axes)
    return _sharding.as_given(ndim), (*rows, axes[0] if len(axes) == 1 else None), rows


@_sharding.program(static=("axes", "mesh"), places=_places)
def _at_logits(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    sink: Array | None,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
) -> tuple[Array, Array, Array]:
    """Probabilities as of `softmax`, and the weights and the sink of the Jacobian."""
    shape, dtype = x.shape, compute_dtype(x.dtype)
    axis = _axes.merged_axis(x.ndim, axes)
    args = _mesh.aligned(x, where, temperature, sink, mesh=mesh)
    row, *options = (_axes.classes_last(arg, axes) for arg in args)
    mass = jnp.zeros(row.shape[:-1], dtype)
    if not x.size:
        return x, row.astype(dtype), mass
    p, p_sink = of_rows(row, ClassAxis(row.ndim - 1, mesh), *options, dtype=dtype)
    mass = mass if p_sink is None else p_sink
    weights, scale = p, options[1]
    if scale is not None:
        scale = scale.astype(dtype)
        weights, mass = quotient(weights, scale), quotient(mass, scale.squeeze(-1))
    p = _axes.unmerge_axes(jnp.moveaxis(p, -1, axis), axes, shape)
    return p.astype(x.dtype), weights, mass
