"""Statistics of one row of logits. The only module that takes an exponential of logits.

Those of what is not a logit stand with their formulas: the logarithm of a determinant in
`_inverse`, the exponential of a radius in `_simplex`, both of which are given probabilities. So do
those of `_online`, which are differentiated as they stand, and the terms with factors of
`_logsumexp`.

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
from jaxtyping import Array, DTypeLike, Float, Int

from jaxsoft import _mesh
from jaxsoft._axes import ClassAxis, one_hot, take
from jaxsoft._logits import LONG, Logits, nan_unless
from jaxsoft._sizes import known

ONE_KERNEL = 16_384  # the length of the longest row that XLA holds in one kernel on a GPU
_SHORT = 16  # the length of a short row
_SCATTERED = 64  # rows with more classes than this share their exponentials
_MANY = 4096  # rows: on the CPU XLA leaves out of a kernel what has fewer entries than this
_CACHE = 2**25  # bytes
_VERY_LONG = 2**15  # the length of a row that is better summed in chunks, however narrow
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


def statistics(logits: Logits, axis: ClassAxis, label: Int[Array, "..."] | None = None) -> Row:
    """Computes the statistics of each row of logits: constants, without a derivative.

    Args:
        logits: as `prepare` returns them.
        axis: the axis of a row.
        label: a class whose exponential `other_exponentials` will leave out of this row without a
            sink. Then the two share what they compute, and `rest` is exact to the rounding of Z,
            or to that of Z - 1 where the label has the maximum.
    """
    z, top, sink, _, narrow = lax.stop_gradient(logits)
    if axis.mesh:
        part = _statistics(z, top, None, narrow, axis.position, None)
        return _with_sink(_of_devices(part, axis), sink)
    return _statistics(z, top, sink, narrow, axis.position, label)


# As `_united` has it for two, of parts with the maxima m_d ≤ M and the rests r_d: those with the
# maximum M, c of them, have r_d and 1 each, the others (1 + r_d) exp(m_d - M).
def _of_devices(part: Row, axis: ClassAxis) -> Row:
    """The statistics of whole rows from those of their parts on each device."""
    top = _mesh.largest(part.top, axis.mesh)
    highest = part.top == top
    rest = jnp.where(highest, part.rest, part.normalizer * jnp.exp(part.top - top))
    rest, count = _mesh.total((rest, highest.astype(rest.dtype)), axis.mesh)
    return Row(top, rest + (count - 1))


def _statistics(
    z: Array,
    top: Array,
    sink: Array | None,
    narrow: Array | None,
    axis: int,
    label: Array | None,
) -> Row:
    """Those of rows on one device."""

    def by_sum(
        z: Array, top: Array, sink: Array | None, narrow: Array | None, label: Array | None
    ) -> Row:
        if label is not None and _shared(z, axis):
            others = jnp.sum(_without(z, top, label, axis), axis)
            own = jnp.exp(take(z, label, axis) - top)
            return Row(top, lax.optimization_barrier(others) + (own - 1))
        # Without the barrier XLA copies the sum into each use that the functions of the row make.
        rest, ties = lax.optimization_barrier(_divided_sum(z, top, axis, narrow))
        if sink is not None:
            of_sink = jnp.exp(sink - top)
            at_top = jnp.floor(of_sink)
            rest, ties = rest + (of_sink - at_top), ties + at_top
        # One of the maxima is left out. In a row of -inf alone there is none: -1.
        return Row(top, rest + (ties - 1))

    def at_once(
        z: Array, top: Array, sink: Array | None, narrow: Array | None, label: Array | None
    ) -> Row:
        return _with_sink(in_one_pass(z, axis), sink)

    # On a CPU the exponentials take the time, elsewhere the memory.
    return lax.platform_dependent(z, top, sink, narrow, label, cpu=by_sum, default=at_once)


def top_and_normalizer(
    logits: Logits, axis: ClassAxis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """m and Z, for where the accuracy of Z - 1 does not matter: constants."""
    if axis.mesh:
        row = statistics(logits, axis)
        return row.top, row.normalizer
    at = axis.position

    def by_sum(z: Array, top: Array, sink: Array | None) -> tuple[Array, Array]:
        total = jnp.sum(jnp.exp(z - jnp.expand_dims(top, at)), at)
        return top, total if sink is None else total + jnp.exp(sink - top)

    def at_once(z: Array, top: Array, sink: Array | None) -> tuple[Array, Array]:
        row = _with_sink(in_one_pass(z, at), sink)
        return row.top, row.normalizer

    constants = lax.stop_gradient((logits.z, logits.top, logits.sink))
    if known(lambda: logits.z.shape[at] <= ONE_KERNEL, True):
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
    z: Float[Array, "..."], top: Float[Array, "..."], label: Int[Array, "..."], axis: ClassAxis
) -> Float[Array, "..."]:
    """exp(z - m), with 0 for the class of the label."""

    def by_selection(z: Array, top: Array, label: Array) -> Array:
        return jnp.where(axis.one_hot(label, z), 0, jnp.exp(z - axis.expand(top)))

    if axis.mesh or not _shared(z, axis.position):
        return by_selection(z, top, label)
    by_scatter = functools.partial(_without, axis=axis.position)
    return lax.platform_dependent(z, top, label, cpu=by_scatter, default=by_selection)


def _shared(z: Array, axis: int) -> bool:
    """Whether the sum and the derivative of rows with a label share their exponentials on a CPU."""
    # Short rows are faster without a scatter, and what does not fit the cache is computed again in
    # less time than it is written and read.
    return known(lambda: _SCATTERED < z.shape[axis] <= LONG and z.nbytes < _CACHE, False)


# A selection would be fused into the sum and into the derivative, and take the exponentials twice.
def _without(z: Array, top: Array, label: Array, axis: int) -> Array:
    """exp(z - m), with 0 for the class of the label, as an array in memory."""
    places = [lax.broadcasted_iota(label.dtype, label.shape, d) for d in range(label.ndim)]
    places.insert(axis, label)
    at_label = jnp.exp(z - jnp.expand_dims(top, axis)).at[tuple(places)]
    return at_label.set(0, mode="promise_in_bounds", unique_indices=True)


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
    return Row(top, nan_unless(top != jnp.inf, rest))


def _with_sink(row: Row, sink: Array | None) -> Row:
    """The statistics of rows and one more logit of each."""
    if sink is None:
        return row
    top, rest = _united(row, (sink, jnp.zeros_like(sink)))
    return Row(top, nan_unless(top != jnp.inf, rest))


def _united(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The maximum, and Z - 1, of two parts of a row together."""
    (top, rest), (other_top, other_rest) = a, b
    gap = jnp.where(top == other_top, 0, -jnp.abs(top - other_top))  # 0 also between infinities
    first = top >= other_top
    larger, smaller = jnp.where(first, rest, other_rest), jnp.where(first, other_rest, rest)
    return jnp.maximum(top, other_top), larger + (1 + smaller) * jnp.exp(gap)


