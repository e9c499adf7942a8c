"""entmax_jacobian: the structured Jacobian of entmax from logits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

from jaxsoft._core import options, programs, validation
from jaxsoft._core.axes import ClassAxis, classes_last
from jaxsoft._core.devices import Mesh
from jaxsoft._core.programs import Places
from jaxsoft._functions import entmax
from jaxsoft._rows import orders
from jaxsoft._rows.logits import compute_dtype
from jaxsoft._simplex.formulas import quotient
from jaxsoft._simplex.operator import SimplexJacobian


def entmax_jacobian(
    x: Shaped[ArrayLike, "..."],
    alpha: Shaped[ArrayLike, "..."] = 1.5,
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
) -> SimplexJacobian:
    r"""The Jacobian of entmax at logits x, as an operator of n numbers.

        C = (diag(s) - s sᵀ / Σs) / T,    s_i = p_i^(2 - α) where p_i > 0, else 0

    A class with p_i = 0 has weight 0: C is that of the support, and its rank is one less than the
    number of the classes there.

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        alpha: α ≥ 1, a number or one value per row; as in `entmax`. 2 is sparsemax.
        axis: the axis of the classes, a tuple of axes, or None for all of them. In the result it
            comes last, several axes merged into one.
        where: boolean mask, broadcastable to `x`; classes where it is False have weight 0.
        temperature: T > 0, a number or one value per row; as in `softmax`.

    Returns:
        A `SimplexJacobian` with the other axes of `x` as its batch and without a sink; float32 or
        wider, also where `x` has 16 bits. Its methods `second` and `certificate` are those of
        softmax, of which it is one only for alpha = 1.

    Raises:
        TypeError, ValueError: as `entmax`.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> jacobian = jaxsoft.entmax_jacobian(jnp.array([1.0, 0.5, -1.0]), alpha=2.0)
        >>> print(jacobian.as_matrix())
        [[ 0.5 -0.5  0. ]
         [-0.5  0.5  0. ]
         [ 0.   0.   0. ]]
        >>> print(jacobian.norm(2), jacobian.eigvalsh())
        1.0 [0. 0. 1.]
    """
    arrays, along = options.of_entmax("entmax_jacobian", x, alpha, axis, where, temperature)
    weights = _weights(*arrays, **along)
    return SimplexJacobian(weights, jnp.zeros(weights.shape[:-1], weights.dtype))


def _places(ndim: int, *, axes: tuple[int, ...], **_: Any) -> Places:
    return (*programs.rows(ndim, axes=axes), axes[0] if len(axes) == 1 else None)


@programs.program(static=("axes", "mesh", "number"), places=_places)
def _weights(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    alpha: Array,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
    number: float | None,
) -> Array:
    """s / T."""
    row, alpha, dtype = classes_last(x, axes), classes_last(alpha, axes), compute_dtype(x.dtype)
    mask, scale = classes_last(where, axes), classes_last(temperature, axes)
    if not x.size:
        return row.astype(dtype)
    axis = ClassAxis(row.ndim - 1, mesh)
    p, order = entmax.of_rows(row, mask, scale, alpha, axis, number)
    s = orders.slopes(p, order, axis)
    return s if scale is None else quotient(s, scale.astype(dtype))
