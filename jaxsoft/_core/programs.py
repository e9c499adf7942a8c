"""Compiled programs, also of arrays whose types say over which devices they are divided.

Along an explicit axis of a mesh JAX asks of every operation how its result is divided, and refuses
a gather, a sort or a merging of axes that has more than one answer. A program here says how its
results are divided, and within it the axes are automatic: the compiler divides the work.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

Out = TypeVar("Out")

_auto_axes = getattr(jax.sharding, "auto_axes", None)  # from jax 0.7 on

# For every axis of a result the axis of the first argument that is divided alike; None for one that
# is not divided.
Places = tuple[int | None, ...]


def as_given(ndim: int, **_: Any) -> Places:
    """A result with the axes of the argument."""
    return tuple(range(ndim))


def rows(ndim: int, *, axes: tuple[int, ...], keepdims: bool = False, **_: Any) -> Places:
    """A result without the axes of the classes, or with one entry along them."""
    if keepdims:
        return tuple(None if a in axes else a for a in range(ndim))
    return tuple(a for a in range(ndim) if a not in axes)


def of_last(ndim: int) -> Places:
    """A result without the last axis."""
    return tuple(range(ndim - 1))


def program(
    *, static: tuple[str, ...] = (), places: Callable[..., Any]
) -> Callable[[Callable[..., Out]], Callable[..., Out]]:
    """Compiles a function of arrays, the first of which says how the results are divided.

    An argument may be a tree of arrays.

    Args:
        static: the names of the keyword arguments that are not arrays.
        places: `Places` of all results, or a tuple of one for each, given the number of axes of
            the first array and the static arguments.
    """

    def compiled(fun: Callable[..., Out]) -> Callable[..., Out]:
        @functools.wraps(fun)
        def run(*args: Any, **options: Any) -> Out:
            along = {name: options.pop(name) for name in static}

            def call(args: tuple[Any, ...], options: dict[str, Any]) -> Out:
                return fun(*args, **options, **along)

            mesh = _explicit((args, options))
            if mesh is None or _auto_axes is None:
                return call(args, options)
            first = jax.typeof(jax.tree.leaves(args)[0])
            spec = (*first.sharding.spec, *(None,) * first.ndim)

            def divided(places: Places) -> NamedSharding:
                return NamedSharding(
                    mesh, PartitionSpec(*(None if a is None else spec[a] for a in places))
                )

            of_results = places(first.ndim, **along)
            several = any(isinstance(of_result, tuple) for of_result in of_results)
            sharding = tuple(map(divided, of_results)) if several else divided(of_results)
            return _auto_axes(call, out_sharding=sharding)(args, options)

        return jax.jit(run, static_argnames=static)

    return compiled


def _explicit(arrays: PyTree) -> AbstractMesh | None:
    """The mesh of arrays that are divided along an explicit axis of it, if there is one."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
