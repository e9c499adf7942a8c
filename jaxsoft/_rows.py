"""Statistics of one row of logits. The only module that takes an exponential of logits.

Those of what is not a logit stand with their formulas: the logarithm of a determinant in
`_inverse`, the exponential of a radius in `_simplex`, both of which are given probabilities. So do
those of `_online`, which are differentiated as they stand.

A row is the logits along one axis, in float32 or wider. What belongs to a row has the shape without
that axis: arithmetic on arrays with an axis of size 1 runs several times slower on the CPU.
Everything here is plain arithmetic without a rule of differentiation: statistics are constants, and
callers state the derivative.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft import _mesh
from jaxsoft._axes import ClassAxis, one_hot, take
from jaxsoft._logits import LONG, Logits

ONE_KERNEL = 16_384  # the length of the longest row that XLA holds in one kernel on a GPU
_SHORT = 16  # the length of a short row
_SERIES_TERMS = 14  # of exp(d) - 1 - d for |d| < 1/2 in float64


class Row(NamedTuple):
    """Statistics of rows of logits z, from which every function of the package is built.

    Attributes:
        top: the maximum m, or a finite number for a row of -inf alone.
        rest: Z - 1 with Z = Σ exp(z - m): the sum of the exponentials without the one of the
            maximum, which is 1. It keeps its relative accuracy where Z rounds to 1. In a row of
            -inf alone it is -1.
    """

    top: Float[Array, "..."]
    rest: Float[Array, "..."]

    @property
    def normalizer(self) -> Float[Array, "..."]:
        """Z = Σ exp(z - m)."""
        return 1 + self.rest

    @property
    def log_normalizer(self) -> Float[Array, "..."]:
        """log Z, to its last bits where Z rounds to 1; 0 for a row of -inf alone."""
        return jnp.log1p(jnp.maximum(self.rest, 0))

    @property
    def largest(self) -> Float[Array, "..."]:
        """1 / Z, the largest probability; 1 for a row of -inf alone."""
        return 1 / at_least_one(self.normalizer)


def statistics(logits: Logits, axis: ClassAxis, place: Int[Array, "..."] | None = None) -> Row:
    """Computes the statistics of each row of logits: constants, without a derivative.

    Args:
        logits: as `prepare` returns them.
        axis: the axis of a row.
        place: the class that is kept out of the sum. Default: that of the maximum. With another
            one `rest` is exact to the rounding of Z.
    """
    z, top, sink = lax.stop_gradient((logits.z, logits.top, logits.sink))
    if axis.mesh:
        # A part without the class keeps another one out, of which all is to be added again.
        if place is not None:
            place = jnp.minimum(place, z.shape[axis.position] - 1)
        part = _statistics(z, top, None, axis.position, place)
        return _with_sink(_of_devices(part, axis), sink)
    return _statistics(z, top, sink, axis.position, place)


# As `_united` has it for two, of parts with the maxima m_d ≤ M and the rests r_d: those with the
# maximum M, c of them, have r_d and 1 each, the others (1 + r_d) exp(m_d - M).
def _of_devices(part: Row, axis: ClassAxis) -> Row:
    """The statistics of whole rows from those of their parts on each device."""
    top = _mesh.largest(part.top, axis.mesh)
    highest = part.top == top
    rest = jnp.where(highest, part.rest, part.normalizer * jnp.exp(part.top - top))
    rest, count = _mesh.total((rest, highest.astype(rest.dtype)), axis.mesh)
    return Row(top, rest + (count - 1))


def _statistics(z: Array, top: Array, sink: Array | None, axis: int, index: Array | None) -> Row:
    """Those of rows on one device."""

    def by_sum(z: Array, top: Array, sink: Array | None, index: Array | None) -> Row:
        if index is None:
            index = jnp.argmax(z, axis)
        # Without the barrier XLA copies the sum into each use that the functions of the row make.
        rest, apart = lax.optimization_barrier(_divided_sum(z, top, index, axis))
        if sink is not None:
            # The larger of the two takes the place of the entry kept out.
            of_sink = jnp.exp(sink - top)
            rest, apart = rest + jnp.minimum(apart, of_sink), jnp.maximum(apart, of_sink)
        # Of that entry exp(z_i - m) - 1 is left: 0 for the maximum, -1 in a row of -inf alone. For
        # any other its rounding is that of Z.
        return Row(top, rest + (apart - 1))

    def at_once(z: Array, top: Array, sink: Array | None, index: Array | None) -> Row:
        return _with_sink(in_one_pass(z, axis), sink)

    # On a CPU the exponentials take the time, elsewhere the memory.
    return lax.platform_dependent(z, top, sink, index, cpu=by_sum, default=at_once)


def top_and_normalizer(
    logits: Logits, axis: ClassAxis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """m and Z, for where the accuracy of Z - 1 does not matter: constants."""
    if axis.mesh:
        row = statistics(logits, axis, jnp.zeros(logits.top.shape, jnp.int32))
        return row.top, row.normalizer
    at = axis.position

    def by_sum(z: Array, top: Array, sink: Array | None) -> tuple[Array, Array]:
        total = jnp.sum(jnp.exp(z - jnp.expand_dims(top, at)), at)
        return top, total if sink is None else total + jnp.exp(sink - top)

    def at_once(z: Array, top: Array, sink: Array | None) -> tuple[Array, Array]:
        row = _with_sink(in_one_pass(z, at), sink)
        return row.top, row.normalizer

    constants = lax.stop_gradient((logits.z, logits.top, logits.sink))
    if logits.z.shape[at] <= ONE_KERNEL:
        return by_sum(*constants)
    return lax.platform_dependent(*constants, cpu=by_sum, default=at_once)


def probabilities(
    z: Float[Array, "..."], top: Float[Array, "..."], total: Float[Array, "..."], axis: ClassAxis
) -> Float[Array, "..."]:
    """exp(z - m) / Z; 0 in a row of -inf alone. exp(z - log Z) would round the offset in."""
    return jnp.exp(z - axis.expand(top)) / axis.expand(at_least_one(total))


def sink_probability(
    sink: Float[Array, "..."], top: Float[Array, "..."], total: Float[Array, "..."]
) -> Float[Array, "..."]:
    """exp(s - m) / Z."""
    return jnp.exp(sink - top) / at_least_one(total)


def at_least_one(total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Z as a divisor: it holds exp(0), so it is at least 1, but for a row of -inf alone, 0."""
    # By maximum rather than by selection, as in `maximum`: XLA then makes one kernel of softmax.
    return jnp.maximum(total, 1)


