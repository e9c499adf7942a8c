"""Validation at the public boundary: every error message of the array functions."""

import functools
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsoft._core import devices
from jaxsoft._core.devices import Mesh
from jaxsoft._core.sizes import Shape

Axis = int | Sequence[int] | None
AxisName = Hashable | tuple[Hashable, ...] | None


def array(function: str, argument: str, value: Any) -> Array:
    """Returns `value` as a real array, or raises `TypeError`."""
    if not isinstance(value, jax.Array):
        if not (
            isinstance(value, (np.ndarray, np.generic, bool, int, float, complex))
            or hasattr(value, "__jax_array__")
        ):
            cure = " (use jnp.asarray)" if isinstance(value, (list, tuple)) else ""
            raise TypeError(
                f"{function}: {argument} must be an array or a number, got {described(value)}{cure}"
            )
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in "biufcV":
            raise TypeError(f"{function}: {argument} must be numeric, got dtype {value.dtype}")
        value = jnp.asarray(value)
    if not (is_kind(value.dtype, jnp.floating) or is_discrete(value)):
        raise TypeError(f"{function}: {argument} must be real, got dtype {value.dtype}")
    return value


def floating(function: str, argument: str, value: Any) -> Array:
    """Returns `value` as a floating array; integers and booleans become the default float."""
    value = array(function, argument, value)
    return value.astype(float) if is_discrete(value) else value


def is_discrete(value: Array) -> bool:
    """Whether the array holds integers or booleans."""
    return is_kind(value.dtype, jnp.integer) or is_kind(value.dtype, jnp.bool_)


# JAX's own test is slow beside a call that is compiled already.
@functools.cache
def is_kind(dtype: Any, kind: Any) -> bool:
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
                f"got {described(axis)}"
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
        size = devices.size(names)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            f"{function}: axis_name must name mesh axes of a jax.shard_map around the call (or be "
            f"the axis_name of a jax.vmap), got {axis_name!r}"
        ) from None
    for argument, value in alike.items():
        along = () if value is None else devices.differing(jnp.asarray(value)) & set(names)
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


def mask(
    function: str, where: Any, shape: Shape, wanted: str = "the shape of the logits"
) -> Array | None:
    """Returns the boolean mask broadcast to `shape`."""
    return None if where is None else boolean(function, "where", where, shape, wanted)


def boolean(function: str, argument: str, value: Any, shape: Shape, wanted: str) -> Array:
    """Returns a boolean array broadcast to `shape`."""
    given = array(function, argument, value)
    _require_boolean(function, argument, given)
    return broadcast(function, argument, given, shape, wanted)


def _require_boolean(function: str, argument: str, value: Array) -> None:
    if value.dtype != jnp.bool_:
        raise TypeError(f"{function}: {argument} must be boolean, got dtype {value.dtype}")


def broadcast(function: str, argument: str, value: Array, shape: Shape, wanted: str) -> Array:
    """Returns `value` broadcast to `shape`, or raises `ValueError`."""
    if not broadcasts(value.shape, shape):
        raise ValueError(
            f"{function}: {argument} must broadcast to {shape} ({wanted}), got {value.shape}"
        )
    return value if value.shape == shape else jnp.broadcast_to(value, shape)


def same_shape(function: str, argument: str, value: Array, shape: Shape, of: str) -> None:
    """Raises `ValueError` unless `value` has the given shape."""
    if value.shape != shape:
        raise ValueError(
            f"{function}: {argument} must have shape {shape} ({of}), got {value.shape}"
        )


def matrix(function: str, argument: str, value: Array, x: Array, of: str) -> None:
    """Raises `ValueError` unless `value` is a matrix that x, of shape [..., d], multiplies."""
    if x.ndim < 1:
        raise ValueError(f"{function}: {of} must have an axis of features, got shape {x.shape}")
    if value.ndim != 2 or value.shape[0] != x.shape[-1]:
        cure = ""
        if value.ndim == 2 and value.shape[1] == x.shape[-1]:
            cure = f" (pass {argument}.T)"
        elif value.shape == x.shape[:-1]:
            cure = f" (are {argument} and labels swapped?)"
        raise ValueError(
            f"{function}: {argument} must have shape ({x.shape[-1]}, n) "
            f"({of} {x.shape} @ {argument}), got {value.shape}{cure}"
        )


def integer(function: str, argument: str, value: Any, wanted: str = "an integer") -> int:
    """Returns a Python integer, or raises `TypeError`."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{function}: {argument} must be {wanted}, got {described(value)}"
        ) from None


def flag(function: str, argument: str, value: Any) -> bool:
    """Returns a boolean that is known."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {argument} must be True or False, got {described(value)}")
    return bool(value)


def sizes(function: str, argument: str, value: Any) -> tuple[int, ...]:
    """Returns a shape as a tuple of integers."""
    try:
        given = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(
            f"{function}: {argument} must be a sequence of integers, got {described(value)}"
        ) from None
    if any(size < 0 for size in given):
        raise ValueError(f"{function}: {argument} must hold numbers of 0 or more, got {given}")
    return given


def broadcasts(shape: Shape, wanted: Shape) -> bool:
    """Whether an array of one shape can be broadcast to the other."""
    sizes = (1,) * (len(wanted) - len(shape)) + shape
    return len(sizes) == len(wanted) and all(
        a in (1, b) for a, b in zip(sizes, wanted, strict=True)
    )


def described(value: Any) -> str:
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
            shape = shape if value is None else jnp.broadcast_shapes(shape, value.shape)
        except ValueError:
            raise ValueError(
                f"{function}: {argument} must broadcast with {shape} (the shape of {first}), "
                f"got {value.shape}"
            ) from None
    given = values.values()
    return [a if a is None or a.shape == shape else jnp.broadcast_to(a, shape) for a in given]


def booleans(function: str, argument: str, value: Any) -> Array | None:
    """Returns a boolean array of any shape, or None."""
    if value is None:
        return None
    given = array(function, argument, value)
    _require_boolean(function, argument, given)
    return given
