"""Classes that lie on several devices: what is exchanged between them, and its derivatives.

Within `jax.shard_map` each device runs the program on its part of the classes. What comes from its
part differs between the devices; what all have alike, such as a row's maximum, is one value. An
array that is alike becomes one that differs by `copied`, and `joined` makes one value of copies:
in reverse mode the former adds up what the devices have, and the latter gives each the same. So a
rule on one device states the value of the whole row, with the derivative by its own part: by its
own classes, and by an argument that all share as far as its classes depend on it.

All of it does nothing without a mesh. What rules use takes the number of a device from no other
place than its arguments, for JAX may run a rule when the names of the axes are forgotten.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._core.autodiff import analytic


class Mesh(NamedTuple):
    """The axes of a mesh over which the classes go on.

    Attributes:
        names: of the axes, in order.
        size: how many devices share the classes.
    """

    names: tuple[Hashable, ...]
    size: int


def size(names: tuple[Hashable, ...]) -> int:
    """How many devices there are along the axes; an error if they are not those of a mesh here."""
    return lax.psum(1, names)


def index(mesh: Mesh) -> Array:
    """The number of the device here, in the order of the classes."""
    return lax.axis_index(mesh.names)


def total(parts: Any, mesh: Mesh | None) -> Any:
    """The sums over the devices, of one array or more."""
    return lax.psum(parts, mesh.names) if mesh else parts


def largest(part: Array, mesh: Mesh | None) -> Array:
    """The maximum over the devices: a constant."""
    return lax.pmax(lax.stop_gradient(part), mesh.names) if mesh else part


def copied(tree: Any, like: Array, mesh: Mesh | None) -> Any:
    """Copies of what is alike, one on each device, given an array that differs."""
    return tree if mesh is None else _all_typed(tree, like)


def shares(tree: Any, like: Array, mesh: Mesh | None) -> Any:
    """Equal parts of what is alike, one on each device, to be added up."""
    if mesh is None:
        return tree
    return copied(jax.tree.map(lambda x: x / mesh.size, tree), like, mesh)


def joined(copies: Array, mesh: Mesh | None) -> Array:
    """One value of copies that are equal but for their derivatives, which add up."""
    return largest(copies, mesh) + total(_change(copies), mesh) if mesh else copies


def evenly(copies: Array, mesh: Mesh | None) -> Array:
    """Copies whose derivatives are the total one on each device, made such that `joined` takes.

    They are so where JAX differentiates a program with what is exchanged in it.
    """
    return lax.stop_gradient(copies) + _change(copies / mesh.size) if mesh else copies


# 0, with the derivative of x. NaN stays, which a maximum over devices may lose.
def _change_rule(x: Array) -> Array:
    return jnp.where(jnp.isnan(x), x, 0)


def _change_pullback(x: Array, cotangent: Array) -> Any:
    return (cotangent,)


_change = analytic(_change_rule, _change_pullback)


def differing(x: Array) -> frozenset[Hashable]:
    """The mesh axes along which x differs, as far as JAX keeps count of them."""
    kind = jax.typeof(x)
    counted: Any = getattr(kind, "manual_axis_type", kind)  # before jax 0.10 the type had them
    return getattr(counted, "varying", getattr(counted, "vma", frozenset()))


def counted(mesh: Mesh) -> bool:
    """Whether JAX keeps count of what differs between devices."""
    return bool(differing(lax.axis_index(mesh.names)))


def agree(x: Array, mesh: Mesh | None) -> Array | bool:
    """Whether the devices have the same; True where JAX keeps count, for then it is known."""
    if mesh is None or counted(mesh):
        return True
    return largest(x, mesh) == -largest(-x, mesh)


def aligned(*args: Array | None, mesh: Mesh | None = None) -> tuple[Any, ...]:
    """The arguments of a function, each differing along every mesh axis along which one does.

    So those of a rule have a gradient of their own type where the rows, the tokens of a batch, are
    divided among devices. Along `mesh` only the first, the one with the classes, is made to differ.
    """
    given = [x for x in args if x is not None]
    own = frozenset(mesh.names) if mesh else frozenset()
    missing = frozenset().union(*map(differing, given)) - own

    def align(x: Array | None, names: frozenset[Hashable]) -> Array | None:
        if x is None:
            return None
        for name in sorted(names - differing(x), key=repr):
            x = _typed(x, lax.axis_index(name))
        return x

    first, *rest = args
    return align(first, missing | own), *(align(x, missing) for x in rest)


def typed(tree: Any, like: Array) -> Any:
    """Constants that differ along the mesh axes along which an array does, as a loop demands."""
    return _all_typed(tree, like) if differing(like) else tree


def _all_typed(tree: Any, like: Array) -> Any:
    some = lax.stop_gradient(like[(0,) * like.ndim])
    return jax.tree.map(lambda x: _typed(x, some), tree)


def _typed(x: Array, like: Array) -> Array:
    # A selection that never takes place: what differs makes the type differ, in every version of
    # JAX, and within `vmap` too.
    return jnp.where(False, lax.convert_element_type(like, x.dtype), x)
