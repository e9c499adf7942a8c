"""attention_jacobian: how the output of one attention query answers to the query."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import options, validation
from jaxsoft._rows.logits import compute_dtype
from jaxsoft._simplex.softmax_jacobian import softmax_jacobian


def attention_jacobian(
    q: Shaped[ArrayLike, " d"],
    K: Shaped[ArrayLike, "m d"],
    V: Shaped[ArrayLike, "m d_v"],
    *,
    scale: Shaped[ArrayLike, ""] | None = None,
    bias: Shaped[ArrayLike, "..."] | None = None,
    where: Shaped[ArrayLike, "..."] | None = None,
    sink: Shaped[ArrayLike, ""] | None = None,
) -> Float[Array, "d_v d"]:
    r"""The Jacobian of the output of one softmax attention query, by the query.

        out = Vᵀ p,  p = softmax(α K q + b)
        ∂out/∂q = α Vᵀ J K = α (Bᵀ V)ᵀ (Bᵀ K),  J = diag(p) - p pᵀ = B Bᵀ

    which is α times the covariance of values and keys under the attention weights. Both are
    centred before they are multiplied, so that a common offset of all values or keys costs no
    accuracy. The m × m matrix J is not built. For many queries or heads: `jax.vmap`.

    The other Jacobians need no function of their own: ∂out/∂s = (J V)ᵀ by the scores s = α K q + b,
    ∂out/∂K_i = α (J V)_i qᵀ by one key, ∂out/∂V_i = p_i I by one value; with J V =
    `jax.vmap(jaxsoft.softmax_jacobian(s).mv, 1, 1)(V)`.

    Args:
        q: the query, shape [d].
        K: the keys, shape [m, d].
        V: the values, shape [m, d_v].
        scale: α. Default: 1/√d.
        bias: b, added to the scaled scores, broadcastable to [m] (of positions, say); -inf masks a
            key. Default: 0.
        where: boolean mask of the keys, broadcastable to [m]; a key where it is False, and its
            value, has no influence, NaN included.
        sink: an extra score, not scaled, that takes mass and has no key and no value.

    Returns:
        The Jacobian, shape [d_v, d], float32 or wider. 0 where no key is left.

    Raises:
        TypeError: an argument is complex or not an array, `where` is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft.analysis import attention_jacobian
        >>> K, V = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [0.0]])
        >>> print(attention_jacobian(jnp.zeros(2), K, V, scale=1.0).round(4))
        [[ 0.25 -0.25]]
    """
    name = "attention_jacobian"
    given = [validation.floating(name, a, x) for a, x in (("q", q), ("K", K), ("V", V))]
    shapes = [x.shape for x in given]
    for argument, shape, wanted in zip("qKV", shapes, ("[d]", "[m, d]", "[m, d_v]"), strict=True):
        if len(shape) != 1 + (argument != "q"):
            raise ValueError(f"{name}: {argument} must have shape {wanted}, got {shape}")
    (d,), (m, keys), (values, _) = shapes
    if keys != d:
        raise ValueError(f"{name}: K must have shape ({m}, {d}) (q {shapes[0]}), got {shapes[1]}")
    if values != m:
        raise ValueError(f"{name}: V must have {m} rows (K {shapes[1]}), got {shapes[2]}")
    alpha = options.attention_scale(name, scale, d)
    if bias is not None:
        bias = validation.floating(name, "bias", bias)
        bias = validation.broadcast(name, "bias", bias, (m,), "one per key")
    if sink is not None:
        sink = options.number(name, "sink", sink, -math.inf, math.inf)
    mask = validation.mask(name, where, (m,), "one per key")
    return _attention(*given, alpha, bias, mask, sink)


@jax.jit
def _attention(
    q: Array, K: Array, V: Array, scale: Any, bias: Array | None, where: Array | None, sink: Any
) -> Array:
    dtype = compute_dtype(jnp.result_type(q.dtype, K.dtype, V.dtype))
    q, K, V = (a.astype(dtype) for a in (q, K, V))
    if where is not None:
        K, V = (jnp.where(where[:, None], a, 0) for a in (K, V))
    scale = jnp.asarray(scale, dtype)
    sink = None if sink is None else jnp.asarray(sink, dtype)
    scores = scale * (K @ q)
    scores = scores if bias is None else scores + bias.astype(dtype)
    jacobian = softmax_jacobian(scores, -1, where, sink=sink)
    keys, values = (jax.vmap(jacobian.sqrt_T_mv)(a.T) for a in (K, V))
    return scale * (values @ keys.T)
