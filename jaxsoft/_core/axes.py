"""The axis of the classes.

Every function works along one axis, where it lies, for moving an axis costs a copy. Several axes
are moved behind the others and merged into one. Where the classes lie on several devices, an array
has a part of them, and the axis goes on over the axes of a mesh.
"""

import math
from typing import Any, NamedTuple, overload

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsoft._core import devices
from jaxsoft._core.devices import Mesh
from jaxsoft._core.sizes import Shape


class ClassAxis(NamedTuple):
    """The axis of the classes.

    What belongs to a row has the shape without it. On several devices a class has its place on one
    of them; on the others its place is the number of classes there.

    Attributes:
        position: the number of the axis in the array.
        mesh: the axes of a mesh over which it goes on.
    """

    position: int
    mesh: Mesh | None = None

    def expand(self, of_row: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """What belongs to a row, to be broadcast to its classes."""
        return jnp.expand_dims(of_row, self.position)

    def sum(self, terms: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The sum over all classes."""
        return devices.total(jnp.sum(terms, self.position), self.mesh)

    def count(self, z: Shaped[Array, "..."]) -> int:
        """How many classes there are in all, given an array of those here."""
        return z.shape[self.position] * (self.mesh.size if self.mesh else 1)

    def places(self, index: Int[Array, "..."], z: Shaped[Array, "..."]) -> Int[Array, "..."]:
        """The place of a class in z, given its number among all classes."""
        if self.mesh is None:
            return index
        n = z.shape[self.position]
        place = index - devices.index(self.mesh).astype(index.dtype) * n
        return jnp.where((place >= 0) & (place < n), place, n)

    def take(self, z: Float[Array, "..."], place: Int[Array, "..."]) -> Float[Array, "..."]:
        """The entry of one class of each row, given its place."""
        if self.mesh is None:
            return take(z, place, self.position)
        n = z.shape[self.position]
        entry = take(z, jnp.minimum(place, n - 1), self.position)
        return devices.total(jnp.where(place < n, entry, 0), self.mesh)

    def one_hot(self, place: Int[Array, "..."], z: Shaped[Array, "..."]) -> Bool[Array, "..."]:
        """Where the class is the one with the place, in an array of the shape of z."""
        return one_hot(place, z.shape, self.position)


# A ClassAxis, or what else tells which entries make a row: it has `sum` and `expand`.
Rows = Any


def merge_axes(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns `x` with several axes as one, the last; with one axis as it is."""
    if len(axes) == 1:
        return x
    kept = [a for a in range(x.ndim) if a not in axes]
    merged = math.prod(x.shape[a] for a in axes)
    return x.transpose(*kept, *axes).reshape(*(x.shape[a] for a in kept), merged)


def merged_axis(ndim: int, axes: tuple[int, ...]) -> int:
    """The number of the axis that `merge_axes` leaves."""
    return axes[0] if len(axes) == 1 else ndim - len(axes)


def unmerge_axes(x: Array, axes: tuple[int, ...], shape: Shape) -> Array:
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
    return None if x is None else jnp.moveaxis(merge_axes(x, axes), merged_axis(x.ndim, axes), -1)


def take(z: Float[Array, "..."], index: Int[Array, "..."], axis: int) -> Float[Array, "..."]:
    """One entry of each row."""
    index = jnp.expand_dims(index, axis)
    return jnp.take_along_axis(z, index, axis, mode="promise_in_bounds").squeeze(axis)


def one_hot(index: Int[Array, "..."], shape: Shape, axis: int) -> Bool[Array, "..."]:
    """Where the position along the axis is the index."""
    return lax.broadcasted_iota(index.dtype, shape, axis) == jnp.expand_dims(index, axis)
