"""SimplexJacobian: the Jacobian of the softmax family as an operator of n numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import class_ids, options, validation
from jaxsoft._rows.logits import compute_dtype
from jaxsoft._simplex import formulas
from jaxsoft._simplex.matrix import OF_ROWS, SimplexMatrix
from jaxsoft._simplex.stack import batch_index


@final
@dataclasses.dataclass(frozen=True, eq=False)
class SimplexJacobian(SimplexMatrix):
    r"""The Jacobian of softmax and of its whole family, as an operator of n numbers.

        C = diag(s) - s sᵀ / t,    t = Σs + s0

    With s = p and s0 = 0 this is the Jacobian of softmax at probabilities p; at a temperature T it
    has s = p / T, with a sink s0 = p_sink / T (the sink is one more class, of which no row and no
    column is kept); a masked class has weight 0. α-entmax has s = p^(2-α) and sparsemax s = 1 on
    the support. C is symmetric and positive semidefinite, and C 1 = s0 s / t.

    Every method works along the last axis, for each row of the leading axes apart, in O(n) time and
    memory but for `eigvalsh` (O(n²) time) and `as_matrix`. All are differentiable in every mode
    where the quantity is.

    It has the manners of a stack of matrices in numpy: `J @ v` and `v @ J` of vectors or matrices,
    `c * J` and `J / c`, `J.shape`, `J.ndim` and `J.dtype`, and along the batch `J[i]`, `len(J)` and
    iteration. But `np.asarray(J)` raises: `as_matrix()` makes the array.

    Immutable, and a pytree: it passes through `jax.jit`, `jax.vmap`, `jax.grad` and `jax.export`.
    Written to a file (`Exported.serialize`), its `axis_name` must be None, a string or a tuple of
    strings; what reads it must have imported jaxsoft.

    Attributes:
        weights: s ≥ 0, shape [..., n], float32 or wider.
        sink: s0 ≥ 0, shape [...] (broadcast to it).
        axis_name: mesh axes over which the classes go on, as in `softmax`; None for one device.
            Then vectors and masks are those of the classes here, and what belongs to a row is alike
            on all devices. It is no leaf of the pytree.

    Raises:
        TypeError: an attribute is complex or not an array; in every method, an argument is.
        ValueError: `weights` has no axis, or `sink` does not broadcast to the rows; in every
            method, a vector or mask does not broadcast to [..., n] or a number per row to [...].
            Of classes on several devices: in `norm(2)`, `norm_bounds`, `eigh_max`, `eigvalsh`,
            `slogdet`, `rank_factor`, `cholesky_mv`, `merge`, `sample` and `as_matrix`, which are no
            sums over the classes.

    Numerics:
        1 - p is never formed: it is the sum of the others. So a row in which one probability
        rounds to 1 is as exact as any other, if the weights are those of `softmax_jacobian`. A row
        with NaN is NaN, others are untouched. Derivatives are those along the logits: a weight of
        0, a mask or a logit of -inf, stays 0 where the derivative by it does not exist (that of
        √s, and of a norm of C = 0).

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> jacobian = jaxsoft.softmax_jacobian(jnp.array([20.0, 0.0, 0.0]))
        >>> print(f"{jacobian.trace():.4g} {jacobian.norm(2):.4g}")
        8.245e-09 6.183e-09
        >>> print(jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0)).as_matrix())
        [[ 0.25   -0.125  -0.125 ]
         [-0.125   0.1875 -0.0625]
         [-0.125  -0.0625  0.1875]]
        >>> batch = jaxsoft.softmax_jacobian(jnp.zeros((4, 2)), temperature=2.0)
        >>> print(batch.shape, batch[0] @ jnp.array([1.0, 0.0]), (batch / 5.0)[0].trace())
        (4, 2, 2) [ 0.125 -0.125] 0.05

    Source: Tanabe & Sagae 1992 (inverse and Cholesky factor); Golub 1973 (the secular equation of
    the spectrum); Borges & Gragg 1993 (its iteration for all eigenvalues).
    """

    weights: Float[Array, "*batch n"]
    sink: Float[Array, "*batch"]
    axis_name: validation.AxisName = None

    def __post_init__(self) -> None:
        name = "SimplexJacobian"
        weights = validation.floating(name, "weights", self.weights)
        if not weights.ndim:
            raise ValueError(f"{name}: weights must have shape [..., n], got ()")
        weights = weights.astype(compute_dtype(weights.dtype))
        sink = validation.floating(name, "sink", self.sink).astype(weights.dtype)
        sink = validation.broadcast(name, "sink", sink, weights.shape[:-1], OF_ROWS)
        vars(self).update(weights=weights, sink=sink)  # the class is frozen

    @property
    def T(self) -> SimplexJacobian:
        """The transpose. C is symmetric, so it is C."""
        return self

    # ----------------------------------------------------------- the family, closed under these

    def restrict(self, mask: Shaped[ArrayLike, "..."]) -> SimplexJacobian:
        """The principal submatrix of the classes that stay; the others' mass goes to the sink.

        Args:
            mask: boolean, broadcastable to [..., n], True for the classes that stay.

        Returns:
            A Jacobian of the same shape: a dropped class keeps its place with weight 0.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(jacobian.restrict(jnp.array([True, True, False])).as_matrix())
            [[ 0.25   -0.125   0.    ]
             [-0.125   0.1875  0.    ]
             [ 0.      0.      0.    ]]
        """
        keep = self._mask("restrict", mask)
        dropped = formulas.total(jnp.where(keep, 0, self.weights), self._mesh("restrict"))
        return self._with(jnp.where(keep, self.weights, 0), self.sink + dropped)

    def eliminate(self, mask: Shaped[ArrayLike, "..."]) -> SimplexJacobian:
        """The Schur complement on the classes that stay; the others' mass disappears.

        Up to a factor this is the Jacobian of softmax among the classes that stay.

        Args:
            mask: boolean, broadcastable to [..., n], True for the classes that stay.

        Returns:
            A Jacobian of the same shape: a dropped class keeps its place with weight 0.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(jacobian.eliminate(jnp.array([False, True, True])).as_matrix())
            [[ 0.     0.     0.   ]
             [ 0.     0.125 -0.125]
             [ 0.    -0.125  0.125]]
        """
        keep = self._mask("eliminate", mask)
        return self._with(jnp.where(keep, self.weights, 0), self.sink)

    def merge(self, segment_ids: Shaped[ArrayLike, " n"], num_segments: int) -> SimplexJacobian:
        """Aᵀ C A for the 0-1 matrix A that assigns each class to a segment: weights are summed.

        Args:
            segment_ids: the segment of each class, n integers. A class whose id lies outside
                [0, num_segments) is left out, as by `restrict`.
            num_segments: the number of segments, 0 or more.

        Returns:
            A Jacobian with weights of shape [..., num_segments].

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(jacobian.merge(jnp.array([0, 1, 1]), 2).weights)
            [0.5 0.5]
        """
        self._whole("merge")
        function, n = "SimplexJacobian.merge", self.weights.shape[-1]
        ids, count = class_ids.segments(function, segment_ids, num_segments, n)
        weights, dropped = formulas.merged(self.weights, ids, count=count)
        return SimplexJacobian(weights, self.sink + dropped)

    def __mul__(self, factor: Shaped[ArrayLike, "..."]) -> SimplexJacobian:
        """c C for a number c ≥ 0, or one for each row; a negative one in an array makes NaN."""
        c = self._per_row("__mul__", "factor", factor)
        c = jnp.where(c >= 0, c, jnp.nan)
        return self._with(c[..., None] * self.weights, c * self.sink)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Shaped[ArrayLike, "..."]) -> SimplexJacobian:
        """C / c for a number c > 0, or one for each row; one in an array that is not makes NaN."""
        function, rows = "SimplexJacobian.__truediv__", self.sink.shape
        c = options.positive(function, "divisor", divisor, rows, "the shape of the batch")
        c = jnp.where(c > 0, c, jnp.nan).astype(self.weights.dtype)
        weights = formulas.quotient(self.weights, c[..., None])
        return self._with(weights, formulas.quotient(self.sink, c))

    def __getitem__(self, index: Any) -> SimplexJacobian:
        """The Jacobians of some rows: an index of the batch axes, as of an array of that shape.

        Args:
            index: an integer, a slice, an array of integers or booleans, None, an Ellipsis, or a
                tuple of such.

        Returns:
            Jacobians with the batch that the index makes of the old one.

        Raises:
            IndexError: the index reaches the matrices, or a number lies outside of its axis (as
                in every array of JAX, one in an array is clamped).

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.softmax_jacobian(jnp.zeros((5, 4, 3)))
            >>> print(jacobian[0].shape, jacobian[:, -1].shape, jacobian[..., None, 1:].shape)
            (4, 3, 3) (5, 3, 3) (5, 1, 3, 3, 3)
        """
        index = batch_index(index, self.shape)
        return self._with(self.weights[(*index, slice(None))], self.sink[index])

    def __iter__(self) -> Iterator[SimplexJacobian]:
        """The Jacobians along the first batch axis; `TypeError` for one matrix."""
        return (self[i] for i in range(len(self)))

    # ------------------------------------------------------------------------ beyond the linear

    def second(
        self, u: Shaped[ArrayLike, "..."], v: Shaped[ArrayLike, "..."]
    ) -> Float[Array, "*batch n"]:
        """The second derivative of softmax in two directions of the logits.

            D² softmax[u, v] = p ∘ ((u - ū)(v - v̄) - Cov(u, v)),    ū = ⟨p, u⟩

        divided by T² at a temperature T, for which 1 / t is taken. So it is the derivative of C v
        in the direction u where C comes from `softmax_jacobian`, with mask, sink and temperature,
        but not after `restrict`, `eliminate` or a product with a number.

        Args:
            u: a direction, broadcastable to [..., n].
            v: likewise.

        Returns:
            The second derivative of the probabilities, shape [..., n].

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> e = jnp.array([0.0, 1.0, 0.0])
            >>> print(jacobian.second(e, e))
            [-0.0625   0.09375 -0.03125]
        """
        u, v = self._vector("second", "u", u), self._vector("second", "v", v)
        return formulas.second(self.weights, self.sink, u, v, self._mesh("second"))

    def certificate(
        self, radius: Shaped[ArrayLike, "..."]
    ) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
        """The exact range of every probability when no logit moves by more than the radius.

            p / (p + e^{2r} (1 - p)) ≤ softmax(x + δ) ≤ p / (p + e^{-2r} (1 - p)),    ‖δ‖_∞ ≤ r

        each bound being attained. At a temperature T, for which 1 / t is taken, r / T replaces r. A
        sink does not move: its factor is e^r.

        Args:
            radius: r ≥ 0, a number or one for each row, broadcastable to [...]; a negative one in
                an array makes its row NaN.

        Returns:
            The smallest and the largest probabilities, each of shape [..., n].

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.5]), jnp.array(0.0))
            >>> low, high = jacobian.certificate(0.5)
            >>> print(*(f"{x:.4f}" for x in (*low, *high)))
            0.2689 0.2689 0.7311 0.7311
        """
        radius = self._per_row("certificate", "radius", radius)
        return formulas.certificate(self.weights, self.sink, radius, self._mesh("certificate"))

    def _with(self, weights: Array, sink: Array) -> SimplexJacobian:
        return SimplexJacobian(weights, sink, self.axis_name)


def _flatten_with_keys(jacobian: SimplexJacobian) -> Any:
    names = "weights", "sink"
    leaves = tuple((jax.tree_util.GetAttrKey(name), getattr(jacobian, name)) for name in names)
    return leaves, jacobian.axis_name


# By hand, since JAX rebuilds a tree with leaves of any kind, which `__post_init__` would refuse.
def _unflatten(axis_name: validation.AxisName, leaves: Any) -> SimplexJacobian:
    jacobian = object.__new__(SimplexJacobian)
    weights, sink = leaves
    vars(jacobian).update(weights=weights, sink=sink, axis_name=axis_name)
    return jacobian


jax.tree_util.register_pytree_with_keys(SimplexJacobian, _flatten_with_keys, _unflatten)


# A program that takes or returns Jacobians can be written to a file (`jax.export`): the arrays are
# its inputs and outputs, so only the name of the axis is written.
def _written(axis_name: validation.AxisName) -> bytes:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(
            "SimplexJacobian: axis_name must be None, a string or a tuple of strings to be "
            f"serialized, got {axis_name!r}"
        )
    return json.dumps(axis_name).encode()


def _read(written: bytes) -> validation.AxisName:
    axis_name = json.loads(written)
    return tuple(axis_name) if isinstance(axis_name, list) else axis_name


export.register_pytree_node_serialization(
    SimplexJacobian,
    serialized_name="jaxsoft.SimplexJacobian",
    serialize_auxdata=_written,
    deserialize_auxdata=_read,
)
