"""The scores of a chunk of queries against a chunk of keys, and which of them there are.

Queries are [b, t, k, g, h], keys and values [b, s, k, h], scores [b, k, t, g, s], where g counts
the heads of queries that share a head k of keys and values. A number per query is [b, t, k, g].
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsoft._attention import contractions
from jaxsoft._attention.division import Division, Pair, add, cut
from jaxsoft._core.sizes import known
from jaxsoft._rows.logits import cap, compute_dtype

_QUERIES, _KEYS = 2, 3  # the axes of the bias and of the mask


class Operands(NamedTuple):
    """What attention is differentiated by.

    Attributes:
        q: queries.
        k: keys.
        v: values.
        bias: added to the scores, with size 1 along axes that share it; or None.
        scale: of the products of queries and keys.
        softcap: c of c tanh(scores / c), or None.
        sink: the score of one more key for each head, whose value is 0; or None.
    """

    q: Float[Array, "b t k g h"]
    k: Float[Array, "b s k h"]
    v: Float[Array, "b s k h"]
    bias: Float[Array, "#b #n #t #s"] | None
    scale: Float[Array, ""]
    softcap: Float[Array, ""] | None
    sink: Float[Array, "k g"] | None


class Constants(NamedTuple):
    """What it is not differentiated by.

    Attributes:
        offset: what is subtracted from all values first, that of the sink included.
        mask: which query sees which key, with size 1 along axes that share it; or None.
        query_lengths: how many queries each sequence has, or None.
        key_lengths: how many keys each sequence has, or None.
        bad_queries: 0, or NaN for a query that is not finite.
        bad_keys: 0, or NaN where a key or its value is not finite.
    """

    offset: Float[Array, "b 1 k h"]
    mask: Bool[Array, "#b #n #t #s"] | None
    query_lengths: Int[Array, " b"] | None
    key_lengths: Int[Array, " b"] | None
    bad_queries: Float[Array, "b t k g"]
    bad_keys: Float[Array, "b s k"]


class Part(NamedTuple):
    """The operands of a pair of chunks. A query or a key that is bad is 0 here.

    Attributes:
        q: the chunk of queries.
        k: the chunk of keys.
        v: their values less the offset.
        bias: of these scores, or None; wide, so that its gradient is added up before it is rounded.
        bad: 0, or NaN, for each query and for each key.
        see: which scores there are; None for all of them.
    """

    q: Float[Array, "b t k g h"]
    k: Float[Array, "b s k h"]
    v: Float[Array, "b s k h"]
    bias: Float[Array, "#b #k #t #g #s"] | None
    bad: tuple[Float[Array, "b k t g 1"], Float[Array, "b k 1 1 s"]]
    see: Bool[Array, "..."] | None


def added(total: Operands, part: Operands, pair: Pair) -> Operands:
    """Adds arrays of a pair of chunks to those of all of them."""
    of_query, of_key = (1, pair[0]), (1, pair[1])
    bias = part.bias
    if bias is not None:
        b, k, t, g, s = bias.shape
        bias = jnp.swapaxes(bias, 2, 3).reshape(b, k * g, t, s)
    return Operands(
        add(total.q, part.q, of_query),
        add(total.k, part.k, of_key),
        add(total.v, part.v, of_key),
        add(total.bias, bias, (_QUERIES, pair[0]), (_KEYS, pair[1])),
        add(total.scale, part.scale),
        add(total.softcap, part.softcap),
        total.sink,
    )


# --------------------------------------------------------------------------------- the scores


def part(operands: Operands, constants: Constants, division: Division, pair: Pair) -> Part:
    """The operands of a pair of chunks."""
    i, j = pair
    bad_queries = cut(constants.bad_queries, i, division.query_chunk, 1)
    of_keys = operands.k, operands.v, constants.bad_keys
    k, v, bad_keys = (cut(x, j, division.key_chunk, 1) for x in of_keys)
    q, groups = cut(operands.q, i, division.query_chunk, 1), operands.q.shape[2:4]
    good_queries, good_keys = (bad[..., None] == 0 for bad in (bad_queries, bad_keys))
    bias = _of_scores(operands.bias, groups, division, pair)
    return Part(
        jnp.where(good_queries, q, 0),
        jnp.where(good_keys, k, 0),
        jnp.where(good_keys, v - constants.offset, 0),
        None if bias is None else bias.astype(compute_dtype(q.dtype)),
        (by_score(bad_queries), jnp.swapaxes(bad_keys, 1, 2)[:, :, None, None]),
        _visible(constants, groups, division, pair),
    )


def _of_scores(
    x: Array | None, groups: tuple[int, ...], division: Division, pair: Pair
) -> Array | None:
    """Of the bias or the mask what belongs to a pair of chunks, with the heads in groups."""
    if x is None:
        return None
    x = cut(cut(x, pair[0], division.query_chunk, _QUERIES), pair[1], division.key_chunk, _KEYS)
    heads = (1, 1) if x.shape[1] == 1 else groups
    return jnp.swapaxes(x.reshape(x.shape[0], *heads, *x.shape[2:]), 2, 3)


def _visible(
    constants: Constants, groups: tuple[int, ...], division: Division, pair: Pair
) -> Array | None:
    """Which scores of a pair of chunks there are; None for all of them."""
    t, s = division.query_chunk, division.key_chunk
    row = pair[0] * t + lax.broadcasted_iota(jnp.int32, (1, 1, t, 1, 1), 2)
    column = pair[1] * s + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, s), 4)
    conditions = [_of_scores(constants.mask, groups, division, pair)]
    if known(lambda: division.key_count == 0 or division.key_count % s != 0, False):
        conditions.append(column < division.key_count)
    if division.left is not None:
        conditions.append(column >= row - division.left)
    if division.right is not None:
        conditions.append(column <= row + division.right)
    if constants.query_lengths is not None:
        conditions.append(row < constants.query_lengths[:, None, None, None, None])
    if constants.key_lengths is not None:
        conditions.append(column < constants.key_lengths[:, None, None, None, None])
    given = [condition for condition in conditions if condition is not None]
    return functools.reduce(operator.and_, given) if given else None


def from_products(
    products: Array, bias: Array | None, scale: Array, softcap: Array | None, part: Part
) -> Float[Array, "b k t g s"]:
    """The scores: -inf where there is none, NaN where there is one of something not finite."""
    s = products * scale
    s = s if softcap is None else cap(s, softcap)
    s = s if bias is None else s + bias
    s = s + part.bad[0] + part.bad[1]
    return s if part.see is None else jnp.where(part.see, s, -jnp.inf)


def of_part(part: Part, operands: Operands) -> Float[Array, "b k t g s"]:
    """The scores of a pair of chunks."""
    products = contractions.queries_times_keys(part.q, part.k)
    return from_products(products, part.bias, operands.scale, operands.softcap, part)


def by_score(x: Shaped[Array, "b t k g"]) -> Shaped[Array, "b k t g 1"]:
    """What belongs to a query, for each of its scores."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def by_query(x: Shaped[Array, "b k t g 1"]) -> Shaped[Array, "b t k g"]:
    """The inverse of `by_score`."""
    return jnp.swapaxes(x[..., 0], 1, 2)


def values_at(
    operands: Operands, constants: Constants, key: Int[Array, "b t k g"]
) -> Float[Array, "b t k g h"]:
    """The values of the given keys, less the offset; that of the sink for a negative number.

    One that is not finite is 0: the query does not see it, or is NaN.
    """
    v, offset = operands.v, constants.offset[:, :, :, None]

    def of_head(v: Float[Array, "s h"], key: Int[Array, "t g"]) -> Float[Array, "t g h"]:
        return v.at[key].get(mode="promise_in_bounds")

    values = jax.vmap(jax.vmap(of_head, (1, 1), 1))(v, jnp.maximum(key, 0))
    values = jnp.where(jnp.isfinite(values), values - offset, 0)
    of_sink = jnp.zeros_like(offset) if operands.sink is None else -offset
    return jnp.where(key[..., None] < 0, of_sink, values).astype(compute_dtype(v.dtype))
