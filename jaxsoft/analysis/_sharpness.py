"""attention_statistics: how sharp the attention of every query is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._attention.division import Division
from jaxsoft._attention.dominant import one_pass
from jaxsoft._attention.dot_product_attention import arguments
from jaxsoft._attention.layout import prepared, restored
from jaxsoft._core import programs
from jaxsoft._core.programs import Places


class AttentionStatistics(NamedTuple):
    """What `attention_statistics` says of each query and head, shape [B, T, N] or [T, N].

    All of them are constants: they have no derivative.

    Attributes:
        entropy: -Σ p log p of the weights, the sink among them, in nats; 0 without a key.
        largest_score: of all keys and the sink, scaled, with cap and bias; -inf without a key.
        largest_weight: its probability; 0 without a key.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft.analysis import attention_statistics
        >>> x = jnp.zeros((3, 2, 4))
        >>> print(attention_statistics(x, x).entropy.shape)
        (3, 2)
    """

    entropy: Float[Array, "..."]
    largest_score: Float[Array, "..."]
    largest_weight: Float[Array, "..."]


def attention_statistics(
    query: Shaped[ArrayLike, "..."],
    key: Shaped[ArrayLike, "..."],
    bias: Shaped[ArrayLike, "..."] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    *,
    scale: Shaped[ArrayLike, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Shaped[ArrayLike, "..."] | None = None,
    key_value_seq_lengths: Shaped[ArrayLike, "..."] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    sink: Shaped[ArrayLike, "..."] | None = None,
    softcap: Shaped[ArrayLike, ""] | None = None,
    query_chunk: int | None = None,
    key_chunk: int | None = None,
) -> AttentionStatistics:
    r"""The entropy and the largest score of every query, in one pass that never holds the weights.

        H_i = log Z_i + Σ_j p_ij (m_i - s_ij),  m_i = max_j s_ij,  max_j p_ij = 1 / Z_i

    Both terms of H are 0 or more, so it keeps its digits where one key dominates. An entropy near
    0 in many heads, or scores that grow without bound, say that attention saturates.

    Args:
        query: as for `jaxsoft.dot_product_attention`, and so are all others.
        key: as there.
        bias: as there.
        mask: as there.
        scale: as there.
        is_causal: as there.
        query_seq_lengths: as there.
        key_value_seq_lengths: as there.
        local_window_size: as there.
        sink: as there.
        softcap: as there.
        query_chunk: as there.
        key_chunk: as there.

    Returns:
        `AttentionStatistics`, in float32 or wider.

    Raises:
        TypeError: as there.
        ValueError: as there.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft.analysis import attention_statistics
        >>> q, k = jnp.ones((1, 1, 1)), jnp.array([[[3.0]], [[1.0]], [[0.0]]])
        >>> print(*(f"{x.item():.4f}" for x in attention_statistics(q, k)))
        0.5243 3.0000 0.8438
    """
    args, division = arguments(
        "attention_statistics",
        (query, key, key),
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
    return AttentionStatistics(*_statistics(*args, division=division))


def _places(ndim: int, **_: Any) -> tuple[Places, ...]:
    return (programs.of_last(ndim),) * 3


@programs.program(static=("division",), places=_places)
def _statistics(
    query: Array, key: Array, value: Array, *options: Any, division: Division
) -> tuple[Array, ...]:
    # No values: only the scores matter.
    given = prepared(query, key, value[..., :0], *options, division=division)
    found = one_pass(*given, division, gap=True)
    row, gap = found.row, found.gap
    assert gap is not None
    empty = row.rest < 0
    entropy = jnp.where(empty, 0, row.log_normalizer + gap)
    score = jnp.where(empty, -jnp.inf, row.top)
    weight = jnp.where(empty, 0, 1 / row.normalizer.divisor)
    return tuple(restored(x, query.shape[:-1]) for x in (entropy, score, weight))
