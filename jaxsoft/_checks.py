"""Validation at the public boundary: every error message of the array functions."""

import functools
import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoft import _mesh
from jaxsoft._mesh import Mesh

Axis = int | Sequence[int] | None
AxisName = Hashable | tuple[Hashable, ...] | None


def array(function: str, argument: str, value: Any) -> Array:
    """Returns `value` as a real array, or raises `TypeError`."""
    if not isinstance(value, jax.Array):
        if not (
            isinstance(value, (np.ndarray, np.generic, bool, int, float, complex))
            or hasattr(value, "__jax_array__")
        ):
            raise TypeError(
                f"{function}: {argument} must be an array or a number, got {_described(value)}"
            )
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in "biufcV":
            raise TypeError(f"{function}: {argument} must be numeric, got dtype {value.dtype}")
        value = jnp.asarray(value)
    if not (_is_kind(value.dtype, jnp.floating) or is_discrete(value)):
        raise TypeError(f"{function}: {argument} must be real, got dtype {value.dtype}")
    return value


def floating(function: str, argument: str, value: Any) -> Array:
    """Returns `value` as a floating array; integers and booleans become the default float."""
    value = array(function, argument, value)
    return value.astype(float) if is_discrete(value) else value


def is_discrete(value: Array) -> bool:
    """Whether the array holds integers or booleans."""
    return _is_kind(value.dtype, jnp.integer) or _is_kind(value.dtype, jnp.bool_)


# JAX's own test is slow beside a call that is compiled already.
@functools.cache
def _is_kind(dtype: Any, kind: Any) -> bool:
    return jnp.issubdtype(dtype, kind)


def axes(function: str, axis: Any, ndim: int) -> tuple[int, ...]:
    """Returns the axes as non-negative numbers, in the order given."""
    if axis is None:
        return tuple(range(ndim))
    if type(axis) is int and -ndim <= axis < ndim:  # the usual case, at once
        return (axis % ndim,)
    given: tuple[int, ...]
    try:
        given = (operator.index(axis),)
    except TypeError:
        try:
            given = tuple(operator.index(a) for a in axis)
        except TypeError:
            raise TypeError(
                f"{function}: axis must be an integer, a tuple of integers or None, "
                f"got {_described(axis)}"
            ) from None
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"{function}: axis must lie in [{-ndim}, {ndim}) for an array of {ndim} "
                f"dimensions, got {a}"
            )
    positive = tuple(a % ndim for a in given)
    if len(set(positive)) != len(positive):
        raise ValueError(f"{function}: axis must name each axis once, got {given}")
    return positive


def mesh(function: str, axis_name: Any, **alike: Any) -> Mesh | None:
    """Returns the axes of a mesh; on the devices along these, what is `alike` must be so."""
    if axis_name is None:
        return None
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    try:
        size = lax.psum(1, names)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            f"{function}: axis_name must name mesh axes of a jax.shard_map around the call (or be "
            f"the axis_name of a jax.vmap), got {axis_name!r}"
        ) from None
    for argument, value in alike.items():
        along = () if value is None else _mesh.differing(jnp.asarray(value)) & set(names)
        if along:
            raise ValueError(
                f"{function}: {argument} must be the same on all devices that share the classes, "
                f"got an array that differs along {', '.join(sorted(map(str, along)))}"
            )
    return Mesh(names, size)


def undivided(function: str, axis_name: AxisName) -> None:
    """Raises `ValueError` if the classes lie on several devices."""
    if axis_name is not None:
        raise ValueError(
            f"{function}: needs all classes on one device, got axis_name {axis_name!r}; "
            "jax.lax.all_gather brings the weights together"
        )


def mask(function: str, where: Any, shape: tuple[int, ...]) -> Array | None:
    """Returns the boolean mask broadcast to `shape`."""
    if where is None:
        return None
    return boolean(function, "where", where, shape, "the shape of the logits")


def boolean(function: str, argument: str, value: Any, shape: tuple[int, ...], wanted: str) -> Array:
    """Returns a boolean array broadcast to `shape`."""
    value = array(function, argument, value)
    if value.dtype != jnp.bool_:
        raise TypeError(f"{function}: {argument} must be boolean, got dtype {value.dtype}")
    return broadcast(function, argument, value, shape, wanted)


def rows(
    function: str,
    x: Any,
    axis: Any,
    where: Any,
    temperature_: Any,
    sink: Any,
    axis_name: Any,
) -> tuple[tuple[Array, Array | None, Array | None, Array | None], dict[str, Any]]:
    """Returns the arguments of softmax as arrays, and its axes and mesh by name."""
    x = floating(function, "x", x)
    numbers = axes(function, axis, x.ndim)
    where = mask(function, where, x.shape)
    scale = temperature(function, temperature_, x.shape, numbers)
    sink = per_row(function, "sink", sink, x.shape, numbers)
    devices = mesh(function, axis_name, temperature=scale, sink=sink)
    return (x, where, scale, sink), {"axes": numbers, "mesh": devices}


