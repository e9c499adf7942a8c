"""Products with softmax's Jacobian, and its entries, from probabilities that exist already."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft import _axes, _checks, _labels, _logits, _sharding
from jaxsoft._axes import ClassAxis
from jaxsoft._sizes import is_empty
from jaxsoft._softmax import jacobian_product, undominated


def softmax_jvp(
    p: Shaped[ArrayLike, "..."], v: Shaped[ArrayLike, "..."], axis: _checks.Axis = -1
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
    p: Shaped[ArrayLike, "..."], g: Shaped[ArrayLike, "..."], axis: _checks.Axis = -1
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


def _product(function: str, argument: str, p: Any, v: Any, axis: _checks.Axis) -> Array:
    p = _checks.floating(function, "p", p)
    v = _checks.floating(function, argument, v)
    axes = _checks.axes(function, axis, p.ndim)
    v = _checks.broadcast(function, argument, v, p.shape, "the shape of p")
    return p if is_empty(p) else _product_along(p, v, axes=axes)


@_sharding.program(static=("axes",), places=_sharding.as_given)
def _product_along(p: Array, v: Array, *, axes: tuple[int, ...]) -> Array:
    shape, axis = p.shape, ClassAxis(_axes.merged_axis(p.ndim, axes))
    product = _free_product(_axes.merge_axes(p, axes), _axes.merge_axes(v, axes), axis)
    return _axes.unmerge_axes(product, axes, shape)


# What counts for the derivative alone, p being free, is 0 in the value: left out of that, it costs
# nothing there.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _free_product(p: Array, v: Array, axis: ClassAxis) -> Array:
    return _product_of(p, v, axis, free=False)


@_free_product.defjvp
def _free_product_jvp(
    axis: ClassAxis, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    formula = functools.partial(_product_of, axis=axis, free=True)

    # It keeps p and v, and leaves out the value that `jvp` computes as well.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def derivative(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Array:
        return jax.jvp(formula, primals, tangents)[1]

    return _free_product(*primals, axis), derivative(primals, tangents)


def _product_of(p: Array, v: Array, axis: ClassAxis, *, free: bool) -> Array:
    spread = undominated(jnp.max(lax.stop_gradient(p), axis.position))
    product, _ = jacobian_product(p, v, axis, spread, free=free)
    return product.astype(p.dtype)


def softmax_derivative(
    p: Shaped[ArrayLike, "..."],
    i: Shaped[ArrayLike, "..."],
    j: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
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
    p = _checks.floating("softmax_derivative", "p", p)
    axes = _checks.axes("softmax_derivative", axis, p.ndim)
    n = math.prod(p.shape[a] for a in axes)
    rows = tuple(size for a, size in enumerate(p.shape) if a not in axes)
    i = _labels.one_class("softmax_derivative", "i", i, n, rows)
    j = _labels.one_class("softmax_derivative", "j", j, n, rows)
    return jnp.full(rows, jnp.nan, p.dtype) if is_empty(p) else _entry(p, i, j, axes=axes)


@_sharding.program(static=("axes",), places=_sharding.rows)
def _entry(p: Array, i: Array, j: Array, *, axes: tuple[int, ...]) -> Array:
    dtype, axis = p.dtype, ClassAxis(_axes.merged_axis(p.ndim, axes))
    p = _axes.merge_axes(p.astype(_logits.compute_dtype(dtype)), axes)
    n = axis.count(p)
    inside = (i >= 0) & (i < n) & (j >= 0) & (j < n)
    i, j = jnp.clip(i, 0, n - 1), jnp.clip(j, 0, n - 1)
    others = axis.sum(jnp.where(axis.one_hot(i, p), 0, p))
    total = axis.sum(p)
    same = others + (lax.stop_gradient(total) - total)  # 1 - Σp is 0, but not its derivative
    entry = axis.take(p, i) * jnp.where(i == j, same, -axis.take(p, j))
    return _logits.nan_unless(inside, entry).astype(dtype)
