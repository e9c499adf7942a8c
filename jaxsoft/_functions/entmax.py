"""sparsemax and entmax, and their rule."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import options, powers, programs, validation
from jaxsoft._core.autodiff import jvp_from_vjp
from jaxsoft._core.axes import ClassAxis
from jaxsoft._rows import orders, thresholds
from jaxsoft._rows.logits import keep_inputs, prepare
from jaxsoft._rows.orders import Order
from jaxsoft._rows.rowwise import as_given, rowwise


def sparsemax(
    x: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
) -> Float[Array, "..."]:
    r"""The point of the simplex nearest to the logits: most classes of a decided row are exactly 0.

        p_i = max(x_i / T - τ, 0),    τ such that Σ_i p_i = 1
        J = (diag(s) - s sᵀ / Σs) / T,    s = 1 where p > 0, else 0

    It is `entmax` at alpha = 2.

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcast with `x`; as in `softmax`.
        temperature: T > 0, a number or one value per row; as in `softmax`.

    Returns:
        Probabilities, with the shape and dtype of `x`.

    Raises:
        TypeError, ValueError: as `softmax`.

    Numerics:
        Each entry is within an eps of 1, and so is the sum of a row; edge cases as in `softmax`.
        Where a class enters the support, J jumps: there the derivative is that of the support as
        computed. A fixed number of steps, without a sort.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> print(jaxsoft.sparsemax(jnp.array([1.0, 0.5, -1.0])))
        [0.75 0.25 0.  ]
        >>> print(jaxsoft.sparsemax(jnp.array([3.0, 0.5, -1.0])))
        [1. 0. 0.]

    Source: Martins & Astudillo 2016, "From softmax to sparsemax"; Michelot 1986 for the steps.
    """
    arrays, along = options.of_entmax("sparsemax", x, 2.0, axis, where, temperature)
    return _entmax(*arrays, **along)


def entmax(
    x: Shaped[ArrayLike, "..."],
    alpha: Shaped[ArrayLike, "..."] = 1.5,
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
) -> Float[Array, "..."]:
    r"""α-entmax, the family from softmax (alpha = 1) to sparsemax (alpha = 2) and beyond.

        p_i = [(α - 1) x_i / T - τ]₊^(1 / (α - 1)),    τ such that Σ_i p_i = 1
        J = (diag(s) - s sᵀ / Σs) / T,    s_i = p_i^(2 - α) where p_i > 0, else 0

    For alpha > 1 a class is exactly 0 from some distance to the maximum on, 1 / (α - 1) at most
    where it is the only other. Differentiable in every mode, also by alpha and the temperature.

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        alpha: α ≥ 1, a number or one value per row (broadcastable to `x` with the reduced axes of
            size 1). 1.25, 1.5 and 2, given as numbers, need neither exponentials nor logarithms,
            and a number up to 2 takes about a third of the time of an array. 1 is softmax to the
            rounding, which `softmax` computes faster.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcast with `x`; as in `softmax`.
        temperature: T > 0, a number or one value per row; as in `softmax`.

    Returns:
        Probabilities, with the shape and dtype of `x`.

    Raises:
        TypeError: as `softmax`; `alpha` is no number and no array.
        ValueError: as `softmax`; an alpha given as a number is less than 1 or not finite (given as
            an array, its rows are NaN).

    Numerics:
        Each entry is within an eps of 1 (for alpha > 2 within two), and so is the sum of a row;
        edge cases as in `softmax`.
        Where a class enters the support the function has no second derivative for alpha ≥ 1.5, and
        no first one from 2 on.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> x = jnp.array([1.0, 0.5, -1.0])
        >>> for alpha in (1.0, 1.5, 2.0):
        ...     print(*(f"{p:.4f}" for p in jaxsoft.entmax(x, alpha)))
        0.5741 0.3482 0.0777
        0.6740 0.3260 0.0000
        0.7500 0.2500 0.0000
        >>> slope = jax.jacfwd(lambda alpha: jaxsoft.entmax(x, alpha))(1.5)
        >>> print(*(f"{d:.4f}" for d in slope))
        0.1239 -0.1239 0.0000

    Source: Peters, Niculae & Martins 2019, "Sparse sequence-to-sequence models"; Correia, Niculae &
    Martins 2019 for the derivative by alpha.
    """
    arrays, along = options.of_entmax("entmax", x, alpha, axis, where, temperature)
    return _entmax(*arrays, **along)


@rowwise(places=programs.as_given, empty=as_given, static=("number",))
def _entmax(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    alpha: Array,
    axis: ClassAxis,
    number: float | None,
) -> Array:
    p, _ = of_rows(x, where, temperature, alpha, axis, number)
    return p.astype(x.dtype)


def of_rows(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    alpha: Array,
    axis: ClassAxis,
    number: float | None,
) -> tuple[Array, Order]:
    """The probabilities along one axis, in float32 or wider, and α."""
    logits = keep_inputs(lambda: prepare(x, axis, where, temperature))
    order = orders.order(alpha.astype(logits.z.dtype).squeeze(axis.position), number)
    p, _ = thresholds.solution(logits, order, axis)
    return probabilities(logits.z, order, p, axis), order


# ẏ = ż - λ̇ moves p by s ẏ with s = p^(2-α), and λ̇ = ⟨s, ż⟩ / Σs keeps Σp at 1: the derivative by z
# is C(s, 0). A change of α moves p as the change E α̇ of the logits would, where s E = ∂p/∂α for a λ
# that is held fixed:
#
#     E = ∂/∂a (1 - p^a) / a, for a p that is held fixed.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _probabilities(z: Array, order: Order, p: Array, axis: ClassAxis) -> Array:
    return p


probabilities = jvp_from_vjp(_probabilities)


def _probabilities_fwd(
    z: Array, order: Order, p: Array, axis: ClassAxis
) -> tuple[Array, tuple[Array, Order]]:
    p = probabilities(z, order, p, axis)
    return p, (p, order)


def _probabilities_bwd(axis: ClassAxis, residuals: tuple[Array, Order], cotangent: Array) -> Any:
    p, order = residuals
    z_bar = orders.product(orders.slopes(p, order, axis), cotangent, axis)
    by_alpha = axis.sum(z_bar * slope_by_alpha(p, order, axis))
    return z_bar, Order(by_alpha, order.number), None


_probabilities.defvjp(_probabilities_fwd, _probabilities_bwd)


def slope_by_alpha(p: Array, order: Order, axis: ClassAxis) -> Array:
    """E: the change of the logits that moves p as a change of α does."""
    return powers.depth_slope(p, axis.expand(order.excess))
