"""The Jacobian of softmax as an operator of n numbers: SimplexJacobian and what makes it."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft import _checks, _eigenvalues, _factors, _simplex, _spectrum
from jaxsoft._softmax import softmax


@final
@dataclasses.dataclass(frozen=True, eq=False)
class SimplexJacobian:
    r"""The Jacobian of softmax and of its whole family, as an operator of n numbers.

        C = diag(s) - s sᵀ / t,    t = Σs + s0

    With s = p and s0 = 0 this is the Jacobian of softmax at probabilities p; at a temperature T it
    has s = p / T, with a sink s0 = p_sink / T; a masked class has weight 0. C is symmetric and
    positive semidefinite, and C 1 = s0 s / t. Every method works along the last axis, for each row
    of the leading axes apart, in O(n) time and memory but for `as_matrix`. All are differentiable
    in every mode where the quantity is.

    Immutable, and a pytree: it passes through `jax.jit`, `jax.vmap` and `jax.grad`.

    Attributes:
        weights: s ≥ 0, shape [..., n], float32 or wider.
        sink: s0 ≥ 0, shape [...] (broadcast to it).

    Raises:
        TypeError: an attribute is complex or not an array.
        ValueError: `weights` has no axis, or `sink` does not broadcast to the rows.

    Numerics:
        1 - p is never formed: it is the sum of the others. So a row in which one probability
        rounds to 1 is as exact as any other, if the weights are those of `softmax_jacobian`.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> jacobian = jaxsoft.softmax_jacobian(jnp.array([20.0, 0.0, 0.0]))
        >>> print(f"{jacobian.trace():.4g} {jacobian.norm(2):.4g}")
        8.245e-09 6.183e-09
        >>> print(jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0)).as_matrix())
        [[ 0.25   -0.125  -0.125 ]
         [-0.125   0.1875 -0.0625]
         [-0.125  -0.0625  0.1875]]

    Source: Tanabe & Sagae 1992 (inverse and Cholesky factor); Golub 1973 (the secular equation of
    the spectrum).
    """

    weights: Float[Array, "*batch n"]
    sink: Float[Array, "*batch"]

    # numpy leaves `array * J` to this class.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        name = "SimplexJacobian"
        weights = _checks.floating(name, "weights", self.weights)
        if not weights.ndim:
            raise ValueError(f"{name}: weights must have shape [..., n], got ()")
        weights = weights.astype(_wide(weights.dtype))
        sink = _checks.floating(name, "sink", self.sink).astype(weights.dtype)
        batch = weights.shape[:-1]
        sink = _checks.broadcast(name, "sink", sink, batch, "the shape of the weights without n")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "sink", sink)

    def mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """The product C v."""
        return _simplex.product(self.weights, self.sink, self._vector("mv", "v", v))

    @property
    def T(self) -> "SimplexJacobian":
        """The transpose: C is symmetric."""
        return self

    def as_matrix(self) -> Float[Array, "*batch n n"]:
        """C itself, symmetric to the bit. The only method that makes an n x n array."""
        return _simplex.matrix(self.weights, self.sink)

    def row(self, i: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """Row i of C, which is column i too; NaN for a class outside [0, n) given as an array."""
        n, batch = self.weights.shape[-1], self.sink.shape
        i = _checks.classes("SimplexJacobian.row", "i", i, n, batch)
        return _simplex.row(self.weights, self.sink, i)

    def diagonal(self) -> Float[Array, "*batch n"]:
        """The diagonal s (1 - s / t)."""
        return _simplex.diagonal(self.weights, self.sink)

    def trace(self) -> Float[Array, "*batch"]:
        """The trace."""
        return _simplex.trace(self.weights, self.sink)

    def quadratic_form(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch"]:
        """vᵀ C v = ½ Σ s_i s_j (v_i - v_j)² / t without a sink: the variance of v. Never < 0."""
        v = self._vector("quadratic_form", "v", v)
        return _simplex.quadratic_form(self.weights, self.sink, v)

    def norm(self, ord: Literal[1, 2, "fro"] | float = 2) -> Float[Array, "*batch"]:
        """A norm of C: 2 is the largest eigenvalue, 1 and inf the largest absolute row sum.

        The 2-norm solves the secular equation by a fixed number of steps. Its derivative is vᵀ dC v
        for the unit eigenvector v; where three classes or more share the largest weight, so that
        the eigenvalue is multiple, it is the mean over the eigenvectors.
        """
        if ord == 2:
            return _spectrum.largest_eigenvalue(self.weights, self.sink)
        if ord in (1, np.inf):
            return _simplex.norm_inf(self.weights, self.sink)
        if ord == "fro":
            return _simplex.norm_frobenius(self.weights, self.sink)
        raise ValueError(f"SimplexJacobian.norm: ord must be 1, 2, inf or 'fro', got {ord!r}")

    def norm_bounds(self) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """s2 (1 + (s1 - s2) / t) ≤ ‖C‖_2 ≤ s1 (t - s1 + s2) / t, without an iteration.

        s1 ≥ s2 are the two largest weights.
        """
        return _spectrum.bounds(self.weights, self.sink)

    def eigh_max(self) -> tuple[Float[Array, "*batch"], Float[Array, "*batch n"]]:
        """The largest eigenvalue and its unit eigenvector, positive at the largest weight.

        The derivative of the vector is NaN where three classes or more share the largest weight:
        there the eigenvector may turn. Raises `ValueError` where there is no class.
        """
        if not self.weights.shape[-1]:
            raise ValueError("SimplexJacobian.eigh_max: weights must have a class or more, got 0")
        return _spectrum.largest_eigenpair(self.weights, self.sink)

    def eigvalsh(self) -> Float[Array, "*batch n"]:
        """All eigenvalues, ascending, in O(n²) time and O(n) memory.

        They interlace with the weights. One between weights that tie, or one that is 0, has the
        mean derivative over its eigenvectors; of the former there is no second derivative (NaN).
        """
        return _eigenvalues.eigenvalues(self.weights, self.sink)

    def effective_rank(self) -> Float[Array, "*batch"]:
        """tr(C)² / ‖C‖_F²; 0 where C = 0."""
        return _simplex.effective_rank(self.weights, self.sink)

    def solve(
        self, b: Shaped[ArrayLike, "..."], damping: Shaped[ArrayLike, "..."] = 0.0
    ) -> Float[Array, "*batch n"]:
        """(C + λ I)⁻¹ b, with damping λ = 0 the pseudo-inverse C⁺ b.

        The damping is one number, or one for each row; a negative one in an array makes its row
        NaN.
        """
        b, shift = self._vector("solve", "b", b), self._damping("solve", damping)
        return _simplex.solve(self.weights, self.sink, b, shift)

    def slogdet(
        self, damping: Shaped[ArrayLike, "..."] = 0.0
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """Sign and logarithm of det(C + λ I), as `numpy.linalg.slogdet`.

        With damping λ = 0 it is the pseudo-determinant, the product of the eigenvalues other than
        0: k Π p without a sink, over the k classes that have a weight.
        """
        shift = self._damping("slogdet", damping)
        logarithm = _simplex.log_determinant(self.weights, self.sink, shift)
        return jnp.where(jnp.isnan(logarithm), logarithm, 1), logarithm

    def sqrt_mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """B v, with B Bᵀ = C."""
        return _factors.root_product(self.weights, self.sink, self._vector("sqrt_mv", "v", v))

    def sqrt_T_mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """Bᵀ v, with B Bᵀ = C."""
        v = self._vector("sqrt_T_mv", "v", v)
        return _factors.root_transposed_product(self.weights, self.sink, v)

    def rank_factor(self) -> Float[Array, "*batch n m"]:
        """F of n - 1 columns with F Fᵀ = C: besides `as_matrix` the only result of that size.

        C has the rank n - 1 without a sink alone: a row with a sink is NaN. Raises `ValueError`
        with one class, for which C is 0.
        """
        n = self.weights.shape[-1]
        if n < 2:
            raise ValueError(
                f"SimplexJacobian.rank_factor: weights must have two classes or more, got {n}"
            )
        return _factors.rank_factor(self.weights, self.sink)

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Float[Array, "*shape n"]:
        """Samples of the normal distribution with mean 0 and covariance C, for each row.

        The key is one of `jax.random`, the shape stands before that of the weights.
        """
        size = (*_checks.sizes("SimplexJacobian.sample", "shape", shape), *self.weights.shape)
        noise = jax.random.normal(key, size, self.weights.dtype)
        weights = jnp.broadcast_to(self.weights, size)
        return _factors.root_product(weights, jnp.broadcast_to(self.sink, size[:-1]), noise)

    def cholesky_mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """L v, with L lower triangular and L Lᵀ = C."""
        v = self._vector("cholesky_mv", "v", v)
        return _factors.cholesky_product(self.weights, self.sink, v)

    def restrict(self, mask: Shaped[ArrayLike, "..."]) -> "SimplexJacobian":
        """The principal submatrix of the classes where the mask is True; the others have weight 0.

        Their mass moves into the sink.
        """
        keep = self._mask("restrict", mask)
        dropped = jnp.sum(jnp.where(keep, 0, self.weights), -1)
        return SimplexJacobian(jnp.where(keep, self.weights, 0), self.sink + dropped)

    def eliminate(self, mask: Shaped[ArrayLike, "..."]) -> "SimplexJacobian":
        """The Schur complement on the classes where the mask is True; the others have weight 0.

        Their mass disappears: this is softmax among the classes left.
        """
        keep = self._mask("eliminate", mask)
        return SimplexJacobian(jnp.where(keep, self.weights, 0), self.sink)

    def merge(self, segment_ids: Shaped[ArrayLike, " n"], num_segments: int) -> "SimplexJacobian":
        """Aᵀ C A for the 0-1 matrix A that assigns each class to a segment: weights are summed.

        A class whose id lies outside [0, num_segments) is left out, its mass moves into the sink.
        """
        function, n = "SimplexJacobian.merge", self.weights.shape[-1]
        ids, count = _checks.segments(function, segment_ids, num_segments, n)
        weights, dropped = _simplex.merged(self.weights, ids, count=count)
        return SimplexJacobian(weights, self.sink + dropped)

    def __mul__(self, factor: Shaped[ArrayLike, "..."]) -> "SimplexJacobian":
        c = self._per_row("__mul__", "factor", factor)
        c = jnp.where(c >= 0, c, jnp.nan)
        return SimplexJacobian(c[..., None] * self.weights, c * self.sink)

    __rmul__ = __mul__

    def second(
        self, u: Shaped[ArrayLike, "..."], v: Shaped[ArrayLike, "..."]
    ) -> Float[Array, "*batch n"]:
        """The second derivative, D² softmax[u, v] = p ∘ ((u - ⟨p, u⟩)(v - ⟨p, v⟩) - Cov(u, v))."""
        u, v = self._vector("second", "u", u), self._vector("second", "v", v)
        return _simplex.second(self.weights, self.sink, u, v)

    def certificate(
        self, radius: Shaped[ArrayLike, "..."]
    ) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
        """The smallest and the largest value of every probability within a box of logits.

        No logit moves by more than the radius, the sink's not at all; each bound is attained.
        """
        radius = self._per_row("certificate", "radius", radius)
        return _simplex.certificate(self.weights, self.sink, radius)

    def _vector(self, method: str, argument: str, value: Any) -> Array:
        function = f"SimplexJacobian.{method}"
        value = _checks.floating(function, argument, value)
        shape = self.weights.shape
        value = _checks.broadcast(function, argument, value, shape, "the shape of the weights")
        return value.astype(self.weights.dtype)

    def _per_row(self, method: str, argument: str, value: Any) -> Array:
        function, wanted = f"SimplexJacobian.{method}", "the shape of the weights without n"
        value = _checks.non_negative(function, argument, value, self.sink.shape, wanted)
        return value.astype(self.weights.dtype)

    def _damping(self, method: str, value: Any) -> Array | None:
        array = self._per_row(method, "damping", value)
        return None if isinstance(value, (int, float)) and value == 0 else array

    def _mask(self, method: str, value: Any) -> Array:
        function, shape = f"SimplexJacobian.{method}", self.weights.shape
        return _checks.boolean(function, "mask", value, shape, "the shape of the weights")


def _flatten_with_keys(jacobian: SimplexJacobian) -> Any:
    keys = jax.tree_util.GetAttrKey("weights"), jax.tree_util.GetAttrKey("sink")
    return tuple(zip(keys, (jacobian.weights, jacobian.sink), strict=True)), None


# By hand, since JAX rebuilds a tree with leaves of any kind, which `__post_init__` would refuse.
def _unflatten(_: None, leaves: Any) -> SimplexJacobian:
    jacobian = object.__new__(SimplexJacobian)
    for name, leaf in zip(("weights", "sink"), leaves, strict=True):
        object.__setattr__(jacobian, name, leaf)
    return jacobian


jax.tree_util.register_pytree_with_keys(SimplexJacobian, _flatten_with_keys, _unflatten)


def softmax_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
) -> SimplexJacobian:
    r"""The Jacobian of softmax at logits x, as an operator of n numbers.

        C = (diag(p) - p pᵀ) / T,    p = softmax(x / T)

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the classes, a tuple of axes, or None for all of them. In the result it
            comes last, several axes merged into one.
        where: boolean mask, broadcastable to `x`; classes where it is False have weight 0.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        sink: an extra logit that takes mass but has no row; as in `softmax`.

    Returns:
        A `SimplexJacobian` with the other axes of `x` as its batch; float32 or wider, also where
        `x` has 16 bits.

    Raises:
        TypeError, ValueError: as `softmax`.

    Numerics:
        A row that is masked or -inf throughout has C = 0; one with NaN or +inf is NaN, and no other
        row is touched.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> jacobian = jaxsoft.softmax_jacobian(jnp.array([[0.0, 0.0], [40.0, 0.0]]))
        >>> print(*(f"{value:.4g}" for value in jacobian.norm(2)))
        0.5 8.497e-18
        >>> print(jacobian.mv(jnp.array([1.0, 0.0]))[0])
        [ 0.25 -0.25]
    """
    args = _checked("softmax_jacobian", x, axis, where, temperature, sink)
    return SimplexJacobian(*_at_logits(*args[:-1], axes=args[-1])[1:])


def softmax_and_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
) -> tuple[Float[Array, "..."], SimplexJacobian]:
    r"""softmax(x) and its Jacobian, from the same exponentials.

    Args:
        x: logits, shape [..., n, ...]; as in `softmax_jacobian`.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcastable to `x`.
        temperature: T > 0, a number or one value per row; as in `softmax`.
        sink: an extra logit that takes mass but has no row; as in `softmax`.

    Returns:
        The probabilities, as `softmax` returns them, and the `SimplexJacobian`.

    Raises:
        TypeError, ValueError: as `softmax`.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> p, jacobian = jaxsoft.softmax_and_jacobian(jnp.array([1.0, 1.0]))
        >>> print(p, jacobian.trace())
        [0.5 0.5] 0.5
    """
    args = _checked("softmax_and_jacobian", x, axis, where, temperature, sink)
    p, weights, mass = _at_logits(*args[:-1], axes=args[-1])
    return p, SimplexJacobian(weights, mass)


def _checked(
    function: str, x: Any, axis: _checks.Axis, where: Any, temperature: Any, sink: Any
) -> tuple[Any, ...]:
    x = _checks.floating(function, "x", x)
    axes = _checks.axes(function, axis, x.ndim)
    where = _checks.mask(function, where, x.shape)
    scale = _checks.temperature(function, temperature, x.shape, axes)
    return x, where, scale, _checks.per_row(function, "sink", sink, x.shape, axes), axes


@functools.partial(jax.jit, static_argnames="axes")
def _at_logits(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    sink: Array | None,
    *,
    axes: tuple[int, ...],
) -> tuple[Array, Array, Array]:
    """Probabilities as of `softmax`, and the weights and the sink of the Jacobian."""
    shape, dtype = x.shape, x.dtype
    kept = [a for a in range(x.ndim) if a not in axes]

    def classes_last(a: Array) -> Array:
        merged = math.prod(a.shape[i] for i in axes)
        return a.transpose(*kept, *axes).reshape(*(a.shape[i] for i in kept), merged)

    z = classes_last(x.astype(_wide(dtype)))
    mask = None if where is None else classes_last(where)
    scale = None if temperature is None else classes_last(temperature.astype(z.dtype))
    if sink is not None:
        # The sink is one more class, for which the temperature, which does not divide it, cancels.
        last = classes_last(sink.astype(z.dtype))
        z = jnp.concatenate([z, last if scale is None else last * scale], -1)
        mask = (
            None
            if mask is None
            else jnp.pad(mask, [(0, 0)] * len(kept) + [(0, 1)], constant_values=True)
        )
    p = softmax(z, -1, mask, temperature=1.0 if scale is None else scale)
    weights = p if scale is None else p / scale
    mass = jnp.zeros(p.shape[:-1], p.dtype)
    if sink is not None:
        p, weights, mass = p[..., :-1], weights[..., :-1], weights[..., -1]
    order = [*kept, *axes]
    back = [order.index(a) for a in range(x.ndim)]
    p = p.astype(dtype).reshape([shape[a] for a in order]).transpose(back)
    return p, weights, mass


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
