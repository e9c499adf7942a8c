"""Attention of arrays as given: heads by group, whole chunks, what is not finite told apart."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._attention import pullback
from jaxsoft._attention.division import Division
from jaxsoft._attention.dominant import one_pass
from jaxsoft._attention.scores import Constants, Operands
from jaxsoft._core import devices, programs
from jaxsoft._core.programs import Places
from jaxsoft._core.sizes import Shape, Size, known
from jaxsoft._rows.logits import compute_dtype, nan_unless


def _places(ndim: int, **_: Any) -> tuple[Places, Places]:
    return programs.as_given(ndim), programs.of_last(ndim)


@programs.program(static=("division",), places=_places)
def attention(
    query: Array, key: Array, value: Array, *options: Any, division: Division
) -> tuple[Array, Array]:
    """The output and the logsumexp, given the arguments of `prepared`."""
    operands, constants = prepared(query, key, value, *options, division=division)
    found = one_pass(operands, constants, division)
    rows = pullback.rows(operands, constants, found, division)
    empty = found.row.rest < 0  # without a key and without a sink
    out = rows.relative + pullback.dominant_values(operands, constants, found)
    out = out + constants.offset[:, :, :, None].astype(out.dtype)
    out = jnp.where(empty[..., None], 0, out)
    logsumexp = jnp.where(empty, -jnp.inf, found.row.top + rows.log_total)
    return restored(out, query.shape).astype(query.dtype), restored(logsumexp, query.shape[:-1])


def prepared(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    scale: Any,
    query_lengths: Array | None,
    key_lengths: Array | None,
    sink: Array | None,
    softcap: Any,
    *,
    division: Division,
) -> tuple[Operands, Constants]:
    """Splits heads into groups, fills whole chunks, and marks what is not finite.

    A bias and a mask have four axes.
    """
    shape, wide = query.shape, compute_dtype(query.dtype)
    groups = key.shape[-2], shape[-2] // key.shape[-2]
    numbers = (None if x is None else jnp.asarray(x, wide) for x in (scale, softcap, sink))
    lengths = (None if x is None else _as_int32(x) for x in (query_lengths, key_lengths))
    given = devices.aligned(query, key, value, bias, mask, *lengths, *numbers)
    query, key, value, bias, mask, query_lengths, key_lengths, scale, softcap, sink = given
    batch = shape[:-3] or (1,)
    q = query.reshape(*batch, shape[-3], *groups, shape[-1])
    k, v = (x if x.ndim == 4 else x[None] for x in (key, value))
    if known(lambda: division.key_count == 0, False):
        k, v = (_filled(x, 1, 1) for x in (k, v))
    finite_q, finite_k, finite_v = (jnp.all(jnp.isfinite(x), -1) for x in (q, k, v))
    finite = finite_q, finite_k & finite_v
    bad_q, bad_k = (nan_unless(x, jnp.zeros(x.shape, wide)) for x in finite)
    offset = _nearest_to_zero(jnp.where(finite_v[..., None], lax.stop_gradient(v), 0))
    q, bad_q = (_filled(x, 1, division.query_chunk) for x in (q, bad_q))
    k, v, bad_k = (_filled(x, 1, division.key_chunk) for x in (k, v, bad_k))
    bias, mask = (_in_chunks(x, division) for x in (bias, mask))
    sink = None if sink is None else sink.reshape(groups)
    operands = Operands(q, k, v, bias, scale, softcap, sink)
    return operands, Constants(offset, mask, query_lengths, key_lengths, bad_q, bad_k)


def restored(x: Array, shape: Shape) -> Array:
    """The queries that were given, with the heads along one axis."""
    t = shape[1 if len(shape) == x.ndim - 1 else 0]
    return x[:, :t].reshape(shape)


def _in_chunks(x: Array | None, division: Division) -> Array | None:
    """The bias or the mask with whole chunks along the axes that it has."""
    if x is None:
        return None
    for axis, size in ((2, division.query_chunk), (3, division.key_chunk)):
        x = x if x.shape[axis] == 1 else _filled(x, axis, size)
    return x


def _filled(x: Array, axis: int, size: Size) -> Array:
    """An array with zeros at the end of an axis, so that chunks of a size fill it."""
    length = x.shape[axis]
    missing = max(-length % size, size - length) if known(lambda: length != size, False) else 0
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


def _nearest_to_zero(v: Array) -> Array:
    """Of each feature, the number nearest to 0 between the smallest and the largest value.

    Subtracted from all values, it leaves the digits of their differences where they share a large
    mean. No value is farther from it than from 0, so no difference to it is less exact than that.
    """
    low, high = jnp.min(v, 1, keepdims=True), jnp.max(v, 1, keepdims=True)
    return jnp.clip(jnp.zeros_like(low), low, high)


def _as_int32(lengths: Array) -> Array:
    most = min(jnp.iinfo(jnp.int32).max, jnp.iinfo(lengths.dtype).max)
    return jnp.clip(lengths, 0, most).astype(jnp.int32)
