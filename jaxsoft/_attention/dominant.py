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
from jaxsoft._attention.scores import Constants, Division, Operands, Pair
from jaxsoft._core import devices
from jaxsoft._rows.logits import compute_dtype, divisor
from jaxsoft._rows.statistics import Row, united

# A key with Z - 1 below this is dominant: it alone has a probability above 1/2, whichever way that
# of any key is rounded.
_DOMINANT = 0.9

NONE, SINK = -1, -2  # in place of a dominant key


class Found(NamedTuple):
    """The result of the pass: constants.

    Attributes:
        row: the largest score, and Z - 1; -1 for a query without keys and sink.
        dominant: the key with a probability above 1/2, or `SINK`, or `NONE`.
        relative: R for a dominant key or sink, else O; less the offset of the values.
        gap: Σ p_j (m - s_j), if it is asked for.
    """

    row: Row
    dominant: Int[Array, "b t k g"]
    relative: Float[Array, "b t k g h"]
    gap: Float[Array, "b t k g"] | None


class _Sums(NamedTuple):
    """What is known of queries after some of their keys.

    Attributes:
        row: the largest score, and Z - 1.
        key: the first key that has it; -1 for none, and for the sink.
        others: Σ exp(s_j - m) V_j without that key.
        gap: Σ exp(s_j - m) (m - s_j), if it is asked for.
    """

    row: Row
    key: Int[Array, "b t k g"]
    others: Float[Array, "b t k g h"]
    gap: Float[Array, "b t k g"] | None


def found(
    operands: Operands, constants: Constants, division: Division, *, gap: bool = False
) -> Found:
    """Goes over all pairs of chunks once."""
    operands = lax.stop_gradient(operands)

    def step(sums: _Sums, pair: Pair) -> tuple[_Sums, None]:
        here = scores.of_queries(sums, pair[0], division)
        of_pair = _of_pair(operands, constants, division, pair)
        of_pair = of_pair if gap else of_pair._replace(gap=None)
        here = _together(here, of_pair, operands, constants)
        return jax.tree.map(lambda x, y: scores.put(x, y, (1, pair[0])), sums, here), None

    start = _start(operands)
    start = start._replace(gap=jnp.zeros_like(start.row.rest)) if gap else start
    sums = scores.over_pairs(step, start, operands.q, division)
    rest = sums.row.rest
    dominant = jnp.where(sums.key < 0, SINK, sums.key)
    dominant = jnp.where((rest >= 0) & (rest < _DOMINANT), dominant, NONE)
    of_top = jnp.where(dominant == NONE, (rest >= 0).astype(rest.dtype), -rest)
    total = sums.others + of_top[..., None] * scores.values_at(operands, constants, sums.key)
    z = divisor(1 + rest)
    mean = None if sums.gap is None else sums.gap / z
    return Found(sums.row, dominant, total / z[..., None], mean)


def _start(operands: Operands) -> _Sums:
    """The sums of no key but the sink."""
    shape, dtype = operands.q.shape[:-1], compute_dtype(operands.q.dtype)
    none = devices.typed(jnp.zeros(shape, dtype), operands.q)
    others = devices.typed(jnp.zeros((*shape, operands.v.shape[-1]), dtype), operands.q)
    lowest = jnp.finfo(dtype).min
    key = jnp.full_like(none, -1, jnp.int32)
    if operands.sink is None:
        return _Sums(Row(none + lowest, none - 1), key, others, None)
    sink = operands.sink[None, None]
    absent = (sink == -jnp.inf).astype(none.dtype)
    row = Row(none + jnp.maximum(sink, lowest), none - absent)
    return _Sums(row, key, others, None)


def _of_pair(operands: Operands, constants: Constants, division: Division, pair: Pair) -> _Sums:
    """The sums of a chunk of keys."""
    part = scores.part(operands, constants, division, pair)
    s = scores.of_part(part, operands)
    largest = jnp.max(s, -1, keepdims=True)
    top = jnp.maximum(largest, jnp.finfo(s.dtype).min)
    # The first key, by a maximum: XLA:CPU (jax 0.10) is slow at minima of integers.
    back = -lax.broadcasted_iota(s.dtype, s.shape, s.ndim - 1)
    first = jnp.max(jnp.where(s == largest, back, 1 - s.shape[-1]), -1, keepdims=True)
    others = jnp.where(back == first, 0, jnp.exp(s - top))
    rest = jnp.where(largest == -jnp.inf, -1, jnp.sum(others, -1, keepdims=True))
    key = pair[1] * division.keys - first.astype(jnp.int32)
    row = Row(scores.by_query(top), scores.by_query(rest))
    gaps = jnp.where(others == 0, 0, others * (top - s))
    gap = scores.by_query(jnp.sum(gaps, -1, keepdims=True))
    others = mixed(contractions.of_queries, others, part.v)
    return _Sums(row, scores.by_query(key), others, gap)


def _together(a: _Sums, b: _Sums, operands: Operands, constants: Constants) -> _Sums:
    """The sums of both; the key that is not the top any more joins the others."""
    row = united(a.row, b.row)
    newer = b.row.top > a.row.top
    of_a, of_b = (jnp.exp(sums.row.top - row.top) for sums in (a, b))
    joins = jnp.where(newer, of_a, of_b)
    joins = jnp.where(jnp.where(newer, a.row.rest, b.row.rest) < 0, 0, joins)  # of no key at all
    value = scores.values_at(operands, constants, jnp.where(newer, a.key, b.key))
    others = joins[..., None] * value
    others += of_a[..., None] * a.others + of_b[..., None] * b.others
    gap = None
    if a.gap is not None and b.gap is not None:
        gap = _moved(a.gap, a.row, row) + _moved(b.gap, b.row, row)
    return _Sums(row, jnp.where(newer, b.key, a.key), others, gap)


def _moved(gap: Array, part: Row, row: Row) -> Array:
    """Σ exp(s_j - m) (m - s_j) of a part, with the maximum m of the whole row."""
    z, step = 1 + part.rest, row.top - part.top
    return jnp.exp(-step) * (gap + jnp.where(z == 0, 0, z * step))
