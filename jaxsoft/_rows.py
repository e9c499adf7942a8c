"""Statistics of one row of logits. The only module that takes an exponential or a logarithm.

A row is the logits along one axis, in float32 or wider. What belongs to a row has the shape without
that axis: arithmetic on arrays with an axis of size 1 runs several times slower on the CPU. Apart
from `prepare` and what it calls, everything here is plain arithmetic without a rule of
differentiation: callers hand in `jax.lax.stop_gradient` of their logits and state the derivative.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, Int, Shaped

from jaxsoft._autodiff import jvp_from_vjp

_SHORT = 16  # the length of a short row
_SERIES_TERMS = 14  # of exp(d) - 1 - d for |d| < 1/2 in float64


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for the 16-bit types and below, else the type itself."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


# ----------------------------------------------------------------------------------- one axis
# Every function works along one axis, where it lies, for moving an axis costs a copy. Several axes
# are moved behind the others and merged into one.


@overload
def merge_axes(x: Array, axes: tuple[int, ...]) -> Array: ...
@overload
def merge_axes(x: None, axes: tuple[int, ...]) -> None: ...
def merge_axes(x: Array | None, axes: tuple[int, ...]) -> Array | None:
    """Returns `x` with several axes as one, the last; with one axis, or None, as it is."""
    if x is None or len(axes) == 1:
        return x
    kept = [a for a in range(x.ndim) if a not in axes]
    merged = math.prod(x.shape[a] for a in axes)
    return x.transpose(*kept, *axes).reshape(*(x.shape[a] for a in kept), merged)


def merged_axis(ndim: int, axes: tuple[int, ...]) -> int:
    """The number of the axis that `merge_axes` leaves."""
    return axes[0] if len(axes) == 1 else ndim - len(axes)


def unmerge_axes(x: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Undoes `merge_axes` for an array that had `shape`."""
    if len(axes) == 1:
        return x
    order = [a for a in range(len(shape)) if a not in axes] + list(axes)
    inverse = [order.index(a) for a in range(len(shape))]
    return x.reshape([shape[a] for a in order]).transpose(inverse)


# --------------------------------------------------------------------------------- preparation


class Logits(NamedTuple):
    """Rows of logits, ready for an exponential.

    Attributes:
        z: the logits, in float32 or wider; -inf where they are masked.
        top: the maximum m of each row and its sink, or any finite number for a row of -inf alone:
            a constant, without the axis.
        sink: the extra logit of each row, moved by the same shift as z, without the axis.
        shift: what was subtracted from the scaled logits, without the axis; None for nothing.
    """

    z: Float[Array, "..."]
    top: Float[Array, "..."]
    sink: Float[Array, "..."] | None
    shift: Float[Array, "..."] | None


def prepare(
    x: Float[Array, "..."],
    axis: int,
    where: Bool[Array, "..."] | None = None,
    temperature: Float[Array, "..."] | None = None,
    sink: Float[Array, "..."] | None = None,
) -> Logits:
    """Widens, masks and scales logits: differentiable in x, the temperature and the sink.

    With a temperature T the logits are centred before they are divided, z = (x - m) / T, so that
    no overflow and no rounding of x / T comes between a row and its maximum. The derivative takes
    m for a constant: what is shift-invariant does not see it, and the rest adds the shift m / T.

    Args:
        x: logits.
        axis: the axis of the classes.
        where: mask of the shape of x.
        temperature: with the axis of size 1.
        sink: with the axis of size 1.
    """
    dtype = compute_dtype(x.dtype)
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    z = x.astype(dtype)
    # Of the 16-bit numbers: on the CPU XLA then makes one kernel of softmax.
    top = maximum(lax.stop_gradient(x), axis).astype(dtype)
    sink = None if sink is None else sink.astype(dtype).squeeze(axis)
    shift = None
    if temperature is not None:
        temperature = jnp.where(temperature > 0, temperature, jnp.nan).astype(dtype)
        shift = top / temperature.squeeze(axis)
        centre = jnp.expand_dims(top, axis)
        absent = z == -jnp.inf
        z = jnp.where(absent, -jnp.inf, _scaled(jnp.where(absent, centre, z), centre, temperature))
        sink = None if sink is None else sink - shift
        top = jnp.zeros_like(top)
    if sink is not None:
        top = jnp.maximum(top, lax.stop_gradient(sink))
    return Logits(z, top, sink, shift)


# z = (x - m) / T has dz = (dx - z dT) / T. Division before multiplication: where z overflows, a
# zero cotangent stays zero. An eighth of two numbers of any size has a finite difference, and an
# eighth of any temperature a reciprocal that does not underflow.
@jax.custom_vjp
def _scaled_rule(x: Array, top: Array, temperature: Array) -> Array:
    z = (x / 8 - top / 8) / (temperature / 8)
    return jnp.maximum(z, jnp.finfo(z.dtype).min)


_scaled = jvp_from_vjp(_scaled_rule)


def _scaled_fwd(x: Array, top: Array, temperature: Array) -> tuple[Array, tuple[Array, Array]]:
    z = _scaled(x, top, temperature)
    return z, (z, temperature)


def _scaled_bwd(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, Array]:
    z, temperature = residuals
    x_bar = cotangent / temperature
    axes = [a for a in range(z.ndim) if temperature.shape[a] == 1]
    return x_bar, None, -jnp.sum(x_bar * z, axes, keepdims=True)


