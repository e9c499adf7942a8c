"""Products with softmax's Jacobian, and its entries, from probabilities that exist already."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import class_ids, programs, validation
from jaxsoft._core.axes import ClassAxis
from jaxsoft._rows.jacobian_product import Probabilities, Vector, flatness, jacobian_product
from jaxsoft._rows.logits import compute_dtype, nan_unless
from jaxsoft._rows.rowwise import as_given, rowwise


def softmax_jvp(
    p: Shaped[ArrayLike, "..."], v: Shaped[ArrayLike, "..."], axis: validation.Axis = -1
) -> Float[Array, "..."]:
    r"""The product of softmax's Jacobian with a tangent, from the probabilities.

        J v = (diag(p) - p pᵀ) v = p ∘ (v - ⟨p, v⟩)

    Nothing is exponentiated. Differentiable in both arguments and in every mode; by p, which sums
    to 1, as the formula above, also in directions that change the sum.

    Args:
        p: probabilities, shape [..., n, ...], that sum to 1 along the axis.
        v: tangent of the logits, broadcastable to `p`.
        axis: the axis of the classes, a tuple of axes, or None for all of them.

    Returns:
        The tangent of the probabilities, with the shape and dtype of `p`.

    Raises:
        TypeError: an argument is complex or not an array.
        ValueError: `axis` is out of range, or `v` does not broadcast to `p`.

    Numerics:
        The error of entry i is at most 8 eps of p_i Σ_j p_j |v_i - v_j|, whatever constant is
        added to v and however close to 1 a probability lies (there the other probabilities must
        be those of `softmax`, not 1 - p).

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> p = jnp.array([0.5, 0.25, 0.25])
        >>> print(jaxsoft.softmax_jvp(p, jnp.array([1.0, 0.0, 0.0])))
        [ 0.25  -0.125 -0.125]
    """
    return _product("softmax_jvp", "v", p, v, axis)


def softmax_vjp(
    p: Shaped[ArrayLike, "..."], g: Shaped[ArrayLike, "..."], axis: validation.Axis = -1
) -> Float[Array, "..."]:
    r"""The product of softmax's transposed Jacobian with a cotangent, from the probabilities.

        Jᵀ g = p ∘ (g - ⟨p, g⟩)

    The Jacobian is symmetric, so this is `softmax_jvp` under the name that a backward pass looks
    for; see there.

    Args:
        p: probabilities, shape [..., n, ...], that sum to 1 along the axis.
        g: cotangent of the probabilities, broadcastable to `p`.
        axis: the axis of the classes, a tuple of axes, or None for all of them.

    Returns:
        The cotangent of the logits, with the shape and dtype of `p`.

    Raises:
        TypeError: an argument is complex or not an array.
        ValueError: `axis` is out of range, or `g` does not broadcast to `p`.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> p = jnp.array([0.5, 0.25, 0.25])
        >>> print(jaxsoft.softmax_vjp(p, jnp.array([0.0, 1.0, 0.0])))
        [-0.125   0.1875 -0.0625]
    """
    return _product("softmax_vjp", "g", p, g, axis)


def _product(function: str, argument: str, p: Any, v: Any, axis: validation.Axis) -> Array:
    p = validation.floating(function, "p", p)
    v = validation.floating(function, argument, v)
    axes = validation.axes(function, axis, p.ndim)
    v = validation.broadcast(function, argument, v, p.shape, "the shape of p")
    return _product_along(p, v, axes=axes, mesh=None)


@rowwise(places=programs.as_given, empty=as_given)
def _product_along(p: Array, v: Array, axis: ClassAxis) -> Array:
    flat = flatness(jnp.max(lax.stop_gradient(p), axis.position))
    product = jacobian_product(Probabilities(p, None, flat), Vector(v, None), axis, free=True)
    return product.classes.astype(p.dtype)


def softmax_derivative(
    p: Shaped[ArrayLike, "..."],
    i: Shaped[ArrayLike, "..."],
    j: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
) -> Float[Array, "..."]:
    r"""One entry of softmax's Jacobian, from the probabilities.

        ∂p_i/∂x_i = p_i (1 - p_i)          ∂p_i/∂x_j = -p_i p_j

    with 1 - p_i summed from the other probabilities.

    Args:
        p: probabilities, shape [..., n, ...], that sum to 1 along the axis.
        i: the class whose probability changes: an integer, or an integer array that broadcasts
            with the shape of `p` without the axis.
        j: the class whose logit changes, likewise.
        axis: the axis of the classes; with several axes, classes count through them in order.

    Returns:
        The derivative, of the shape of `p` without the axis and of its dtype.

    Raises:
        TypeError: `p` is complex or not an array, `i` or `j` is not an integer.
        ValueError: `axis` is out of range, a class given as an integer is outside [0, n) (in an
            array its derivative is NaN), an array of classes does not broadcast.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> p = jnp.array([0.69, 0.10, 0.21])  # setosa, versicolor, virginica
        >>> print(jaxsoft.softmax_derivative(p, 0, 0), jaxsoft.softmax_derivative(p, 0, 1))
        0.2139 -0.069
    """
    p = validation.floating("softmax_derivative", "p", p)
    axes = validation.axes("softmax_derivative", axis, p.ndim)
    n = math.prod(p.shape[a] for a in axes)
    rows = tuple(size for a, size in enumerate(p.shape) if a not in axes)
    i = class_ids.one_class("softmax_derivative", "i", i, n, rows)
    j = class_ids.one_class("softmax_derivative", "j", j, n, rows)
    return _entry(p, i, j, axes=axes, mesh=None)


@rowwise(places=programs.rows, empty=lambda p, rows: jnp.full(rows, jnp.nan, p.dtype))
def _entry(p: Array, i: Array, j: Array, axis: ClassAxis) -> Array:
    dtype, n = p.dtype, axis.count(p)
    p = p.astype(compute_dtype(dtype))
    inside = (i >= 0) & (i < n) & (j >= 0) & (j < n)
    i, j = jnp.clip(i, 0, n - 1), jnp.clip(j, 0, n - 1)
    others = axis.sum(jnp.where(axis.one_hot(i, p), 0, p))
    total = axis.sum(p)
    same = others + (lax.stop_gradient(total) - total)  # 1 - Σp is 0, but not its derivative
    entry = axis.take(p, i) * jnp.where(i == j, same, -axis.take(p, j))
    return nan_unless(inside, entry).astype(dtype)
