"""A mesh of virtual devices, and what a compiled program sends between them."""

import math
import re

import jax
from jax.sharding import AxisType, Mesh

_COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")


def mesh_of(axis_type: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
    """A mesh with axes of these names and sizes, of the first devices there are."""
    devices = jax.devices()[: math.prod(sizes.values())]
    types = (axis_type,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The collective operations in a compiled program, with the shape of each of their results."""
    found = _COLLECTIVE.findall(text)
    return [
        (operation, tuple(int(size) for size in shape.split(",") if size))
        for results, operation in found
        for shape in _SHAPE.findall(results)
    ]