def per_row(
    function: str, argument: str, value: Any, shape: tuple[int, ...], reduced: tuple[int, ...]
) -> Array | None:
    """Returns an option that has one value for each row, with the reduced axes of size 1."""
    if value is None:
        return None
    value = floating(function, argument, value)
    row_shape = tuple(1 if a in reduced else size for a, size in enumerate(shape))
    return broadcast(
        function, argument, value, row_shape, f"{shape} with the reduced axes {reduced} of size 1"
    )


def temperature(
    function: str, value: Any, shape: tuple[int, ...], reduced: tuple[int, ...]
) -> Array | None:
    """As `per_row`; None stands for a temperature of one, for which nothing is divided."""
    if isinstance(value, (bool, int, float, np.generic)):
        number = float(value)
        if not number > 0:
            raise ValueError(f"{function}: temperature must be positive, got {value}")
        if number == 1:
            return None
    if value is None:
        raise TypeError(f"{function}: temperature must be an array or a number, got NoneType")
    return per_row(function, "temperature", value, shape, reduced)


def broadcast(
    function: str, argument: str, value: Array, shape: tuple[int, ...], wanted: str
) -> Array:
    """Returns `value` broadcast to `shape`, or raises `ValueError`."""
    sizes = (1,) * (len(shape) - value.ndim) + value.shape
    if len(sizes) != len(shape) or any(a not in (1, b) for a, b in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"{function}: {argument} must broadcast to {shape} ({wanted}), got {value.shape}"
        )
    return value if value.shape == shape else jnp.broadcast_to(value, shape)


def same_shape(function: str, argument: str, value: Array, shape: tuple[int, ...], of: str) -> None:
    """Raises `ValueError` unless `value` has the given shape."""
    if value.shape != shape:
        raise ValueError(
            f"{function}: {argument} must have shape {shape} ({of}), got {value.shape}"
        )


def number(
    function: str,
    argument: str,
    value: Any,
    low: int | float,
    high: int | float,
    *,
    open_low: bool = False,
) -> ArrayLike:
    """Returns a number in the given range; an array, whose value may be traced, passes."""
    if isinstance(value, (np.ndarray, jax.Array)):
        value = floating(function, argument, value)
        if value.ndim:
            raise ValueError(f"{function}: {argument} must be a scalar, got shape {value.shape}")
        return value
    if not isinstance(value, (bool, int, float, np.generic)):
        raise TypeError(f"{function}: {argument} must be a number, got {_described(value)}")
    number = float(value)
    if not (low < number if open_low else low <= number) or not number <= high:
        span = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{function}: {argument} must lie in {span}, got {value}")
    return number


def non_negative(
    function: str, argument: str, value: Any, shape: tuple[int, ...], wanted: str
) -> Array:
    """Returns an array broadcast to `shape`; one given as a number must be 0 or more."""
    array = floating(function, argument, value)
    if isinstance(value, (bool, int, float, np.generic)) and not float(value) >= 0:
        raise ValueError(f"{function}: {argument} must be 0 or more, got {value}")
    return broadcast(function, argument, array, shape, wanted)


def segments(function: str, ids: Any, count: Any, n: int) -> tuple[Array, int]:
    """Returns one segment id for each class, and the number of segments."""
    ids = class_ids(function, "segment_ids", ids, (n,), "one for each class")
    number = integer(function, "num_segments", count)
    if number < 0:
        raise ValueError(f"{function}: num_segments must be 0 or more, got {number}")
    return ids, number


def classes(function: str, argument: str, value: Any, n: int, shape: tuple[int, ...]) -> Array:
    """Returns class ids broadcast to `shape`; those given as one number must lie in [0, n)."""
    ids = array(function, argument, value)
    if not _is_kind(ids.dtype, jnp.integer):
        raise TypeError(f"{function}: {argument} must be an integer, got dtype {ids.dtype}")
    if isinstance(value, (int, np.integer)) and not 0 <= value < n:
        raise ValueError(f"{function}: {argument} must lie in [0, {n}), got {value}")
    return broadcast(function, argument, wide_integer(ids), shape, "the shape without the axis")


def wide_integer(ids: Array) -> Array:
    """Returns integers in a type that holds the number of classes, and no id wraps into range."""
    return ids if ids.dtype.itemsize >= 4 and ids.dtype != jnp.uint32 else ids.astype(jnp.int32)


def labels(function: str, value: Any, shape: tuple[int, ...], reduced: tuple[int, ...]) -> Array:
    """Returns class ids of the shape without the axis, or target probabilities of the shape."""
    value = array(function, "labels", value)
    if value.dtype == jnp.bool_:
        raise TypeError(f"{function}: labels must be integers or floating, got dtype bool")
    if not is_discrete(value):
        same_shape(function, "labels", value, shape, "target probabilities, as the logits")
        return value
    rows = tuple(size for a, size in enumerate(shape) if a not in reduced)
    axis = reduced[0] if len(reduced) == 1 else reduced
    same_shape(function, "labels", value, rows, f"logits {shape} without axis {axis}")
    return wide_integer(value)


