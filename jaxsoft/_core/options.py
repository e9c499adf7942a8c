"""Checks of options: numbers, and what has a value for each row or each class."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxsoft._core.sizes import Shape, Size, known
from jaxsoft._core.validation import (
    axes,
    booleans,
    broadcast,
    described,
    floating,
    integer,
    mesh,
    same_shape,
    together,
)


def per_row(
    function: str, argument: str, value: Any, shape: Shape, reduced: tuple[int, ...]
) -> Array | None:
    """Returns an option that has one value for each row, with the reduced axes of size 1."""
    if value is None:
        return None
    value = floating(function, argument, value)
    row_shape = tuple(1 if a in reduced else size for a, size in enumerate(shape))
    return broadcast(
        function, argument, value, row_shape, f"{shape} with the reduced axes {reduced} of size 1"
    )


def temperature(function: str, value: Any, shape: Shape, reduced: tuple[int, ...]) -> Array | None:
    """As `per_row`; None stands for a temperature of one, for which nothing is divided."""
    if _is_number(value):
        number = float(value)
        if not number > 0:
            raise ValueError(f"{function}: temperature must be positive, got {value}")
        if number == 1:
            return None
        value = _normal(number)
    if value is None:
        raise TypeError(f"{function}: temperature must be an array or a number, got NoneType")
    return per_row(function, "temperature", value, shape, reduced)


def _is_number(value: Any) -> bool:
    """Whether the value is known: an array may be traced."""
    return isinstance(value, (bool, int, float, np.generic))


def _normal(number: float) -> float:
    """The nearest positive number that is neither subnormal nor infinite as a default float."""
    finfo = jnp.finfo(jax.dtypes.canonicalize_dtype(float))
    return min(max(number, float(finfo.tiny)), float(finfo.max))


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
    if isinstance(value, (np.ndarray, jax.Array)) or hasattr(value, "__jax_array__"):
        value = floating(function, argument, value)
        if value.ndim:
            raise ValueError(f"{function}: {argument} must be a scalar, got shape {value.shape}")
        return value
    if not _is_number(value):
        raise TypeError(f"{function}: {argument} must be a number, got {described(value)}")
    number = float(value)
    above = low < number if open_low else low <= number
    if not above or not number <= high or number == math.inf:
        span = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{function}: {argument} must lie in {span}, got {value}")
    return number


def number_or_none(
    function: str, argument: str, value: Any, low: int | float, high: int | float
) -> ArrayLike | None:
    """As `number`; None stands for 0, with which nothing is computed."""
    value = number(function, argument, value, low, high)
    return None if isinstance(value, float) and value == 0 else value


def softcap(function: str, value: Any, argument: str = "softcap") -> ArrayLike | None:
    """Returns a positive number, or None, which an infinite number stands for as well."""
    if value is None or (isinstance(value, (float, np.floating)) and value == math.inf):
        return None
    cap = number(function, argument, value, 0, math.inf, open_low=True)
    # One below every float32 is as good as the smallest: both make all logits equal.
    return max(cap, float(np.finfo(np.float32).tiny)) if isinstance(cap, float) else cap


def attention_scale(function: str, value: Any, features: Size) -> Any:
    """Returns the factor of the products of queries and keys: by default one over the root."""
    if value is not None:
        return number(function, "scale", value, -math.inf, math.inf, open_low=True)
    # A symbolic size (`jax.export`) is 1 or more; its root is that of an array.
    if known(lambda: int(features) >= 0, False):
        return 1 / math.sqrt(max(features, 1))
    return 1 / jnp.sqrt(jnp.asarray(features, float))


def non_negative(function: str, argument: str, value: Any, shape: Shape, wanted: str) -> Array:
    """Returns an array broadcast to `shape`; one given as a number must be 0 or more."""
    array = floating(function, argument, value)
    if _is_number(value) and not float(value) >= 0:
        raise ValueError(f"{function}: {argument} must be 0 or more, got {value}")
    return broadcast(function, argument, array, shape, wanted)


def positive(function: str, argument: str, value: Any, shape: Shape, wanted: str) -> Array:
    """Returns an array broadcast to `shape`; one given as a number must be positive."""
    array = floating(function, argument, value)
    if _is_number(value) and not float(value) > 0:
        raise ValueError(f"{function}: {argument} must be positive, got {value}")
    return broadcast(function, argument, array, shape, wanted)


def per_class(function: str, argument: str, value: Any, n: int, wanted: str) -> Array | None:
    """Returns an option that has one value for each class, or None."""
    if value is None:
        return None
    value = floating(function, argument, value)
    same_shape(function, argument, value, (n,), wanted)
    return value


def positive_or_none(function: str, argument: str, value: Any) -> int | None:
    """Returns a positive integer, or None."""
    if value is None:
        return None
    number = integer(function, argument, value, "an integer or None")
    if number < 1:
        raise ValueError(f"{function}: {argument} must be 1 or more, got {number}")
    return number


def of_softmax(
    function: str,
    x: Any,
    axis: Any,
    where: Any,
    temperature_: Any,
    sink: Any,
    axis_name: Any,
) -> tuple[tuple[Array, Array | None, Array | None, Array | None], dict[str, Any]]:
    """Returns the arguments of softmax as arrays, and its axes and mesh by name."""
    where = booleans(function, "where", where)
    x, where = together(function, x=floating(function, "x", x), where=where)
    numbers = axes(function, axis, x.ndim)
    scale = temperature(function, temperature_, x.shape, numbers)
    sink = per_row(function, "sink", sink, x.shape, numbers)
    devices = mesh(function, axis_name, temperature=scale, sink=sink)
    return (x, where, scale, sink), {"axes": numbers, "mesh": devices}


def alpha(
    function: str, value: Any, shape: Shape, reduced: tuple[int, ...]
) -> tuple[Array, float | None]:
    """Returns α as `per_row`; and as a number, if it is one that is known."""
    number = None
    if _is_number(value):
        number = float(value)
        if not 1 <= number < math.inf:
            raise ValueError(f"{function}: alpha must lie in [1, inf), got {value}")
    elif value is None:
        raise TypeError(f"{function}: alpha must be an array or a number, got NoneType")
    array = per_row(function, "alpha", value, shape, reduced)
    assert array is not None
    return array, number


def of_entmax(
    function: str, x: Any, alpha_: Any, axis: Any, where: Any, temperature_: Any
) -> tuple[tuple[Array, Array | None, Array | None, Array], dict[str, Any]]:
    """Returns the arguments of entmax as arrays, and its axes and a known α by name."""
    (x, where, scale, _), along = of_softmax(function, x, axis, where, temperature_, None, None)
    array, number = alpha(function, alpha_, x.shape, along["axes"])
    return (x, where, scale, array), {**along, "number": number}