def other_exponentials(
    z: Float[Array, "..."], top: Float[Array, "..."], index: Int[Array, "..."], axis: int
) -> Float[Array, "..."]:
    """exp(z - m) with 0 at one entry of each row."""
    exponentials = jnp.exp(z - jnp.expand_dims(top, axis))

    def by_selection(exponentials: Array, index: Array) -> Array:
        return jnp.where(one_hot(index, z.shape, axis), 0, exponentials)

    # On the CPU XLA then shares the exponentials between the sum and the derivative, where a
    # selection would be fused into either, and take the exponential twice.
    def by_scatter(exponentials: Array, index: Array) -> Array:
        places = [lax.broadcasted_iota(index.dtype, index.shape, d) for d in range(index.ndim)]
        places.insert(axis, index)
        at_index = exponentials.at[tuple(places)]
        return at_index.set(0, mode="promise_in_bounds", unique_indices=True)

    if _chunk_count(z.shape[axis]) > 1:
        return by_selection(exponentials, index)
    return lax.platform_dependent(exponentials, index, cpu=by_scatter, default=by_selection)


# A part of a row with the maximum m and Z - 1 = r, and one with M ≥ m and R, have together M and
# R + (1 + r) exp(m - M): sums of positive terms. One entry has r = 0, and no entry at all r = -1.
def in_one_pass(z: Float[Array, "..."], axis: int) -> Row:
    """The statistics, from one reading of the logits.

    Its error grows with the number of entries that are taken one after another, as that of a sum
    does: some tens on a GPU, but all of a row on a CPU.
    """
    nothing = jnp.asarray(jnp.finfo(z.dtype).min, z.dtype), jnp.asarray(-1, z.dtype)
    top, rest = lax.reduce((z, jnp.zeros_like(z)), nothing, _united, (axis,))
    # A row with +inf is NaN.
    return Row(top, jnp.where(top == jnp.inf, jnp.nan, rest))


def _with_sink(row: Row, sink: Array | None) -> Row:
    """The statistics of rows and one more logit of each."""
    if sink is None:
        return row
    top, rest = _united(row, (sink, jnp.zeros_like(sink)))
    return Row(top, jnp.where(top == jnp.inf, jnp.nan, rest))


