"""dot_product_attention: the attention of queries to keys, without the weights."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._attention.division import Division
from jaxsoft._attention.layout import attention
from jaxsoft._core import options, validation
from jaxsoft._core.sizes import Shape, Size, known

# Products of matrices of this size are fast on a CPU, and their results stay in its cache.
_QUERIES, _KEYS = 256, 512

_Arrays = Shaped[ArrayLike, "..."]


@overload
def dot_product_attention(
    query: _Arrays,
    key: _Arrays,
    value: _Arrays,
    bias: _Arrays | None = ...,
    mask: _Arrays | None = ...,
    *,
    scale: Shaped[ArrayLike, ""] | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: _Arrays | None = ...,
    key_value_seq_lengths: _Arrays | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    return_residual: Literal[False] = ...,
    sink: _Arrays | None = ...,
    softcap: Shaped[ArrayLike, ""] | None = ...,
    query_chunk: int | None = ...,
    key_chunk: int | None = ...,
) -> Float[Array, "..."]: ...
@overload
def dot_product_attention(
    query: _Arrays,
    key: _Arrays,
    value: _Arrays,
    bias: _Arrays | None = ...,
    mask: _Arrays | None = ...,
    *,
    scale: Shaped[ArrayLike, ""] | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: _Arrays | None = ...,
    key_value_seq_lengths: _Arrays | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    return_residual: Literal[True],
    sink: _Arrays | None = ...,
    softcap: Shaped[ArrayLike, ""] | None = ...,
    query_chunk: int | None = ...,
    key_chunk: int | None = ...,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]: ...
def dot_product_attention(
    query: Shaped[ArrayLike, "..."],
    key: Shaped[ArrayLike, "..."],
    value: Shaped[ArrayLike, "..."],
    bias: Shaped[ArrayLike, "..."] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    *,
    scale: Shaped[ArrayLike, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Shaped[ArrayLike, "..."] | None = None,
    key_value_seq_lengths: Shaped[ArrayLike, "..."] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    sink: Shaped[ArrayLike, "..."] | None = None,
    softcap: Shaped[ArrayLike, ""] | None = None,
    query_chunk: int | None = None,
    key_chunk: int | None = None,
) -> Any:
    r"""Attention, a drop-in for `jax.nn.dot_product_attention` that never holds the weights.

        O_i = Σ_j p_ij V_j,  p_i = softmax(s_i),  s_ij = α q_i · k_j + b_ij
        ∂O_i/∂s_ij = p_ij (V_j - O_i)          ∂O_i/∂V_j = p_ij          ∂L_i/∂s_ij = p_ij

    with the logsumexp L_i of the scores. The scores are computed in chunks of queries and keys, and
    again for a derivative; pairs of chunks that causality or a window hides are not. Differentiable
    in every mode and to any order, by the bias, the scale, the softcap and the sink too. Where one
    key is far ahead its derivative keeps its digits: the usual formula, ō · V_j - ō · O, loses a
    tenth of it at a gap of 17 between two keys in float32, and all of it at 20.

    Args:
        query: shape [B, T, N, H] or [T, N, H]: batch, queries, heads, features.
        key: shape [B, S, K, H] or [S, K, H]. N is a multiple of K: each head of keys and values
            serves N / K neighbouring heads of queries.
        value: of the shape of `key`.
        bias: b, added to the scaled and capped scores, broadcastable to [B, N, T, S].
        mask: boolean, broadcastable to [B, N, T, S]; a query does not see a key where it is False.
        scale: α. Default: 1/√H.
        is_causal: whether query i sees keys 0 to i alone.
        query_seq_lengths: how many queries of each sequence there are, integers of shape [B]; the
            rest see no key.
        key_value_seq_lengths: how many keys of each sequence there are, integers of shape [B].
        local_window_size: (l, r): query i sees keys i - l to i + r alone, and with `is_causal` none
            after i. A number is both.
        return_residual: whether to return L as well.
        sink: the score of one more key, whose value is 0; a number, or one for each head, shape
            [N]. It is not scaled.
        softcap: c > 0, for scores c tanh(α q · k / c), before bias and mask.
        query_chunk: how many queries make a chunk, at most. Default: 256.
        key_chunk: how many keys make a chunk, at most. Default: 512.

    Returns:
        The output, with the shape and dtype of `query`; with `return_residual` a pair of it and
        the logsumexp of all scores and the sink, shape [B, T, N] or [T, N], in float32 or wider.

    Raises:
        TypeError: an argument is complex or not an array, `mask` is not boolean, lengths, a window
            or a chunk are not integers.
        ValueError: shapes that do not fit, a negative window, a chunk below 1.

    Numerics:
        The output of a query without a key is 0, its logsumexp that of the sink or -inf, with
        derivative 0; a score of -inf, by a bias or by overflow, is no key. What mask, lengths and
        window hide has no influence, NaN included. A query that sees a key or a value with NaN or
        an infinity is NaN. 16-bit types have their scores and sums in float32, and the factors of
        products of matrices in 16 bits (float16: in float32). Σ exp(s_j - m) V_j must not overflow.

        The error of an entry of the derivative by the scores is a few eps of
        p_j Σ_k p_k ‖ō‖ ‖V_j - V_k‖, to which a key that does not dominate adds a few eps of
        p_j ‖ō‖ ‖V_j - v‖, v being, of each feature, the number nearest to 0 among all values.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> q, k = jnp.ones((1, 1, 1)), jnp.array([[[20.0]], [[0.0]]])
        >>> v = jnp.array([[[1.0]], [[0.0]]])
        >>> by_q = lambda attention: jax.grad(lambda q: attention(q, k, v).sum())(q).item()
        >>> print(f"{by_q(jaxsoft.dot_product_attention):.4g}")
        4.122e-08
        >>> print(f"{by_q(jax.nn.dot_product_attention):.4g}")
        0

    Source: Rabe & Staats 2021, "Self-attention does not need O(n²) memory"; Dao 2023,
    "FlashAttention-2".
    """
    args, division = arguments(
        "dot_product_attention",
        (query, key, value),
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        sink=sink,
        softcap=softcap,
        query_chunk=query_chunk,
        key_chunk=key_chunk,
    )
    out = attention(*args, division=division)
    return out if return_residual else out[0]


def arguments(
    name: str,
    arrays: tuple[Any, Any, Any],
    bias: Any,
    mask: Any,
    *,
    scale: Any,
    is_causal: bool,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    local_window_size: Any,
    sink: Any,
    softcap: Any,
    query_chunk: Any,
    key_chunk: Any,
) -> tuple[tuple[Any, ...], Division]:
    """Returns the arguments of `layout.prepared`, and how they are divided, or raises an error."""
    query, key, value = _arrays(name, *arrays)
    (*batch, t, n, h), s = query.shape, key.shape[-3]
    shape = (*(batch or [1]), n, t, s)
    if bias is not None:
        bias = _broadcastable(name, "bias", validation.floating(name, "bias", bias), shape)
    mask = validation.booleans(name, "mask", mask)
    if mask is not None:
        mask = _broadcastable(name, "mask", mask, shape)
    alpha = options.attention_scale(name, scale, h)
    if sink is not None:
        sink = validation.floating(name, "sink", sink)
        sink = validation.broadcast(name, "sink", sink, (n,), "one for each head of queries")
    queries = _lengths(name, "query_seq_lengths", query_seq_lengths, shape[0])
    keys = _lengths(name, "key_value_seq_lengths", key_value_seq_lengths, shape[0])
    left, right = _window(name, local_window_size)
    division = Division(
        _even(t, options.positive_or_none(name, "query_chunk", query_chunk) or _QUERIES),
        _even(s, options.positive_or_none(name, "key_chunk", key_chunk) or _KEYS),
        s,
        left,
        0 if is_causal else right,
    )
    cap = options.softcap(name, softcap)
    return (query, key, value, bias, mask, alpha, queries, keys, sink, cap), division


def _arrays(name: str, query: Any, key: Any, value: Any) -> list[Array]:
    """The queries, keys and values, of one dtype and with shapes that fit."""
    given = {"query": query, "key": key, "value": value}
    floating = {argument: validation.floating(name, argument, x) for argument, x in given.items()}
    query, key, value = arrays = validation.promoted(name, **floating)
    if query.ndim not in (3, 4):
        raise ValueError(
            f"{name}: query must have shape [B, T, N, H] or [T, N, H], got {query.shape}"
        )
    *batch, _, n, h = query.shape
    if key.ndim != query.ndim or (*key.shape[:-3], key.shape[-1]) != (*batch, h):
        letters = "[B, S, K, H]" if batch else "[S, K, H]"
        raise ValueError(
            f"{name}: key must have shape {letters} (query {query.shape}), got {key.shape}"
        )
    validation.same_shape(name, "value", value, key.shape, "that of key")
    if key.shape[-2] == 0 or n % key.shape[-2] != 0:
        raise ValueError(
            f"{name}: key must have a number of heads that divides that of query, {n}, "
            f"got {key.shape[-2]}"
        )
    return arrays


def _broadcastable(name: str, argument: str, value: Array, shape: Shape) -> Array:
    """An array with four axes, each of size 1 or as in the shape [B, N, T, S]."""
    if not validation.broadcasts(value.shape, shape):
        raise ValueError(
            f"{name}: {argument} must broadcast to {shape} ([B, N, T, S]), got {value.shape}"
        )
    return value.reshape((1,) * (4 - value.ndim) + value.shape)


def _lengths(name: str, argument: str, value: Any, batch: Size) -> Array | None:
    """The lengths of sequences as an array of shape [B], or None."""
    if value is None:
        return None
    if isinstance(value, (int, np.ndarray, np.generic)) and np.asarray(value).dtype.kind in "iu":
        value = np.clip(value, 0, np.iinfo(np.int32).max)  # JAX would cut 64 bits silently
    given = validation.array(name, argument, value)
    if not validation.is_kind(given.dtype, jnp.integer):
        raise TypeError(f"{name}: {argument} must be integers, got dtype {given.dtype}")
    return validation.broadcast(name, argument, given, (batch,), "one for each sequence")


def _window(name: str, value: Any) -> tuple[int | None, int | None]:
    """How far a query sees back and ahead."""
    if value is None:
        return None, None
    argument, wanted = "local_window_size", "an integer or a pair of integers"
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: {argument} must be {wanted}, got {len(pair)} of them")
    left, right = (validation.integer(name, argument, size, wanted) for size in pair)
    if left < 0 or right < 0:
        raise ValueError(f"{name}: {argument} must be 0 or more, got {value}")
    most = 2**30  # more than there are keys; a sum of two is an int32
    return min(left, most), min(right, most)


def _even(length: Size, most: int) -> Size:
    """The smallest size of equal chunks that needs no more of them than `most` does."""
    if not known(lambda: length > most, False):
        return length if known(lambda: length > 0, True) else 1
    return math.ceil(length / math.ceil(length / most))
