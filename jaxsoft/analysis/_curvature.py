"""fisher_vp and ggn_vp: products with the curvature of a classifier, for whole parameter trees."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, PyTree, Shaped

from jaxsoft._core import validation
from jaxsoft._rows.logits import divisor
from jaxsoft._simplex.operator import SimplexJacobian
from jaxsoft._simplex.softmax_jacobian import softmax_jacobian
from jaxsoft.analysis import _checks


def fisher_vp(
    model: Callable[..., Any],
    params: PyTree,
    x: PyTree,
    v: PyTree,
    *,
    weights: Shaped[ArrayLike, "..."] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> PyTree:
    r"""The Fisher information of a softmax classifier times a vector.

        F v = 1/N Σ_i E_{y~p_i}[g gᵀ] v,  g = ∇ log p_i(y)
            = 1/N Σ_i (Bᵢᵀ Gᵢ)ᵀ (Bᵢᵀ Gᵢ v),  Gᵢ = ∂logits_i/∂params,  Bᵢ Bᵢᵀ = diag(p_i) - p_i p_iᵀ

    The expectation over the labels y is exact: the structured square root B of softmax's Jacobian
    takes the place of a sum over the classes. One product with G and one with its transpose, for
    all examples at once, whatever the number of classes; neither F nor G is built. The data's own
    labels do not enter (those would give the empirical Fisher).

    Linear in `v` and differentiable in every argument. For confident examples B keeps the last
    bits of the small probabilities, where p (1 - p) would be 0.

    Args:
        model: a function of `params` and `x` that returns logits, shape [..., n]. A temperature
            or a mask of classes (logits of -inf) belongs into it. It must be differentiable in
            forward mode too; `jaxsoft.jvp_from_vjp` makes a `jax.custom_vjp` function so.
        params: a pytree of floating arrays. Of an Equinox model these are the first part of
            `params, static = eqx.partition(model, eqx.is_inexact_array)`, and `eqx.combine(params,
            static)` within a function makes the model again.
        x: inputs of all examples, any pytree; passed on to `model`.
        v: a pytree like `params`.
        weights: the weight of each example, broadcastable to [...].
        reduction: "mean" over the total weight (N without weights; 0 if it is 0), or "sum".

    Returns:
        F v, a pytree like `params`.

    Raises:
        TypeError: `model` is not callable or does not return floating logits, a leaf is not a
            floating array.
        ValueError: `v` is not like `params`, `weights` do not broadcast, `reduction` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft.analysis import fisher_vp
        >>> def model(params, x):
        ...     return x @ params["w"]
        >>> params, v = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[1.0, 0.0], [0.0, 0.0]])}
        >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
        >>> print(fisher_vp(model, params, x, v)["w"].round(4))
        [[ 1.25 -1.25]
         [ 0.25 -0.25]]
    """
    by_root = lambda jacobian, u: jacobian.sqrt_mv(jacobian.sqrt_T_mv(u))
    return _product("fisher_vp", by_root, model, params, x, v, weights, reduction)


def ggn_vp(
    model: Callable[..., Any],
    params: PyTree,
    x: PyTree,
    v: PyTree,
    *,
    weights: Shaped[ArrayLike, "..."] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> PyTree:
    r"""The generalised Gauss-Newton matrix of softmax cross-entropy times a vector.

        G v = 1/N Σ_i Gᵢᵀ Jᵢ Gᵢ v,  Gᵢ = ∂logits_i/∂params,  Jᵢ = diag(p_i) - p_i p_iᵀ

    J is the Hessian of the loss by the logits, for every label. So G is the Hessian of the loss
    by the parameters without the curvature of the model: the Hessian itself where the logits are
    linear in the parameters, and positive semi-definite everywhere. It equals the Fisher
    information (Martens 2020); `fisher_vp` goes through the square root of J, this through J.

    Args:
        model: as in `fisher_vp`.
        params: a pytree of floating arrays, as in `fisher_vp`.
        x: inputs of all examples, any pytree; passed on to `model`.
        v: a pytree like `params`.
        weights: the weight of each example, broadcastable to [...]: the sum Σ_j q_j of its
            targets where that is not 1 (class weights, ignored examples).
        reduction: "mean" over the total weight (N without weights; 0 if it is 0), or "sum".

    Returns:
        G v, a pytree like `params`.

    Raises:
        TypeError, ValueError: as `fisher_vp`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> from jaxsoft.analysis import ggn_vp
        >>> x, labels = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([0, 1])
        >>> def loss(w):
        ...     return jaxsoft.cross_entropy(x @ w, labels).mean()
        >>> w, v = jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [0.0, 0.0]])
        >>> print(ggn_vp(lambda w, x: x @ w, w, x, v))
        [[ 1.25 -1.25]
         [ 0.25 -0.25]]
        >>> print(jax.jvp(jax.grad(loss), (w,), (v,))[1])  # the Hessian times v
        [[ 1.25 -1.25]
         [ 0.25 -0.25]]

    Source: Martens 2020, "New insights and perspectives on the natural gradient method".
    """
    return _product("ggn_vp", SimplexJacobian.mv, model, params, x, v, weights, reduction)


def _product(
    name: str, of_row: Any, model: Any, params: Any, x: Any, v: Any, weights: Any, reduction: Any
) -> PyTree:
    """Gᵀ `of_row`(J, G v), with the weights."""
    model = _checks.callable_or_raise(name, "model", model, params)
    params = _checks.parameters(name, "params", params)
    v = _checks.direction(name, v, params)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'mean' or 'sum', got {reduction!r}")

    logits_of = lambda params: _checks.logits_of(name, "model", model(params, x))
    logits, pushforward = jax.linearize(logits_of, params)
    if not logits.ndim:
        raise ValueError(f"{name}: model must return logits of shape [..., n], got ()")
    product = of_row(softmax_jacobian(logits), pushforward(v))
    each = validation.floating(name, "weights", 1.0 if weights is None else weights)
    rows, wanted = logits.shape[:-1], "one weight for each example"
    each = validation.broadcast(name, "weights", each, rows, wanted).astype(product.dtype)
    if reduction == "mean":
        each = each / divisor(jnp.sum(each))
    weight = each[..., None]
    product = jnp.where(weight == 0, 0, weight * product)  # an ignored example may hold NaN
    (out,) = jax.linear_transpose(pushforward, params)(product.astype(logits.dtype))
    return out
