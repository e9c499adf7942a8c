"""Sums over the other classes of a row, for rows of few classes.

Each class sums over all others for itself: n times the arithmetic of one sum for the row, but a
single loop over memory, where XLA's loops for sums on a CPU are made for long rows. The class
itself is left out by selection, since XLA may compute an array twice, with other roundings: then
v_i - v_i is not 0. Nothing here has a derivative: it is called where one is stated.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._axes import ClassAxis
from jaxsoft._sizes import known

FEW = 8  # classes, up to which this is the shortest program
_SMALL = 2**16  # entries


def are_few(p: Array, axis: ClassAxis, *, limit: int = FEW) -> bool:
    """Whether the whole row is here and has at most so many classes."""
    return axis.mesh is None and known(lambda: p.shape[axis.position] <= limit, False)


def is_small(p: Array) -> bool:
    """Whether an array has so few entries that the time of a loop over it does not count."""
    return known(lambda: p.size <= _SMALL, False)


def lead_over_others(p: Array, v: Array, axis: ClassAxis) -> Array:
    """Σ_{j≠i} p_j (v_i - v_j) for every class i."""
    (_, p_j), (v_i, v_j) = _pair(p, axis), _pair(v, axis)
    return _total(_without_own(p_j, axis) * (v_i - v_j), axis)


def exchange_with_others(p: Array, v: Array, axis: ClassAxis) -> Array:
    """Σ_{j≠i} (p_j v_i - p_i v_j) for every class i."""
    (p_i, p_j), (v_i, v_j) = _pair(p, axis), _pair(v, axis)
    return _total(_without_own(p_j * v_i - p_i * v_j, axis), axis)


def _pair(a: Array, axis: ClassAxis) -> tuple[Array, Array]:
    """a_i and a_j, to be broadcast to tables [..., j, i, ...]."""
    return jnp.expand_dims(a, axis.position), jnp.expand_dims(a, axis.position + 1)


def _without_own(table: Array, axis: ClassAxis) -> Array:
    """The table with 0 where i is j."""
    n = max(table.shape[axis.position : axis.position + 2])
    own = jnp.expand_dims(jnp.eye(n, dtype=bool), range(2, table.ndim - axis.position))
    return jnp.where(own, 0, table)


def _total(table: Array, axis: ClassAxis) -> Array:
    """The sum over j."""
    at = axis.position
    if table.shape[at] > FEW:
        # A sum that XLA knows for one would get a loop for long rows.
        return lax.reduce(table, jnp.zeros((), table.dtype), lambda a, b: a - (-b), (at,))
    left_over = []
    while (n := table.shape[at]) > 1:
        if n % 2:
            left_over.append(lax.slice_in_dim(table, n - 1, n, axis=at))
        first, second = (lax.slice_in_dim(table, k, k + n // 2, axis=at) for k in (0, n // 2))
        table = first + second
    return functools.reduce(jnp.add, left_over, table).squeeze(at)
