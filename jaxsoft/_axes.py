"""The axis of the classes.

Every function works along one axis, where it lies, for moving an axis costs a copy. Several axes
are moved behind the others and merged into one.
"""

import math
from typing import overload

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


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


@overload
def classes_last(x: Array, axes: tuple[int, ...]) -> Array: ...
@overload
def classes_last(x: None, axes: tuple[int, ...]) -> None: ...
def classes_last(x: Array | None, axes: tuple[int, ...]) -> Array | None:
    """Returns `x` with the axes as one, the last; None as it is."""
    if x is None:
        return None
    return jnp.moveaxis(merge_axes(x, axes), merged_axis(x.ndim, axes), -1)


def take(z: Float[Array, "..."], index: Int[Array, "..."], axis: int) -> Float[Array, "..."]:
    """One entry of each row."""
    index = jnp.expand_dims(index, axis)
    return jnp.take_along_axis(z, index, axis, mode="promise_in_bounds").squeeze(axis)


def one_hot(index: Int[Array, "..."], shape: tuple[int, ...], axis: int) -> Bool[Array, "..."]:
    """Where the position along the axis is the index."""
    return lax.broadcasted_iota(index.dtype, shape, axis) == jnp.expand_dims(index, axis)
