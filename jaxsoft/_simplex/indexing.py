"""Checks of what is multiplied with a stack of matrices, and of what indexes it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsoft._core.sizes import known


def batch_index(function: str, index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns an index of the batch axes; one given as a number must lie in its axis."""
    items = index if isinstance(index, tuple) else (index,)
    taken = [_axes_of_index(item) for item in items]
    batch, rest = shape[:-2], sum(taken)
    if rest > len(batch):
        raise IndexError(
            f"{function}: {index!r:.60} reaches into the matrices of shape {shape}, whose batch "
            f"axes are {batch}; row(i), diagonal() and as_matrix() give entries"
        )
    axis = 0
    for item, axes in zip(items, taken, strict=True):
        if item is Ellipsis:
            axis = len(batch) - rest
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            size = batch[axis]
            if known(functools.partial(_outside, int(item), size), False):
                raise IndexError(
                    f"{function}: {item} lies outside of batch axis {axis} of size {size}"
                )
        axis, rest = axis + axes, rest - axes
    return items


def _outside(number: int, size: int) -> bool:
    return not -size <= number < size


def _axes_of_index(item: Any) -> int:
    """How many axes an item of an index takes: a mask its own, others one."""
    if item is None or item is Ellipsis or isinstance(item, (bool, np.bool_)):
        return 0
    mask = isinstance(item, (np.ndarray, jax.Array)) and item.dtype == bool
    return item.ndim if mask else 1


def matrices(
    function: str, argument: str, value: Array, weights: tuple[int, ...], *, columns: bool
) -> tuple[int, ...]:
    """Returns the batch of matrices whose columns, or rows, are as long as those of the weights."""
    *batch, n = weights
    *given, first, last = value.shape
    try:
        if (first if columns else last) == n:
            return jnp.broadcast_shapes(tuple(batch), tuple(given))
    except ValueError:  # the batches do not broadcast
        pass
    wanted = f"(..., {n}, k)" if columns else f"(..., k, {n})"
    raise ValueError(
        f"{function}: {argument} of {value.ndim} axes must be matrices {wanted}, with leading axes "
        f"that broadcast with the batch {tuple(batch)}, got {value.shape}"
    )
