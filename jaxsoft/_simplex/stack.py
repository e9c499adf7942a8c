"""A batch of matrices as numpy knows it, a stack: its shape, its index, and products by `@`."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import validation
from jaxsoft._core.sizes import known
from jaxsoft._simplex import formulas


class MatrixStack:
    """What C, a stack of n x n matrices held as s and s0, has in common with an array."""

    weights: Float[Array, "*batch n"]
    sink: Float[Array, "*batch"]
    axis_name: validation.AxisName

    # numpy leaves `array @ J` and `array * J` to this class, as JAX does.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of `as_matrix`, (..., n, n)."""
        shape: tuple[int, ...] = self.weights.shape
        return *shape, shape[-1]

    @property
    def ndim(self) -> int:
        """The number of batch axes, and 2."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """That of the weights, and of every product."""
        return self.weights.dtype

    def __len__(self) -> int:
        """The size of the first batch axis; `TypeError` for one matrix."""
        if self.ndim == 2:
            raise TypeError(f"SimplexJacobian: one matrix, {self.shape}, has no length, no batch")
        return self.shape[0]

    def __bool__(self) -> bool:
        """True: it is no container, and `if J` does not ask for its length."""
        return True

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        """Raises `TypeError`: numpy and `jnp.asarray` would make an n x n array unasked."""
        raise TypeError(
            f"SimplexJacobian: {self.shape} is not made an array unasked; as_matrix() makes one"
        )

    def __matmul__(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "..."]:
        """J @ v: C times vectors, or C times every column of matrices.

        The number of axes alone decides. With at most as many axes as `weights`, v is vectors, as
        in `mv`; with more, matrices. So one C takes [n] and [n, k] just as in numpy. Of a batch,
        [batch, n] is one vector for each row, which numpy.matmul would take for a matrix, and
        [batch, n, k] is one matrix for each; a matrix that all rows share is V[None].

        Args:
            v: vectors, broadcastable to [..., n], of one axis or more; or matrices [..., n, k],
                whose leading axes and the batch broadcast against each other.

        Returns:
            C v, shape [..., n], or C V, shape [..., n, k].

        Raises:
            TypeError: v is no array; so for another Jacobian, for C C' is not of the family.
            ValueError: v has no axis (a number scales by `*`), or fits neither shape.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(jacobian @ jnp.array([1.0, 0.0, 0.0]))
            [ 0.25  -0.125 -0.125]
            >>> print(jacobian @ jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
            [[ 0.25   -0.125 ]
             [-0.125   0.1875]
             [-0.125  -0.0625]]
        """
        return self._product("__matmul__", v, columns=True)

    def __rmatmul__(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "..."]:
        """v @ J: vectors times C, or every row of matrices times C; v may be a numpy array.

        As `J @ v`, and for vectors the same, C being symmetric.

        Args:
            v: vectors as in `J @ v`; or matrices [..., k, n].

        Returns:
            C v, shape [..., n], or V C, shape [..., k, n].

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]) @ jacobian)
            [[ 0.25   -0.125  -0.125 ]
             [-0.125   0.1875 -0.0625]]
        """
        return self._product("__rmatmul__", v, columns=False)

    def _product(self, method: str, v: Any, *, columns: bool) -> Array:
        function = f"SimplexJacobian.{method}"
        v = validation.floating(function, "v", v).astype(self.dtype)
        mesh, shape = validation.mesh(function, self.axis_name), self.weights.shape
        if not v.ndim:
            raise ValueError(f"{function}: v must have an axis of classes, got (); c * J scales")
        if v.ndim < self.ndim:
            wanted = f"the shape of the weights; matrices have {self.ndim} axes or more"
            v = validation.broadcast(function, "v", v, shape, wanted)
            return formulas.product(self.weights, self.sink, v, mesh)
        batch = _common_batch(function, v, shape, columns=columns)
        v = jnp.broadcast_to(v, (*batch, *v.shape[-2:]))
        weights = jnp.broadcast_to(self.weights, (*batch, shape[-1]))
        sink = jnp.broadcast_to(self.sink, batch)
        return formulas.products(weights, sink, v, -1 if columns else -2, mesh)


def _common_batch(
    function: str, v: Array, weights: tuple[int, ...], *, columns: bool
) -> tuple[int, ...]:
    """The batch of matrices whose columns, or rows, are as long as those of the weights."""
    *batch, n = weights
    *given, first, last = v.shape
    try:
        if (first if columns else last) == n:
            return jnp.broadcast_shapes(tuple(batch), tuple(given))
    except ValueError:  # the batches do not broadcast
        pass
    wanted = f"(..., {n}, k)" if columns else f"(..., k, {n})"
    raise ValueError(
        f"{function}: v of {v.ndim} axes must be matrices {wanted}, with leading axes "
        f"that broadcast with the batch {tuple(batch)}, got {v.shape}"
    )


def batch_index(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns an index of the batch axes; one given as a number must lie in its axis."""
    items = index if isinstance(index, tuple) else (index,)
    taken = [_axes_of_index(item) for item in items]
    batch, rest, axis = shape[:-2], sum(taken), 0
    if rest > len(batch):
        raise IndexError(
            f"SimplexJacobian: {index!r:.60} reaches into the matrices of shape {shape}, whose "
            f"batch axes are {batch}; row(i), diagonal() and as_matrix() give entries"
        )
    for item, axes in zip(items, taken, strict=True):
        if item is Ellipsis:
            axis = len(batch) - rest
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            _require_within(int(item), axis, batch[axis])
        axis, rest = axis + axes, rest - axes
    return items


def _require_within(number: int, axis: int, size: int) -> None:
    if known(lambda: not -size <= number < size, False):
        raise IndexError(
            f"SimplexJacobian: {number} lies outside of batch axis {axis} of size {size}"
        )


def _axes_of_index(item: Any) -> int:
    """How many axes an item of an index takes: a mask its own, others one."""
    if item is None or item is Ellipsis or isinstance(item, (bool, np.bool_)):
        return 0
    mask = isinstance(item, (np.ndarray, jax.Array)) and item.dtype == bool
    return item.ndim if mask else 1
