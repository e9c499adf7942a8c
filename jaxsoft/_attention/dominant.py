"""One pass over the scores: the statistics of each query, and its output less a dominant value.

Let the largest score m of a query be that of key t. Z - 1 is the sum of the other exponentials. If
p_t exceeds 1/2, what is kept of the output O is

    R = O - V_t = Σ_{j≠t} p_j (V_j - V_t),

a sum over the other keys as well, which has all its digits however small it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft._attention import contractions, scores
from jaxsoft._attention.contractions import mixed
from jaxsoft._attention.division import Division, Pair, over_pairs, put, query_chunk
from jaxsoft._attention.scores import Constants, Operands
from jaxsoft._core import devices
from jaxsoft._rows.logits import compute_dtype, divisor
from jaxsoft._rows.statistics import Row, gaps_at, of_no_entry, united

# A key is dominant if Z - 1 is below this: then its probability exceeds 1/2, and its exponential is
# the only one above this, with room for the rounding of both. It is found by that and not by the
# equality of its score and the maximum, which XLA may compute twice, with a rounding more or less.
_DOMINANT = 0.9

NONE, SINK = -1, -2  # in place of a key


class Found(NamedTuple):
    """The result of the pass: constants.

    Attributes:
        row: the largest score, and Z - 1; -1 for a query with neither a visible key nor a sink.
        dominant: the key with a probability above 1/2, or `SINK`, or `NONE`.
        relative: R where a key or the sink dominates, elsewhere O less the offset of the values.
        value: that of the dominant key, or sink, less the offset; 0 without one.
        gap: Σ p_j (m - s_j), if it is asked for.
    """

    row: Row
    dominant: Int[Array, "b t k g"]
    relative: Float[Array, "b t k g h"]
    value: Float[Array, "b t k g h"]
    gap: Float[Array, "b t k g"] | None


class _Sums(NamedTuple):
    """What is known of queries after some of their keys.

    Attributes:
        row: the largest score m, and Z - 1.
        leader: the key with the largest score, or `SINK`; `NONE` if others are near, or no key.
        others: Σ exp(s_j - m) V_j without the leader.
        gap: Σ exp(s_j - m) (m - s_j), if it is asked for.
    """

    row: Row
    leader: Int[Array, "b t k g"]
    others: Float[Array, "b t k g h"]
    gap: Float[Array, "b t k g"] | None


def one_pass(
    operands: Operands, constants: Constants, division: Division, *, gap: bool = False
) -> Found:
    """Goes over all pairs of chunks once."""
    operands = lax.stop_gradient(operands)

    def step(sums: _Sums, pair: Pair) -> tuple[_Sums, None]:
        here = query_chunk(sums, pair[0], division)
        of_pair = _sums_of_pair(operands, constants, division, pair, gap=gap)
        here = _together(here, of_pair, operands, constants)
        return jax.tree.map(lambda x, y: put(x, y, (1, pair[0])), sums, here), None

    start = _start(operands)
    start = start._replace(gap=jnp.zeros_like(start.row.rest)) if gap else start
    sums = over_pairs(step, start, operands.q, division)
    rest = sums.row.rest
    dominant = jnp.where((rest >= 0) & (rest < _DOMINANT), sums.leader, NONE)
    value = scores.values_at(operands, constants, sums.leader)
    included = (sums.leader != NONE).astype(rest.dtype)
    factor = jnp.where(dominant == NONE, included, -rest)[..., None]
    z = divisor(1 + rest)
    relative = (sums.others + factor * value) / z[..., None]
    value = jnp.where((dominant == NONE)[..., None], 0, value)
    return Found(sums.row, dominant, relative, value, None if sums.gap is None else sums.gap / z)


def _start(operands: Operands) -> _Sums:
    """The sums of no key but the sink."""
    shape, dtype = operands.q.shape[:-1], compute_dtype(operands.q.dtype)
    none, others, leader = devices.typed(
        (
            jnp.zeros(shape, dtype),
            jnp.zeros((*shape, operands.v.shape[-1]), dtype),
            jnp.full(shape, NONE, jnp.int32),
        ),
        operands.q,
    )
    if operands.sink is None:
        return _Sums(of_no_entry(none), leader, others, None)
    sink = operands.sink[None, None]
    absent = sink == -jnp.inf
    row = Row(none + jnp.maximum(sink, jnp.finfo(dtype).min), none - absent.astype(dtype))
    return _Sums(row, jnp.where(absent, leader, SINK), others, None)


def _sums_of_pair(
    operands: Operands, constants: Constants, division: Division, pair: Pair, *, gap: bool
) -> _Sums:
    """The sums of a chunk of keys."""
    part = scores.part(operands, constants, division, pair)
    s = scores.of_part(part, operands)
    largest = jnp.max(s, -1, keepdims=True)
    m = jnp.maximum(largest, jnp.finfo(s.dtype).min)
    e = jnp.exp(s - m)
    near = (e > _DOMINANT).astype(s.dtype)
    place = lax.broadcasted_iota(s.dtype, s.shape, s.ndim - 1)
    alone = jnp.sum(near, -1, keepdims=True) == 1
    key = jnp.sum(near * place, -1, keepdims=True).astype(jnp.int32)
    leader = jnp.where(alone, pair[1] * division.key_chunk + key, NONE)
    others = jnp.where(alone & (near == 1), 0, e)
    rest = jnp.sum(others, -1, keepdims=True) - (~alone).astype(s.dtype)
    gaps = None
    if gap:
        below = jnp.where(others == 0, 0, others * (m - s))
        gaps = scores.by_query(jnp.sum(below, -1, keepdims=True))
    m, rest, leader = map(scores.by_query, (m, rest, leader))
    return _Sums(Row(m, rest), leader, mixed(contractions.weights_times_keys, others, part.v), gaps)


def _together(a: _Sums, b: _Sums, operands: Operands, constants: Constants) -> _Sums:
    """The sums of both; the leader of the lower part joins the others."""
    row = united(a.row, b.row)
    newer = b.row.top > a.row.top
    of_a, of_b = (jnp.exp(sums.row.top - row.top) for sums in (a, b))
    below = jnp.where(newer, a.leader, b.leader)
    joins = jnp.where(below == NONE, 0, jnp.where(newer, of_a, of_b))
    value = scores.values_at(operands, constants, below)
    others = joins[..., None] * value
    others += of_a[..., None] * a.others + of_b[..., None] * b.others
    gap = None
    if a.gap is not None and b.gap is not None:
        gap = gaps_at(a.gap, a.row, row.top) + gaps_at(b.gap, b.row, row.top)
    return _Sums(row, jnp.where(newer, b.leader, a.leader), others, gap)