# An exponential is 1 at a maximum, and where it rounds to 1, and less elsewhere: its floor says
# which, without a selection, for which XLA writes an array to memory on the CPU.
def _divided_sum(
    z: Float[Array, "..."],
    top: Float[Array, "..."],
    axis: int,
    narrow: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Σ exp(z_j - m) without the maxima, and their number: a difference of sums would cancel."""
    n = z.shape[axis]
    rows = z.size // n
    if narrow is not None and _apart_if_narrow(narrow, axis):
        return _divided_sum_of_narrow(narrow, top, z.dtype)
    few = known(lambda: 1 < rows < _MANY, False)  # one row may be many, of a `jax.vmap`
    long = known(lambda: n > LONG or (few and z.nbytes >= _CACHE), False)
    chunks = _chunk_count(n) if long else 1
    if chunks > 1:
        return _divided_sum_of_chunks(z, top, axis, chunks)
    exponentials = jnp.exp(z - jnp.expand_dims(top, axis))
    terms, ones = _parts(exponentials)
    if known(lambda: n <= _SHORT and (rows < _MANY or rows % 2 == 0), False):
        # XLA's kernel for a sum on the CPU is made for long rows; two sums at once go another way,
        # but not at once on several cores if many rows cannot be halved.
        zero = jnp.zeros((), z.dtype)
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])
        rest, ties = lax.reduce((terms, ones), (zero, zero), add, (axis,))
        return rest, ties
    if few or axis < z.ndim - 1:
        # Where XLA makes two kernels of two sums, they share what they read if one is of the
        # exponentials themselves. The difference is a whole number up to a rounding that matters
        # only beside millions of terms.
        rest = jnp.sum(terms, axis)
        return rest, jnp.round(jnp.sum(exponentials, axis) - rest)
    return _sum(terms, axis), _sum(ones, axis)


# All but one chunk are summed as they are. The one with the largest sum has the maximum if all
# others together are less than 1, and if they are more, then a 1 that is subtracted from it cancels
# nothing.
def _divided_sum_of_chunks(z: Array, top: Array, axis: int, chunks: int) -> tuple[Array, Array]:
    z = _chunked(z, axis, chunks)
    sums = jnp.sum(jnp.exp(z - jnp.expand_dims(top, (axis, axis + 1))), axis + 1)
    largest = jnp.argmax(sums, axis)
    others = jnp.sum(jnp.where(one_hot(largest, sums.shape, axis), 0, sums), axis)
    index = jnp.expand_dims(largest, (axis, axis + 1))
    near = jnp.take_along_axis(z, index, axis, mode="promise_in_bounds").squeeze(axis)
    rest, ties = _divided_sum(near, top, axis)
    return others + rest, ties


def _apart_if_narrow(x: Array, axis: int) -> bool:
    """Whether the two sums are better off without each other on a CPU."""
    large = known(lambda: 2 * x.nbytes >= _CACHE and LONG <= x.shape[axis] <= _VERY_LONG, False)
    return large and x.dtype == jnp.bfloat16 and axis == x.ndim - 1


# Of long rows in bfloat16 XLA takes a single sum in one kernel, which reads them as they are, but
# for two sums it has them in memory in float32. So each has the logits and the maximum as if they
# were its own: XLA joins nothing across a selection by what is finite.
def _divided_sum_of_narrow(x: Array, top: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    def exponentials(x: Array, earlier: Array) -> Array:
        own_top = jnp.where(jnp.isfinite(earlier), top, 0)
        return jnp.exp(x.astype(dtype) - jnp.expand_dims(own_top, -1))

    terms, _ = _parts(exponentials(lax.optimization_barrier(x), top))
    x, rest = lax.optimization_barrier((x, jnp.sum(terms, -1)))
    return rest, jnp.round(jnp.sum(exponentials(x, rest), -1) - rest)


# On the CPU XLA has one kernel for both sums of many rows, without an array in memory between, if
# it knows where they start. A 0 that the program has elsewhere too becomes an argument of the
# kernel; -0 is as neutral, and hardly ever elsewhere.
def _sum(terms: Array, axis: int) -> Array:
    return lax.reduce(terms, jnp.asarray(-0.0, terms.dtype), lax.add, (axis,))


def _parts(exponentials: Array) -> tuple[Array, Array]:
    """The exponentials below 1, with 0 in place of the others, and 1 for each of these."""
    ones = jnp.floor(exponentials)
    return exponentials - ones, ones


def other_mass(loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 - exp(-loss), the mass of all other classes, without the subtraction."""
    return -jnp.expm1(-loss)


# Of a class with p = 0 the term is q: it belongs to a sum over all classes, in which q and p both
# add up to 1.
def divergence_terms(
    p: Float[Array, "..."], q: Float[Array, "..."], quarter: Float[Array, "..."]
) -> Float[Array, "..."]:
    """p (exp(d) - 1 - d) for d / 4 = (log q - log p) / 4: none is negative, and none cancels."""
    near = (jnp.abs(quarter) < 0.125) & (p != 0)
    d = jnp.where(near, 4 * quarter, 0)
    series = jnp.zeros_like(d)
    for k in range(_SERIES_TERMS + 1, 1, -1):
        series = series * d + 1 / math.factorial(k)
    far = (q - p) - 4 * (p * quarter)
    return jnp.where(near, p * (d * d * series), far)


def difference(
    p: Float[Array, "..."], q: Float[Array, "..."], log_ratio: Float[Array, "..."]
) -> Float[Array, "..."]:
    """q - p from the logarithm of their ratio, to its last bits where both round to 1."""
    d = -jnp.abs(log_ratio)
    exact = jnp.where(log_ratio < 0, p * jnp.expm1(d), -q * jnp.expm1(d))
    return jnp.where(p == 0, q, exact)


def _chunked(z: Array, axis: int, chunks: int) -> Array:
    return z.reshape(*z.shape[:axis], chunks, z.shape[axis] // chunks, *z.shape[axis + 1 :])


@functools.cache
def _chunk_count(n: int) -> int:
    """Into how many equal chunks a row of n is summed: near √n, if n has such a divisor.

    Then the sums that are looked through are as many as the entries that are read twice.
    """
    divisors = [k for k in range(8, 1025) if n % k == 0]
    return min(divisors, key=lambda k: max(k / math.sqrt(n), math.sqrt(n) / k), default=1)
