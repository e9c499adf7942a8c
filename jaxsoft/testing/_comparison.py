"""Errors in units of the rounding of a dtype, and the table of the blocks where they are large."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike, Shaped

from jaxsoft.testing._arguments import kind
from jaxsoft.testing._precision import Named, Number, Wide


def error_in_eps(
    actual: Any, exact: Any, *, scale: Any = None, dtype: DTypeLike | None = None
) -> Wide:
    """Returns the error of every entry in units of the rounding of its dtype.

        error = abs(actual - exact) / (eps * abs(exact)),    or over eps * scale

    A correctly rounded number has an error of at most 1/2.

    Args:
        actual: the computed numbers, an array of a floating dtype.
        exact: what they should be, of the same shape or a scalar: an array, or a nested list or
            object array of `mpmath` or other numbers. Those are subtracted in their own
            arithmetic, so that no digit of theirs is lost.
        scale: the magnitude to measure against instead of abs(exact), of the same shape or a
            scalar.
        dtype: the dtype whose eps counts, when it is not that of `actual`.

    Returns:
        The errors, a float64 array shaped like `actual`.

    Raises:
        TypeError: `actual` or `dtype` is not floating, or `exact` or `scale` is not real.
        ValueError: `exact` or `scale` has another shape, or `scale` is negative or NaN.

    Numerics:
        0 where both are NaN or the same infinity; inf where they are not alike, and where the
        actual number differs from an exact 0 (or the scale is 0). Below `tiny`, the smallest
        normal number, where floating numbers lie no closer together, errors are measured against
        `tiny`. There hardware may replace a number by 0: with abs(exact) < tiny, an error below
        `tiny` counts as error / tiny, less than 1. Not so in float16, whose small numbers are
        ordinary probabilities and are not replaced.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft.testing import error_in_eps
        >>> print(error_in_eps(jnp.array([1.0, 2.0, 0.5], jnp.bfloat16), [1.0, 2.0625, 0.5]))
        [0.         3.87878788 0.        ]
    """
    given = np.asarray(actual)
    unit = given.dtype if dtype is None else jnp.dtype(dtype)
    for argument, found in (("actual", given.dtype), ("dtype", unit)):
        if not jnp.issubdtype(found, jnp.floating):
            raise TypeError(f"error_in_eps: {argument} must be of a floating dtype, got {found}")
    wanted = _numbers("exact", exact, given.shape)
    against = abs(wanted) if scale is None else _numbers("scale", scale, given.shape)
    if scale is not None and not np.all(against >= 0):
        raise ValueError("error_in_eps: scale must be 0 or larger, got a negative number or NaN")

    got = given.astype(np.float64).ravel()
    eps, tiny = float(jnp.finfo(unit).eps), float(jnp.finfo(unit).tiny)
    with np.errstate(all="ignore"):
        rounded = wanted.astype(np.float64)  # older versions of numpy warn of a NaN of mpmath
        finite = np.isfinite(got) & np.isfinite(rounded)
        alike = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        got = np.where(finite, got, 0).astype(wanted.dtype)
        difference = abs(got - np.where(finite, wanted, 0))
        error = difference / np.maximum(against, tiny) / eps
        error = np.where((against == 0) & (difference != 0), math.inf, error)
        # Only types with the exponents of float32 or more, so not float16.
        replaced = (tiny < 2.0**-100) & (abs(wanted) < tiny) & (difference < tiny)
        error = np.where(replaced, np.minimum(error, difference / tiny), error)
        error = np.where(finite, error, np.where(alike, 0.0, math.inf))
        return error.astype(np.float64).reshape(given.shape)


def _numbers(argument: str, value: Any, shape: tuple[int, ...]) -> Shaped[np.ndarray, " n"]:
    """Returns numbers as a flat array: of Python objects, or of the widest float there is."""
    numbers = np.asarray(value)
    if numbers.dtype != object:
        if not jnp.issubdtype(numbers.dtype, jnp.floating) and numbers.dtype.kind not in "biu":
            raise TypeError(f"error_in_eps: {argument} must be real, got dtype {numbers.dtype}")
        numbers = numbers.astype(np.longdouble)
    if numbers.shape not in ((), shape):
        raise ValueError(
            f"error_in_eps: {argument} must have the shape of actual, {shape}, or be a scalar, "
            f"got shape {numbers.shape}"
        )
    return np.broadcast_to(numbers, shape).ravel()


def compared(
    blocks: Named, expected: Named, tolerance: Number | None, least_scale: Number, differences: bool
) -> tuple[float, list[tuple[str, ...]]]:
    """Returns the largest error, and a row of the table for each wrong block."""
    largest = 0.0
    rows: list[tuple[str, ...]] = []
    for name, exact in expected.items():
        got = blocks[name]
        unit = np.float32 if differences and got.dtype == np.float64 else got.dtype
        scale = np.maximum(exact.scale, least_scale)
        errors = error_in_eps(got, exact.entries, scale=scale, dtype=unit)
        allowed = (8 if got.dtype.itemsize <= 2 else 64) if tolerance is None else tolerance
        largest = max(largest, float(np.max(errors, initial=0.0)))
        if np.any(errors > allowed):
            at = tuple(int(i) for i in np.unravel_index(np.argmax(errors), errors.shape))
            wrong = f"{np.count_nonzero(errors > allowed)}/{errors.size}"
            digits = 17 if unit == np.float64 else 9
            numbers = (f"{float(x[at]):.{digits}g}" for x in (got, exact.entries))
            rows.append((f"{errors[at]:.3g}", wrong, f"{name} {list(at) or ''}".strip(), *numbers))
    return largest, rows


def report(
    fun: object, chosen: Sequence[str], table: list[tuple[str, ...]], differences: bool
) -> str:
    """The message of the error that `assert_derivatives` raises."""
    lines = [("mode", "eps", "wrong", "at", "got", "wanted"), *table]
    # The text of an exception stands in place of the numbers and takes no part in the columns.
    widths = [max(len(line[i]) for line in lines if i == 0 or len(line) > 3) for i in range(6)]
    failed = {line[0] for line in table}
    name = getattr(fun, "__name__", kind(fun))
    text = [f"assert_derivatives: {name} is wrong in {len(failed)} of {len(chosen)} modes"]
    text += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text.append("right: " + (", ".join(mode for mode in chosen if mode not in failed) or "none"))
    if differences:
        text.append("wanted is by central differences in float64; a reference would be sharper")
    return "\n  ".join(text)