def class_ids(function: str, argument: str, value: Any, shape: tuple[int, ...], of: str) -> Array:
    """Returns class ids of the given shape."""
    ids = array(function, argument, value)
    if not _is_kind(ids.dtype, jnp.integer):
        raise TypeError(f"{function}: {argument} must be integers, got dtype {ids.dtype}")
    same_shape(function, argument, ids, shape, of)
    return wide_integer(ids)


def per_class(function: str, argument: str, value: Any, n: int, wanted: str) -> Array | None:
    """Returns an option that has one value for each class, or None."""
    if value is None:
        return None
    value = floating(function, argument, value)
    same_shape(function, argument, value, (n,), wanted)
    return value


def matrix(function: str, argument: str, value: Array, x: Array) -> None:
    """Raises `ValueError` unless `value` is a matrix that x, of shape [..., d], multiplies."""
    if x.ndim < 1:
        raise ValueError(f"{function}: x must have an axis of features, got shape {x.shape}")
    if value.ndim != 2 or value.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{function}: {argument} must have shape ({x.shape[-1]}, n) (x {x.shape} @ w), "
            f"got {value.shape}"
        )


def positive_or_none(function: str, argument: str, value: Any) -> int | None:
    """Returns a positive integer, or None."""
    if value is None:
        return None
    number = integer(function, argument, value, "an integer or None")
    if number < 1:
        raise ValueError(f"{function}: {argument} must be 1 or more, got {number}")
    return number


def integer(function: str, argument: str, value: Any, wanted: str = "an integer") -> int:
    """Returns a Python integer, or raises `TypeError`."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{function}: {argument} must be {wanted}, got {_described(value)}"
        ) from None


def ignore_index(function: str, value: Any, labels: Array) -> int:
    """Returns the label to ignore as an integer."""
    index = integer(function, "ignore_index", value)
    if not is_discrete(labels):
        raise ValueError(f"{function}: ignore_index must be None with target probabilities")
    return index


def softcap(function: str, value: Any) -> ArrayLike | None:
    """Returns a positive number, or None."""
    return None if value is None else number(function, "softcap", value, 0, math.inf, open_low=True)


def sizes(function: str, argument: str, value: Any) -> tuple[int, ...]:
    """Returns a shape as a tuple of integers."""
    try:
        given = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(
            f"{function}: {argument} must be a sequence of integers, got {_described(value)}"
        ) from None
    if any(size < 0 for size in given):
        raise ValueError(f"{function}: {argument} must hold numbers of 0 or more, got {given}")
    return given


def number_or_none(
    function: str, argument: str, value: Any, low: int | float, high: int | float
) -> ArrayLike | None:
    """As `number`; None stands for 0, with which nothing is computed."""
    value = number(function, argument, value, low, high)
    return None if isinstance(value, float) and value == 0 else value


def _described(value: Any) -> str:
    return (
        f"{type(value).__name__} {value!r:.40}" if isinstance(value, str) else type(value).__name__
    )


def promoted(function: str, **values: Any) -> list[Any]:
    """Returns arrays, real or complex, in the dtype that they have together; None as it is.

    As in JAX integers and booleans take the dtype of the others, or the default float.
    """
    (first, value), *options = values.items()
    arrays: list[Any] = [_numeric(function, first, value)]
    arrays += [
        None if value is None else _numeric(function, name, value) for name, value in options
    ]
    inexact = [a for a in arrays if a is not None and not is_discrete(a)]
    dtype = jnp.result_type(*inexact or (float,))
    return [a if a is None or a.dtype == dtype else a.astype(dtype) for a in arrays]


def _numeric(function: str, argument: str, value: Any) -> Array:
    if hasattr(value, "__jax_array__") and not isinstance(value, jax.Array):
        value = value.__jax_array__()
    known = isinstance(value, (jax.Array, np.ndarray, np.generic, complex))
    if known and jnp.iscomplexobj(value):
        return jnp.asarray(value)
    return array(function, argument, value)


def together(function: str, **values: Any) -> list[Any]:
    """Returns arrays broadcast to the shape that they have together; None as it is."""
    (first, array), *others = values.items()
    shape = array.shape
    for argument, value in others:
        try:
            shape = shape if value is None else np.broadcast_shapes(shape, value.shape)
        except ValueError:
            raise ValueError(
                f"{function}: {argument} must broadcast with {shape} (the shape of {first}), "
                f"got {value.shape}"
            ) from None
    given = values.values()
    return [a if a is None or a.shape == shape else jnp.broadcast_to(a, shape) for a in given]


def booleans(function: str, argument: str, value: Any) -> Array | None:
    """Returns a boolean array of any shape, or None."""
    value = None if value is None else array(function, argument, value)
    if value is not None and value.dtype != jnp.bool_:
        raise TypeError(f"{function}: {argument} must be boolean, got dtype {value.dtype}")
    return value