_scaled_rule.defvjp(_scaled_fwd, _scaled_bwd)


# ---------------------------------------------------------------------------------- statistics


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


def statistics(logits: Logits, axis: int, index: Int[Array, "..."] | None = None) -> Row:
    """Computes the statistics of each row of logits: constants, without a derivative.

    Args:
        logits: as `prepare` returns them.
        axis: the axis of a row.
        index: the entry that is kept out of the sum. Default: the maximum. With another entry
            `rest` is exact to the rounding of Z.
    """
    z, top, sink = lax.stop_gradient((logits.z, logits.top, logits.sink))
    if index is None:
        index = jnp.argmax(z, axis)
    # Without the barrier XLA copies the sum into each use that the functions of the row make of it.
    rest, apart = lax.optimization_barrier(_divided_sum(z, top, index, axis))
    if sink is not None:
        # The larger of the two takes the place of the entry kept out.
        of_sink = jnp.exp(sink - top)
        rest, apart = rest + jnp.minimum(apart, of_sink), jnp.maximum(apart, of_sink)
    # Of that entry exp(z_i - m) - 1 is left: 0 for the maximum, -1 in a row of -inf alone. For any
    # other its rounding is that of Z.
    return Row(top, rest + (apart - 1))


def keep_inputs(fun: Callable[[], Any]) -> Any:
    """Calls `fun` so that reverse mode keeps what it closes over, and nothing that it computes.

    What `prepare` makes of the logits is an array of their size: it is made again instead.
    """
    return jax.checkpoint(fun, prevent_cse=False)()


def maximum(z: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The maximum of each row; the lowest finite number for a row of -inf alone."""
    # The reduction starts from the lowest finite number rather than from -inf, for a maximum taken
    # of the result would stand between two kernels of XLA on the CPU.
    return lax.reduce(z, jnp.asarray(jnp.finfo(z.dtype).min, z.dtype), lax.max, (axis,))


def normalizer(logits: Logits, axis: int) -> Float[Array, "..."]:
    """Z = Σ exp(z - m), for where the accuracy of Z - 1 does not matter: a constant."""
    z, top, sink = lax.stop_gradient((logits.z, logits.top, logits.sink))
    total = jnp.sum(jnp.exp(z - jnp.expand_dims(top, axis)), axis)
    return total if sink is None else total + jnp.exp(sink - top)


def probabilities(
    z: Float[Array, "..."], top: Float[Array, "..."], total: Float[Array, "..."], axis: int
) -> Float[Array, "..."]:
    """exp(z - m) / Z; 0 in a row of -inf alone. exp(z - log Z) would round the offset in."""
    divisor = jnp.expand_dims(at_least_one(total), axis)
    return jnp.exp(z - jnp.expand_dims(top, axis)) / divisor


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
    z: Float[Array, "..."], b: Float[Array, "..."], top: Float[Array, "..."], axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """log|S| and the sign of S = Σ b_j exp(z_j - m), m the maximum where b is not 0."""
    counts = b != 0
    z, top = jnp.where(counts, z, -jnp.inf), jnp.expand_dims(top, axis)
    gap = jnp.where(z == top, 0, z - top)  # 0 also between +inf and +inf
    terms = jnp.where(counts, b * jnp.exp(gap), 0)
    index = jnp.argmax(z, axis)
    apart = take(terms, index, axis)
    others = jnp.sum(jnp.where(one_hot(index, z.shape, axis), 0, terms), axis)
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
    axis: int,
) -> Float[Array, "..."]:
    """exp(z - m) / S from log|S| and the sign of S; 0 where S is 0."""
    finite = jnp.where(logarithm == -jnp.inf, 0, logarithm)
    top, finite, sign = (jnp.expand_dims(a, axis) for a in (top, finite, sign))
    return sign * jnp.exp((z - top) - finite)


def take(z: Float[Array, "..."], index: Int[Array, "..."], axis: int) -> Float[Array, "..."]:
    """One entry of each row."""
    index = jnp.expand_dims(index, axis)
    return jnp.take_along_axis(z, index, axis, mode="promise_in_bounds").squeeze(axis)


def one_hot(index: Int[Array, "..."], shape: tuple[int, ...], axis: int) -> Bool[Array, "..."]:
    """Where the position along the axis is the index."""
    return lax.broadcasted_iota(index.dtype, shape, axis) == jnp.expand_dims(index, axis)


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


def cap(x: Float[Array, "..."], softcap: Shaped[ArrayLike, ""]) -> Float[Array, "..."]:
    """c tanh(x / c), in the compute type; an infinite logit stays, be it a mask or an error."""
    x = x.astype(compute_dtype(x.dtype))
    c = jnp.asarray(softcap, x.dtype)
    c = jnp.where(c > 0, c, jnp.nan)
    infinite = jnp.isinf(x)
    return jnp.where(infinite, x, c * jnp.tanh(jnp.where(infinite, 0, x) / c))


def _chunked(z: Array, axis: int, chunks: int) -> Array:
    return z.reshape(*z.shape[:axis], chunks, z.shape[axis] // chunks, *z.shape[axis + 1 :])


@functools.cache
def _chunk_count(n: int) -> int:
    """Into how many equal chunks a row of n is summed: near 128 if n is large and divisible."""
    divisors = [k for k in range(8, 1025) if n % k == 0] if n > 4096 else []
    return min(divisors, key=lambda k: max(k / 128, 128 / k), default=1)