def _united(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The maximum, and Z - 1, of two parts of a row together."""
    (top, rest), (other_top, other_rest) = a, b
    gap = jnp.where(top == other_top, 0, -jnp.abs(top - other_top))  # 0 also between infinities
    first = top >= other_top
    larger, smaller = jnp.where(first, rest, other_rest), jnp.where(first, other_rest, rest)
    return jnp.maximum(top, other_top), larger + (1 + smaller) * jnp.exp(gap)


def _divided_sum(
    z: Float[Array, "..."], top: Float[Array, "..."], index: Int[Array, "..."], axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Σ exp(z_j - m) without one entry, and that entry: a difference of sums would cancel."""
    n = z.shape[axis]
    if n <= _SHORT:
        # XLA's kernel for a sum on the CPU is made for long rows; two sums at once go another way.
        exponentials = jnp.exp(z - jnp.expand_dims(top, axis))
        here = one_hot(index, z.shape, axis)
        halves = jnp.where(here, 0, exponentials), jnp.where(here, exponentials, 0)
        zero = jnp.zeros((), z.dtype)
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])
        others, own = lax.reduce(halves, (zero, zero), add, (axis,))
        return others, own
    own = jnp.exp(take(z, index, axis) - top)
    chunks = _chunk_count(n)
    if chunks == 1:
        return jnp.sum(other_exponentials(z, top, index, axis), axis), own
    # XLA fuses a plain exponential into its sum on the CPU, a selected one it writes to memory
    # first: 3 to 4 times slower on arrays beyond the cache. So only the chunk of the entry left
    # out, one in `chunks`, is summed by selection.
    size = n // chunks
    chunk, place = index // size, index % size
    z = _chunked(z, axis, chunks)
    sums = jnp.sum(jnp.exp(z - jnp.expand_dims(top, (axis, axis + 1))), axis + 1)
    sums = jnp.where(one_hot(chunk, sums.shape, axis), 0, sums)
    index = jnp.expand_dims(chunk, (axis, axis + 1))
    near = jnp.take_along_axis(z, index, axis, mode="promise_in_bounds").squeeze(axis)
    return jnp.sum(sums, axis) + jnp.sum(other_exponentials(near, top, place, axis), axis), own


def log_abs_sum(
    z: Float[Array, "..."], b: Float[Array, "..."], top: Float[Array, "..."], axis: ClassAxis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """log|S| and the sign of S = Σ b_j exp(z_j - m), m the maximum where b is not 0."""
    counts = b != 0
    z, top = jnp.where(counts, z, -jnp.inf), axis.expand(top)
    gap = jnp.where(z == top, 0, z - top)  # 0 also between +inf and +inf
    terms = jnp.where(counts, b * jnp.exp(gap), 0)
    place = jnp.argmax(z, axis.position)
    if axis.mesh:
        highest = jnp.max(z, axis.position) == top.squeeze(axis.position)
        place = jnp.where(highest, place, z.shape[axis.position])
    apart = axis.take(terms, place)
    others = axis.sum(jnp.where(axis.one_hot(place, z), 0, terms))
    total = apart + others
    # As in a Row, S - 1 is put together without adding 1; b_k - 1 is exact for b_k near 1.
    positive = jnp.log1p(jnp.where(total > 0, (apart - 1) + others, 0))
    negative = jnp.log(jnp.where(total > 0, 1, -total))
    return jnp.where(total > 0, positive, negative), jnp.sign(total)


def signed_weights(
    z: Float[Array, "..."],
    top: Float[Array, "..."],
    logarithm: Float[Array, "..."],
    sign: Float[Array, "..."],
    axis: ClassAxis,
) -> Float[Array, "..."]:
    """exp(z - m) / S from log|S| and the sign of S; 0 where S is 0."""
    finite = jnp.where(logarithm == -jnp.inf, 0, logarithm)
    top, finite, sign = map(axis.expand, (top, finite, sign))
    return sign * jnp.exp((z - top) - finite)


def other_mass(loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 - exp(-loss), the mass of all other classes, without the subtraction."""
    return -jnp.expm1(-loss)


def divergence_terms(
    p: Float[Array, "..."], q: Float[Array, "..."], log_ratio: Float[Array, "..."]
) -> Float[Array, "..."]:
    """p (exp(d) - 1 - d) for d = log q - log p: none is negative, and none cancels."""
    near = jnp.abs(log_ratio) < 0.5
    d = jnp.where(near, log_ratio, 0)
    series = jnp.zeros_like(d)
    for k in range(_SERIES_TERMS + 1, 1, -1):
        series = series * d + 1 / math.factorial(k)
    far = (q - p) - jnp.where(p == 0, 0, p * log_ratio)
    return jnp.where(near, p * (d * d * series), far)


def difference(
    p: Float[Array, "..."], q: Float[Array, "..."], log_ratio: Float[Array, "..."]
) -> Float[Array, "..."]:
    """q - p from the logarithm of their ratio, to its last bits where both round to 1."""
    d = -jnp.abs(log_ratio)
    return jnp.where(log_ratio < 0, p * jnp.expm1(d), -q * jnp.expm1(d))


def _chunked(z: Array, axis: int, chunks: int) -> Array:
    return z.reshape(*z.shape[:axis], chunks, z.shape[axis] // chunks, *z.shape[axis + 1 :])


@functools.cache
def _chunk_count(n: int) -> int:
    """Into how many equal chunks a row of n is summed: near 128 if n is large and divisible."""
    divisors = [k for k in range(8, 1025) if n % k == 0] if n > LONG else []
    return min(divisors, key=lambda k: max(k / 128, 128 / k), default=1)
