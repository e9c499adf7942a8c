"""What XLA:CPU compiles better in a form of its own.

Measured with jax 0.10.2 on two cores; `make bench` measures the quantities that are named here.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike

from jaxsoft._core.axes import ClassAxis, one_hot, take
from jaxsoft._core.sizes import known
from jaxsoft._rows import jacobian_product, statistics
from jaxsoft._rows.jacobian_product import Probabilities, Vector
from jaxsoft._rows.logits import Logits
from jaxsoft._rows.statistics import Row, from_sums

_LONG = 4096  # entries: a row with more of them is long
_CHUNKED = 64  # entries: no shorter row is summed in chunks
_SHORT = 28  # entries: a row with no more is short, and a sum of two arrays is unrolled
_SCATTERED = 64  # classes, from which on the exponentials are shared
_MANY = 4096  # rows: XLA:CPU does not fuse reductions with fewer results than this
_CACHE = 2**25  # bytes
_SMALL = 2**16  # entries: the time of a loop over so few does not count
_FEW = 8  # classes, up to which pairs are faster than sums in every type
_FEW_IN_FLOAT32 = 16  # likewise: there pairs take 0.6 of the time, in bfloat16 1.4


# ---------------------------------------------------------------------------------- statistics


def row_statistics(logits: Logits, *, axis: ClassAxis) -> Row:
    """The statistics, by two sums that XLA:CPU fuses or that share what they read."""
    z, top, narrow, label = logits.z, logits.top, logits.narrow, logits.label
    at = axis.position
    if label is not None and _is_shared(z, at):
        others = lax.optimization_barrier(jnp.sum(other_exponentials(logits, axis=axis), at))
        return Row(top, others + (jnp.exp(take(z, label, at) - top) - 1))
    x = z if narrow is None else narrow
    if known(lambda: _is_summed_in_chunks(z, at), False):
        sums = _sums_of_chunks(x, top, at)
    else:
        sums = _sums(_as_read(x, z.dtype), top, at)
    # Without the barrier XLA:CPU copies the sums into each use that is made of them, and writes the
    # maximum out as often as it has classes: of 200,000 rows of 10, the soft-label loss then takes
    # 3.3 times and the entropy 2.6 times as long (jax 0.10).
    return Row(*lax.optimization_barrier(from_sums(logits, *sums)))


# XLA:CPU's loops for sums read 16 bits, but without the barrier they are handed a copy in 32, which
# other loops share: a logsumexp of 64 rows of 262,144 in bfloat16 would take 3 times as long, the
# divergence of 4096 rows of 1000 twice as long (jax 0.10).
def _as_read(x: Array, dtype: DTypeLike) -> Array:
    """x in a wider type that is made where it is read."""
    return x if x.dtype == dtype else lax.optimization_barrier(x).astype(dtype)


def _sums(z: Array, top: Array, axis: int) -> tuple[Array, Array]:
    """Σ exp(z - m) without the maxima, and their number."""
    n, rows = z.shape[axis], z.size // z.shape[axis]
    exponentials = jnp.exp(z - jnp.expand_dims(top, axis))
    below, ones = _parts(exponentials)
    if known(lambda: n <= _SHORT and (rows < _MANY or rows % 2 == 0), False):
        # XLA:CPU's loop for one sum is made for long rows; two sums at once go another way, but
        # not on several cores if many rows cannot be halved.
        zero = jnp.zeros((), z.dtype)
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])
        below, ties = lax.reduce((below, ones), (zero, zero), add, (axis,))
        return below, ties
    if known(lambda: 1 < rows < _MANY, False) or axis < z.ndim - 1:
        # Where XLA:CPU emits two loops, summing exp and exp - floor(exp) shares their input. The
        # difference is a whole number up to a rounding that matters only beside millions of terms.
        below = jnp.sum(below, axis)
        return below, jnp.round(jnp.sum(exponentials, axis) - below)
    return _sum(below, axis), _sum(ones, axis)


def _is_summed_in_chunks(z: Array, axis: int) -> bool:
    """Whether the sums of a row are made of those of its chunks.

    Along another axis than the last logsumexp then takes 0.57 to 0.81 of the time in float32;
    log_softmax 0.81 of it or 1.4 times, with its VJP 0.65 and 0.75.

    Two sums of many rows are one loop. With jax 0.10 it becomes one array after another as soon as
    the program has more sums than these: of 16,384 rows of 1000 two logsumexps take 0.2 of the time
    in chunks, two losses as well, and one logsumexp 1.2 times as long.
    """
    n, rows = z.shape[axis], z.size // z.shape[axis]
    elsewhere, large = axis < z.ndim - 1, z.nbytes >= _CACHE
    matters = n > _CHUNKED and z.size > _SMALL
    return matters and (elsewhere or large or n > _LONG or rows < _MANY)


# Each chunk has a single sum, but the one with the largest, which is split. If the maximum lies in
# another chunk, the others total at least 1, so that the final - 1 cannot cancel.
def _sums_of_chunks(x: Array, top: Array, axis: int) -> tuple[Array, Array]:
    """Σ exp(x - m) without the maxima, and their number, from the sums of chunks of the row."""
    n, dtype = x.shape[axis], top.dtype
    chunks = _chunk_count(n)
    whole = n - n % chunks
    table = lax.slice_in_dim(x, 0, whole, axis=axis)
    table = table.reshape(*x.shape[:axis], chunks, whole // chunks, *x.shape[axis + 1 :])
    read = _as_read(table, dtype)
    sums = jnp.sum(jnp.exp(read - jnp.expand_dims(top, (axis, axis + 1))), axis + 1)
    # XLA:CPU's argmax takes ten times as long as a maximum and the first place that has it. With
    # the barrier they read the same numbers.
    sums = lax.optimization_barrier(sums)
    place = lax.broadcasted_iota(jnp.int32, sums.shape, axis)
    is_largest = sums == jnp.max(sums, axis, keepdims=True)
    largest = jnp.min(jnp.where(is_largest, place, chunks - 1), axis)
    others = jnp.sum(jnp.where(one_hot(largest, sums.shape, axis), 0, sums), axis)
    index = jnp.expand_dims(largest, (axis, axis + 1))
    near = jnp.take_along_axis(table, index, axis, mode="promise_in_bounds").squeeze(axis)
    below, ties = _sums(near.astype(dtype), top, axis)
    below += others
    if whole < n:
        left_over = lax.slice_in_dim(x, whole, n, axis=axis).astype(dtype)
        more, more_ties = _sums(left_over, top, axis)
        below, ties = below + more, ties + more_ties
    return below, ties


@functools.cache
def _chunk_count(n: int) -> int:
    """Into how many equal chunks a row of n is summed: near √n.

    Then the sums that are looked through are as many as the entries that are read twice. A divisor
    of n leaves no entry over.
    """
    root = math.isqrt(n)
    divisors = (k for k in range(root // 4 + 1, 4 * root) if n % k == 0)
    return min(divisors, key=lambda k: max(k / root, root / k), default=root)


# XLA:CPU fuses both sums of many rows into one loop if it knows where they start. A literal 0 is
# shared with the rest of the program and becomes a parameter of the fusion; -0 is as neutral, and
# hardly ever elsewhere but in other statistics.
def _sum(terms: Array, axis: int) -> Array:
    return lax.reduce(terms, jnp.asarray(-0.0, terms.dtype), lax.add, (axis,))


def _parts(exponentials: Array) -> tuple[Array, Array]:
    """The exponentials below 1, with 0 in place of the others, and 1 for each of these."""
    ones = jnp.floor(exponentials)
    return exponentials - ones, ones


statistics.STATISTICS.lower(row_statistics, "cpu")


# XLA:CPU would fuse a selection into the sum and into the gradient, and take the exponentials
# twice. A scatter materialises them once for both: loss + gradient take 0.91 of the time in
# float32 and 0.90 in bfloat16, 0.72 along other axes. Short rows are faster without, and what
# does not fit the cache is computed again in less time than it is written and read.
def other_exponentials(logits: Logits, *, axis: ClassAxis) -> Array:
    """exp(z - m), with 0 for the class of the label."""
    z, top, label = logits.z, logits.top, logits.label
    if label is None or not _is_shared(z, axis.position):
        return statistics.portable_others(logits, axis=axis)
    places = [lax.broadcasted_iota(label.dtype, label.shape, d) for d in range(label.ndim)]
    places.insert(axis.position, label)
    exponentials = jnp.exp(z - axis.expand(top)).at[tuple(places)]
    return exponentials.set(0, mode="promise_in_bounds", unique_indices=True)


def _is_shared(z: Array, axis: int) -> bool:
    return known(lambda: _SCATTERED < z.shape[axis] <= _LONG and z.nbytes < _CACHE, False)


statistics.OTHERS.lower(other_exponentials, "cpu")


# ----------------------------------------------------------------------- products with Jacobians


def product(p: Probabilities, v: Vector, *, axis: ClassAxis) -> Vector:
    """J v, of few classes by pairs, and of large arrays without a selection."""
    classes = p.classes
    if _is_small(classes) or p.sink is not None:
        return jacobian_product.portable(p, v, axis=axis)
    if _are_few(classes, axis, _FEW_IN_FLOAT32 if classes.dtype.itemsize >= 4 else _FEW):
        wide = classes.astype(v.classes.dtype)
        return Vector(wide * _lead(wide, v.classes, axis.position), None)
    # XLA:CPU does not fuse the selection into sums: 1.1 to 2.7 times the time.
    total = jacobian_product.total
    return jacobian_product.product(p, v, axis, total=total, present=lambda _, v: v)


jacobian_product.PRODUCT.lower(product, "cpu")
jacobian_product.PRODUCT_OF_FREE.lower(product, "cpu")


def log_pullback(p: Probabilities, y: Vector, *, axis: ClassAxis) -> Vector:
    """The cotangent of the logits of log_softmax."""
    if _is_small(p.classes) or p.sink is not None or not _are_few(p.classes, axis, _FEW):
        return jacobian_product.portable_log_pullback(p, y, axis=axis)
    return Vector(_exchange(p.classes, y.classes, axis.position), None)


def log_pushforward(p: Probabilities, v: Vector, *, axis: ClassAxis) -> Vector:
    """The tangent of log_softmax."""
    if not _is_small(p.classes) and p.sink is None and _are_few(p.classes, axis, _FEW):
        return Vector(_lead(p.classes, v.classes, axis.position), None)
    return jacobian_product.portable_log_pushforward(p, v, axis=axis)


jacobian_product.PULLBACK.lower(log_pullback, "cpu")
jacobian_product.PUSHFORWARD.lower(log_pushforward, "cpu")


def _is_small(p: Array) -> bool:
    return known(lambda: p.size <= _SMALL, False)


def _are_few(p: Array, axis: ClassAxis, limit: int) -> bool:
    return known(lambda: p.shape[axis.position] <= limit, False)


# Each class sums over all others for itself: n times the arithmetic of one sum for the row, but a
# single loop over memory, where XLA:CPU's loops for sums are made for long rows. The class itself
# is left out by selection, since XLA may compute an array twice, with other roundings: then
# v_i - v_i is not 0.
def _lead(p: Array, v: Array, axis: int) -> Array:
    """Σ_{j≠i} p_j (v_i - v_j) for every class i."""
    (_, p_j), (v_i, v_j) = _pair(p, axis), _pair(v, axis)
    return _total_over_others(p_j * (v_i - v_j), axis)


def _exchange(p: Array, v: Array, axis: int) -> Array:
    """Σ_{j≠i} (p_j v_i - p_i v_j) for every class i."""
    (p_i, p_j), (v_i, v_j) = _pair(p, axis), _pair(v, axis)
    return _total_over_others(p_j * v_i - p_i * v_j, axis)


def _pair(a: Array, axis: int) -> tuple[Array, Array]:
    """a_i and a_j, to be broadcast to tables [..., j, i, ...]."""
    return jnp.expand_dims(a, axis), jnp.expand_dims(a, axis + 1)


def _total_over_others(table: Array, axis: int) -> Array:
    """The sum over j without i."""
    n = table.shape[axis]
    own = jnp.expand_dims(jnp.eye(n, dtype=bool), range(2, table.ndim - axis))
    table = jnp.where(own, 0, table)
    if n > _FEW:
        # A sum that XLA knows for one would get a loop for long rows.
        return lax.reduce(table, jnp.zeros((), table.dtype), lambda a, b: a - (-b), (axis,))
    left_over = []
    while (n := table.shape[axis]) > 1:
        if n % 2:
            left_over.append(lax.slice_in_dim(table, n - 1, n, axis=axis))
        first, second = (lax.slice_in_dim(table, k, k + n // 2, axis=axis) for k in (0, n // 2))
        table = first + second
    return functools.reduce(jnp.add, left_over, table).squeeze(axis)
