"""The Jacobian of softmax as an operator of n numbers: SimplexJacobian and what makes it."""

import dataclasses
import functools
import math
from typing import Any, Literal, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft import _checks, _factors, _simplex, _spectrum
from jaxsoft._softmax import softmax


@final
@dataclasses.dataclass(frozen=True, eq=False)
class SimplexJacobian:
    r"""The Jacobian of softmax and of its whole family, as an operator of n numbers.

        C = diag(s) - s sᵀ / (Σs + s0)

    Attributes:
        weights: s ≥ 0, shape [..., n].
        sink: s0 ≥ 0, shape [...].
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
        """One row (or column) of C."""
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
        """vᵀ C v."""
        v = self._vector("quadratic_form", "v", v)
        return _simplex.quadratic_form(self.weights, self.sink, v)

    def norm(self, ord: Literal[1, 2, "fro"] | float = 2) -> Float[Array, "*batch"]:
        """A matrix norm."""
        if ord == 2:
            return _spectrum.largest_eigenvalue(self.weights, self.sink)
        if ord in (1, np.inf):
            return _simplex.norm_inf(self.weights, self.sink)
        if ord == "fro":
            return _simplex.norm_frobenius(self.weights, self.sink)
        raise ValueError(f"SimplexJacobian.norm: ord must be 1, 2, inf or 'fro', got {ord!r}")

    def eigh_max(self) -> tuple[Float[Array, "*batch"], Float[Array, "*batch n"]]:
        """The largest eigenvalue and its unit eigenvector."""
        return _spectrum.largest_eigenpair(self.weights, self.sink)

    def effective_rank(self) -> Float[Array, "*batch"]:
        """tr(C)² / ‖C‖_F²; 0 where C = 0."""
        return _simplex.effective_rank(self.weights, self.sink)

    def solve(
        self, b: Shaped[ArrayLike, "..."], damping: Shaped[ArrayLike, "..."] = 0.0
    ) -> Float[Array, "*batch n"]:
        """(C + λ I)⁻¹ b, with damping λ = 0 the pseudo-inverse C⁺ b."""
        b, shift = self._vector("solve", "b", b), self._damping("solve", damping)
        return _simplex.solve(self.weights, self.sink, b, shift)

    def slogdet(
        self, damping: Shaped[ArrayLike, "..."] = 0.0
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """Sign and logarithm of det(C + λ I), with damping λ = 0 of the pseudo-determinant."""
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

    def cholesky_mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """L v, with L lower triangular and L Lᵀ = C."""
        v = self._vector("cholesky_mv", "v", v)
        return _factors.cholesky_product(self.weights, self.sink, v)

    def restrict(self, mask: Shaped[ArrayLike, "..."]) -> "SimplexJacobian":
        """The principal submatrix of the classes where the mask is True."""
        keep = self._mask("restrict", mask)
        dropped = jnp.sum(jnp.where(keep, 0, self.weights), -1)
        return SimplexJacobian(jnp.where(keep, self.weights, 0), self.sink + dropped)

    def eliminate(self, mask: Shaped[ArrayLike, "..."]) -> "SimplexJacobian":
        """The Schur complement on the classes where the mask is True; the others are eliminated."""
        keep = self._mask("eliminate", mask)
        return SimplexJacobian(jnp.where(keep, self.weights, 0), self.sink)

    def merge(self, segment_ids: Shaped[ArrayLike, " n"], num_segments: int) -> "SimplexJacobian":
        """Aᵀ C A with the 0-1 matrix A of a partition of the classes."""
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
        """The second derivative D² softmax[u, v]."""
        u, v = self._vector("second", "u", u), self._vector("second", "v", v)
        return _simplex.second(self.weights, self.sink, u, v)

    def certificate(
        self, radius: Shaped[ArrayLike, "..."]
    ) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
        """The exact range of every probability when no logit moves by more than the radius."""
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
    """The Jacobian of softmax at logits x."""
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
    """softmax(x) and its Jacobian, from the same exponentials."""
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
