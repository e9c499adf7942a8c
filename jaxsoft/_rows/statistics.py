"""The statistics of a row of logits, m and Z - 1, from which every function is built.

A row is the logits along one axis, in float32 or wider. What belongs to a row has the shape without
that axis: on a CPU arithmetic on arrays with an axis of size 1 runs several times slower.
Statistics are constants, without a derivative: each function states its own.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from jaxsoft._core import devices
from jaxsoft._core.axes import ClassAxis, Rows
from jaxsoft._core.devices import Mesh
from jaxsoft._core.primitives import AlongClasses
from jaxsoft._rows.jacobian_product import Probabilities, flatness
from jaxsoft._rows.logits import Logits, gap, gaps_of_rows, maximum


class Normalizer(NamedTuple):
    """What turns logits into probabilities.

    Attributes:
        top: the maximum m of a row.
        total: Z = Σ exp(z - m), to its rounding; 0 for a row of -inf alone.
    """

    top: Float[Array, "..."]
    total: Float[Array, "..."]

    @property
    def divisor(self) -> Float[Array, "..."]:
        """Z, which holds exp(0) and so is at least 1; 1 for a row of -inf alone."""
        # By maximum rather than by selection: XLA:CPU then fuses all of softmax into one loop.
        return jnp.maximum(self.total, 1)


class Row(NamedTuple):
    """Statistics of rows of logits z.

    Attributes:
        top: the maximum m, or a finite number for a row of -inf alone.
        rest: Z - 1 with Z = Σ exp(z - m): the sum of the exponentials without the one of the
            maximum, which is 1. It keeps its relative accuracy where Z rounds to 1. In a row of
            -inf alone it is -1.
    """

    top: Float[Array, "..."]
    rest: Float[Array, "..."]

    @property
    def normalizer(self) -> Normalizer:
        """m and Z."""
        return Normalizer(self.top, 1 + self.rest)

    @property
    def log_normalizer(self) -> Float[Array, "..."]:
        """log Z, to its last bits where Z rounds to 1; 0 for a row of -inf alone."""
        return jnp.log1p(jnp.maximum(self.rest, 0))


def statistics(logits: Logits, axis: ClassAxis, label: Int[Array, "..."] | None = None) -> Row:
    """The statistics of each row of logits, which has a label or none: constants."""
    given = _constants(logits, label)
    if axis.mesh is None:
        return STATISTICS(given, axis=axis)
    here, sink = axis._replace(mesh=None), given.sink
    # The label may be on another device.
    part = STATISTICS(given._replace(sink=None, label=None), axis=here)
    row = of_devices(part, axis.mesh)
    return row if sink is None else united(row, Row(sink, jnp.zeros_like(sink)))


def normalizer(logits: Logits, axis: ClassAxis) -> Normalizer:
    """m and Z of each row, where the accuracy of Z - 1 does not matter: constants."""
    if axis.mesh:
        return statistics(logits, axis).normalizer
    return NORMALIZER(_constants(logits), axis=axis)


def _constants(logits: Logits, label: Int[Array, "..."] | None = None) -> Logits:
    given: Logits = lax.stop_gradient(logits._replace(shift=None, label=label))
    return given


# An exponential is 1 at a maximum, and where it rounds to 1, and less elsewhere: its floor tells
# which. All ones but a single one count; in a row of -inf alone there is none, and Z - 1 is -1.
# Z minus 1 would lose the digits of a Z near 1.
def portable(logits: Logits, *, axis: Rows) -> Row:
    """The statistics as every platform can compute them."""
    exponentials = jnp.exp(logits.z - axis.expand(logits.top))
    ones = jnp.floor(exponentials)
    return from_sums(logits, axis.sum(exponentials - ones), axis.sum(ones))


def from_sums(logits: Logits, below: Array, ties: Array) -> Row:
    """The statistics from Σ exp(z - m) without the maxima, and their number, and the sink."""
    if logits.sink is not None:
        of_sink = jnp.exp(logits.sink - logits.top)
        at_top = jnp.floor(of_sink)
        below, ties = below + (of_sink - at_top), ties + at_top
    return Row(logits.top, below + (ties - 1))


def plain_sum(logits: Logits, *, axis: Rows) -> Normalizer:
    """m and Z by a single sum."""
    total = axis.sum(jnp.exp(logits.z - axis.expand(logits.top)))
    if logits.sink is not None:
        total += jnp.exp(logits.sink - logits.top)
    return Normalizer(logits.top, total)


STATISTICS = AlongClasses("row_statistics", portable, lambda z: Row(z.top, z.top))
NORMALIZER = AlongClasses("row_normalizer", plain_sum, lambda z: Normalizer(z.top, z.top))


# Parts of a row with the maxima m_d ≤ M and the rests r_d have together the maximum M and the sum
#
#     Z = Σ_d (1 + r_d) exp(m_d - M),  of which those with m_d = M have 1 + r_d each,
#
# so that Z - 1 is a sum of rests and exponentials, and the number of the parts that have the
# maximum, less one. A single entry is a part with r = 0, and no entry at all one with r = -1.
def _moved(part: Row, top: Array, temperature: Array | None) -> tuple[Array, Array]:
    """What a part adds to the sum given the maximum of the row: without 1 and 1, or all and 0."""
    highest = part.top == top
    distance = jnp.where(highest, 0, gap(part.top, top, temperature))  # never of two infinities
    rest = jnp.where(highest, part.rest, (1 + part.rest) * jnp.exp(distance))
    return rest, highest.astype(rest.dtype)


def of_no_entry(zeros: Float[Array, "..."]) -> Row:
    """The statistics of rows without an entry, given zeros of their shape."""
    return Row(zeros + jnp.finfo(zeros.dtype).min, zeros - 1)


def of_scaled(u: Float[Array, "t n"], temperature: Float[Array, " t"] | None) -> Row:
    """The statistics of (u - m) / T, with the maximum m of u."""
    top = maximum(lax.stop_gradient(u), 1)
    if temperature is None:
        return statistics(Logits(u, top), ClassAxis(1))
    z = gaps_of_rows(u, top, temperature)
    return Row(top, statistics(Logits(z, jnp.zeros_like(top)), ClassAxis(1)).rest)


def united(a: Row, b: Row, temperature: Array | None = None) -> Row:
    """The statistics of two parts of a row together."""
    top = jnp.maximum(a.top, b.top)
    parts = _moved(a, top, temperature), _moved(b, top, temperature)
    (rest, is_top), (other_rest, other_is_top) = parts
    return Row(top, (rest + other_rest) + (is_top + other_is_top - 1))


def gaps_at(
    gaps: Float[Array, "..."], part: Row, top: Float[Array, "..."], temperature: Array | None = None
) -> Float[Array, "..."]:
    """Σ exp(-g) g of a part with g = (m_d - z) / T, given the maximum of the row for m_d."""
    step = -gap(part.top, top, temperature)
    factor = jnp.exp(-step)
    return jnp.where(factor == 0, 0, factor * (gaps + (1 + part.rest) * step))


def of_devices(part: Row, mesh: Mesh | None, temperature: Array | None = None) -> Row:
    """The statistics of whole rows from those of their parts on each device."""
    top = devices.largest(part.top, mesh)
    rest, count = devices.total(_moved(part, top, temperature), mesh)
    return Row(top, rest + (count - 1))


def probabilities(
    z: Float[Array, "..."],
    sink: Float[Array, "..."] | None,
    normalizer: Normalizer,
    axis: Rows,
    dtype: DTypeLike,
) -> Probabilities:
    """exp(z - m) / Z; 0 in a row of -inf alone. exp(z - log Z) would round the offset in."""
    top, divisor = normalizer.top, normalizer.divisor
    p = (jnp.exp(z - axis.expand(top)) / axis.expand(divisor)).astype(dtype)
    p_sink = None if sink is None else (jnp.exp(sink - top) / divisor).astype(dtype)
    # The largest probability, 1 / Z, is rounded just as p is.
    return Probabilities(p, p_sink, flatness((1 / divisor).astype(dtype)))


def other_exponentials(
    z: Float[Array, "..."], row: Row, label: Int[Array, "..."], axis: ClassAxis
) -> Float[Array, "..."]:
    """exp(z - m), with 0 for the class of the label: constants."""
    logits = _constants(Logits(z, row.top), label)
    if axis.mesh:  # the label may be on another device
        return portable_others(logits, axis=axis)
    return OTHERS(logits, axis=axis)


def portable_others(logits: Logits, *, axis: ClassAxis) -> Array:
    """The same as every platform can compute it."""
    z, label = logits.z, logits.label
    assert label is not None
    return jnp.where(axis.one_hot(label, z), 0, jnp.exp(z - axis.expand(logits.top)))


OTHERS = AlongClasses("other_exponentials", portable_others, lambda logits: logits.z)
