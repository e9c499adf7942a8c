"""softmax_jacobian and softmax_and_jacobian: the structured Jacobian from logits."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft import _checks
from jaxsoft._jacobian import SimplexJacobian
from jaxsoft._logits import compute_dtype
from jaxsoft._softmax import softmax


def softmax_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
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
    args = _checked("softmax_jacobian", x, axis, where, temperature, sink)
    return SimplexJacobian(*_at_logits(*args[:-1], axes=args[-1])[1:])


def softmax_and_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
) -> tuple[Float[Array, "..."], SimplexJacobian]:
    r"""softmax(x) and its Jacobian, from the same exponentials.

    Args:
        x: logits, shape [..., n, ...]; as in `softmax_jacobian`.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcastable to `x`.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        sink: an extra logit that takes mass but has no row; as in `softmax`.

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
    args = _checked("softmax_and_jacobian", x, axis, where, temperature, sink)
    p, weights, mass = _at_logits(*args[:-1], axes=args[-1])
    return p, SimplexJacobian(weights, mass)


def _checked(
    function: str, x: Any, axis: _checks.Axis, where: Any, temperature: Any, sink: Any
) -> tuple[Any, ...]:
    x = _checks.floating(function, "x", x)
    axes = _checks.axes(function, axis, x.ndim)
    where = _checks.mask(function, where, x.shape)
    scale = _checks.temperature(function, temperature, x.shape, axes)
    return x, where, scale, _checks.per_row(function, "sink", sink, x.shape, axes), axes


@functools.partial(jax.jit, static_argnames="axes")
def _at_logits(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    sink: Array | None,
    *,
    axes: tuple[int, ...],
) -> tuple[Array, Array, Array]:
    """Probabilities as of `softmax`, and the weights and the sink of the Jacobian."""
    shape, dtype = x.shape, x.dtype
    kept = [a for a in range(x.ndim) if a not in axes]

    def classes_last(a: Array) -> Array:
        merged = math.prod(a.shape[i] for i in axes)
        return a.transpose(*kept, *axes).reshape(*(a.shape[i] for i in kept), merged)

    z = classes_last(x.astype(compute_dtype(dtype)))
    mask = None if where is None else classes_last(where)
    scale = None if temperature is None else classes_last(temperature.astype(z.dtype))
    if sink is not None:
        # The sink is one more class, for which the temperature, which does not divide it, cancels.
        last = classes_last(sink.astype(z.dtype))
        z = jnp.concatenate([z, last if scale is None else last * scale], -1)
        mask = (
            None
            if mask is None
            else jnp.pad(mask, [(0, 0)] * len(kept) + [(0, 1)], constant_values=True)
        )
    p = softmax(z, -1, mask, temperature=1.0 if scale is None else scale)
    weights = p if scale is None else p / scale
    mass = jnp.zeros(p.shape[:-1], p.dtype)
    if sink is not None:
        p, weights, mass = p[..., :-1], weights[..., :-1], weights[..., -1]
    order = [*kept, *axes]
    back = [order.index(a) for a in range(x.ndim)]
    p = p.astype(dtype).reshape([shape[a] for a in order]).transpose(back)
    return p, weights, mass
