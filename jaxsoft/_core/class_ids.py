"""Validation of class ids and target probabilities: their error messages, and their types."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsoft._core import validation
from jaxsoft._core.sizes import Shape, known


def labels(
    function: str,
    value: Any,
    shape: Shape,
    reduced: tuple[int, ...],
    ignore_index: Any,
    *,
    swapped: bool,
) -> tuple[Array, int | None]:
    """Returns class ids of the shape without the axis and the one to ignore.

    Or target probabilities, broadcast to the shape, and None.

    Args:
        function: its name, for messages.
        value: the labels.
        shape: that of the logits.
        reduced: the axes of the classes.
        ignore_index: an integer or None.
        swapped: whether the logits could be class ids.
    """
    rows = tuple(size for a, size in enumerate(shape) if a not in reduced)
    axis = reduced[0] if len(reduced) == 1 else reduced
    given, index = _signed(function, "labels", value, ignore_index)
    hint = " (are logits and labels swapped?)" if swapped and given.ndim > len(shape) else ""
    if validation.is_discrete(given) and given.shape == shape != rows:
        dtype = getattr(value, "dtype", given.dtype)
        raise TypeError(
            f"{function}: labels of the shape of the logits are target probabilities, which must "
            f"be floating, got dtype {dtype} (use labels.astype(float))"
        )
    if validation.is_discrete(given):
        return _of_shape(
            function, "labels", given, rows, f"logits {shape} without axis {axis}"
        ), index
    if given.shape == rows and not validation.broadcasts(rows, shape):
        raise _not_ids(function, "labels", given)
    if ignore_index is not None:
        raise ValueError(f"{function}: ignore_index must be None with target probabilities")
    if not validation.broadcasts(given.shape, shape):
        of = f"target probabilities, as the logits{hint}"
        validation.same_shape(function, "labels", given, shape, of)
    return jnp.broadcast_to(given, shape), None


def ids(
    function: str,
    argument: str,
    value: Any,
    shape: Shape,
    of: str,
    ignore_index: Any = None,
) -> tuple[Array, int | None]:
    """Returns class ids of the given shape, and the one to ignore."""
    given, index = _signed(function, argument, value, ignore_index)
    return _of_shape(function, argument, given, shape, of), index


def ids_or_several(
    function: str, argument: str, value: Any, shape: Shape, of: str, ignore_index: Any
) -> tuple[Array, int | None]:
    """As `ids`, of the given shape or with one axis more."""
    given, index = _signed(function, argument, value, ignore_index)
    several = given.ndim == len(shape) + 1
    return _of_shape(
        function, argument, given, (*shape, *given.shape[-1:]) if several else shape, of
    ), index


def one_class(function: str, argument: str, value: Any, n: int, shape: Shape) -> Array:
    """Returns class ids broadcast to `shape`; those given as one number must lie in [0, n)."""
    given, _ = _signed(function, argument, value, None)
    if not validation.is_kind(given.dtype, jnp.integer):
        raise TypeError(f"{function}: {argument} must be an integer, got dtype {given.dtype}")
    in_range(function, argument, value, n)
    return validation.broadcast(function, argument, given, shape, "the shape without the axis")


def in_range(function: str, argument: str, value: Any, n: int, ignored: Any = None) -> None:
    """Raises `ValueError` for a class that is given as a number outside [0, n)."""
    is_number = isinstance(value, (int, np.integer)) or (
        isinstance(value, np.ndarray) and not value.ndim
    )
    if is_number and value != ignored and not known(lambda: 0 <= value < n, True):
        raise ValueError(f"{function}: {argument} must lie in [0, {n}), got {value}")


def segments(
    function: str, value: Any, count: Any, n: int, of: str = "one for each class"
) -> tuple[Array, int]:
    """Returns the segment ids of n entries, and the number of segments.

    Without a number it is one more than the largest id, which must be known.
    """
    given, _ = ids(function, "segment_ids", value, (n,), of)
    if count is None:
        if isinstance(given, jax.core.Tracer):
            raise ValueError(
                f"{function}: num_segments must be given where segment_ids are traced, as under "
                "jax.jit (num_segments=segment_ids.max() + 1, computed before)"
            )
        return given, int(jnp.max(given, initial=-1)) + 1
    number = validation.integer(function, "num_segments", count)
    if number < 0:
        raise ValueError(f"{function}: num_segments must be 0 or more, got {number}")
    return given, number


def _of_shape(function: str, argument: str, given: Array, shape: Shape, of: str) -> Array:
    if not validation.is_kind(given.dtype, jnp.integer):
        raise _not_ids(function, argument, given)
    validation.same_shape(function, argument, given, shape, of)
    return given


def _not_ids(function: str, argument: str, given: Array) -> TypeError:
    return TypeError(
        f"{function}: {argument} must be integers where they are class ids, got dtype "
        f"{given.dtype} (use {argument}.astype(int))"
    )


def _signed(
    function: str, argument: str, value: Any, ignore_index: Any
) -> tuple[Array, int | None]:
    """Class ids as signed integers of 32 or 64 bits, and the id to ignore as such a number."""
    index = None
    if ignore_index is not None:
        index = validation.integer(function, "ignore_index", ignore_index)
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    # JAX itself takes known integers of 64 bits modulo 2³² where it has 32 bits.
    is_known = isinstance(value, (int, np.integer, np.ndarray)) and not isinstance(value, bool)
    if is_known and np.asarray(value).dtype.kind in "iuO":
        given, index = _in_type(np.asarray(value), index, dtype, np)
        return jnp.asarray(given), index
    given = validation.array(function, argument, value)
    if not validation.is_kind(given.dtype, jnp.integer):
        return given, None
    return _in_type(given, index, dtype, jnp)


def _in_type(given: Any, index: int | None, dtype: Any, xp: ModuleType) -> tuple[Any, int | None]:
    """Class ids and the one to ignore in a type that may not hold them all.

    Then the largest number of the type stands for every class that does not exist, and the smallest
    one for what is ignored.
    """
    limits = np.iinfo(dtype)
    if given.dtype.kind != "O" and np.can_cast(given.dtype, dtype):
        if given.dtype.itemsize < 4:
            given = given.astype(np.int32)
        elif given.dtype.kind == "u":
            given = given.astype(dtype)
        held = np.iinfo(given.dtype)
        return given, index if index is not None and held.min <= index <= held.max else None
    exists = (given >= 0) & (given < limits.max)
    signed = xp.where(exists, xp.where(exists, given, 0).astype(dtype), limits.max).astype(dtype)
    if given.dtype.kind != "O" and index is not None:
        held = np.iinfo(given.dtype)
        index = index if held.min <= index <= held.max else None
    if index is None:
        return signed, None
    return xp.where(given == index, limits.min, signed).astype(dtype), int(limits.min)
