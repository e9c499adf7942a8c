"""The linear algebra of C(s, s0), each method by its formula: the base of SimplexJacobian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import class_ids, options, validation
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.devices import Mesh
from jaxsoft._core.sizes import known
from jaxsoft._simplex import eigenvalues, factors, formulas, inverse, spectrum
from jaxsoft._simplex.stack import MatrixStack

# In messages, the shapes to which arguments are broadcast.
OF_ROWS = "the shape of the weights without n"
OF_CLASSES = "the shape of the weights"


class SimplexMatrix(MatrixStack):
    """The methods of a symmetric matrix, C = diag(s) - s sᵀ / t, for a class that holds s and s0.

    They check what they are given and leave the rest to the modules of formulas.
    """

    # ------------------------------------------------------------------------ products, entries

    def mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """The product C v = s ∘ (v - ⟨s, v⟩ / t).

        Args:
            v: a tangent or, C being symmetric, a cotangent, broadcastable to [..., n].

        Returns:
            The product, shape [..., n].

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.softmax_jacobian(jnp.array([20.0, 0.0]))
            >>> print(*(f"{x:.4g}" for x in jacobian.mv(jnp.array([1.0, 0.0]))))
            2.061e-09 -2.061e-09
        """
        v, mesh = self._vector("mv", "v", v), self._mesh("mv")
        return formulas.product(self.weights, self.sink, v, mesh)

    def as_matrix(self) -> Float[Array, "*batch n n"]:
        """C itself, shape [..., n, n], symmetric to the bit. Nothing else makes an n x n array."""
        self._whole("as_matrix")
        return formulas.matrix(self.weights, self.sink)

    def row(self, i: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """One row of C, which is a column too: what class i does to the others.

        Args:
            i: an integer in [0, n), or integers broadcastable to [...], one for each row of the
                batch; where such a one lies outside [0, n), the result is NaN.

        Returns:
            C[..., i, :], shape [..., n].

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(jacobian.row(0))
            [ 0.25  -0.125 -0.125]
        """
        mesh = self._mesh("row")
        n = ClassAxis(-1, mesh).count(self.weights)
        i = class_ids.one_class("SimplexJacobian.row", "i", i, n, self.sink.shape)
        return formulas.row(self.weights, self.sink, i, mesh=mesh)

    def diagonal(self) -> Float[Array, "*batch n"]:
        """The diagonal s (1 - s / t), shape [..., n], with 1 - s / t as the sum of the others."""
        return formulas.diagonal(self.weights, self.sink, self._mesh("diagonal"))

    def trace(self) -> Float[Array, "*batch"]:
        """The trace Σ s (1 - s / t), shape [...]; for softmax 1 - Σ p²."""
        return formulas.trace(self.weights, self.sink, self._mesh("trace"))

    def quadratic_form(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch"]:
        """vᵀ C v = ½ Σ_ij s_i s_j (v_i - v_j)² / t; for softmax the variance of v under p.

        Args:
            v: broadcastable to [..., n]; a sink counts as a class with v = 0.

        Returns:
            The form, shape [...], never negative.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.5]), jnp.array(0.0))
            >>> print(jacobian.quadratic_form(jnp.array([1001.0, 1000.0])))
            0.25
        """
        v, mesh = self._vector("quadratic_form", "v", v), self._mesh("quadratic_form")
        return formulas.quadratic_form(self.weights, self.sink, v, mesh)

    # ----------------------------------------------------------------------- norms and spectrum

    def norm(self, ord: Literal[1, 2, "fro"] | float = 2) -> Float[Array, "*batch"]:
        """A matrix norm.

            ‖C‖_2 = λ_1, the largest eigenvalue, by a fixed number of steps on the secular equation
            ‖C‖_1 = ‖C‖_∞ = max_i s_i (2 Σ_{j≠i} s_j + s0) / t
            ‖C‖_F² = Σ_i (s_i / t)² ((t - s_i)² + Σ_{j≠i} s_j²)

        Args:
            ord: 2 (the default), 1, inf or "fro".

        Returns:
            The norm, shape [...]; 0 for no class.

        Raises:
            ValueError: `ord` is none of these.

        Numerics:
            ‖C‖_2 errs by at most 2e-15 (float64) or 3e-7 (float32), relative, for the given
            weights. Its derivative is vᵀ dC v for the unit eigenvector v; where three classes or
            more share the largest weight, so that the eigenvalue is multiple, it is the mean over
            the eigenvectors, and the second derivative is NaN.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(*(f"{jacobian.norm(ord):.4f}" for ord in (2, 1, "fro")))
            0.3750 0.5000 0.4507
        """
        if ord == 2:
            self._whole("norm(2)")
            return spectrum.largest_eigenvalue(self.weights, self.sink)
        if ord in (1, np.inf):
            return formulas.norm_inf(self.weights, self.sink, self._mesh("norm"))
        if ord == "fro":
            return formulas.norm_frobenius(self.weights, self.sink, self._mesh("norm"))
        raise ValueError(f"SimplexJacobian.norm: ord must be 1, 2, inf or 'fro', got {ord!r}")

    def norm_bounds(self) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """s2 (1 + (s1 - s2) / t) ≤ ‖C‖_2 ≤ s1 (t - s1 + s2) / t, without an iteration.

        s1 ≥ s2 are the two largest weights.

        Returns:
            The lower and the upper bound, each of shape [...]; the upper is at most twice ‖C‖_2.
            For two classes without a sink both are equal to it.
        """
        self._whole("norm_bounds")
        return spectrum.bounds(self.weights, self.sink)

    def eigh_max(self) -> tuple[Float[Array, "*batch"], Float[Array, "*batch n"]]:
        """The largest eigenvalue and its unit eigenvector.

        Returns:
            λ_1, shape [...], as `norm(2)`; and v, shape [..., n], with C v = λ_1 v and ‖v‖ = 1,
            positive at the largest weight (of equals the first), elsewhere 0 or less.

        Raises:
            ValueError: there is no class.

        Numerics:
            Where three classes or more share the largest weight the eigenvector may turn, and its
            derivative is NaN, in that row alone. Where C = 0, v is the class of the largest weight
            and has the derivative 0.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.5]), jnp.array(0.0))
            >>> value, vector = jacobian.eigh_max()
            >>> print(f"{value:.4f}", *(f"{x:.4f}" for x in vector))
            0.5000 0.7071 -0.7071
        """
        self._whole("eigh_max")
        if not self.weights.shape[-1]:
            raise ValueError("SimplexJacobian.eigh_max: weights must have a class or more, got 0")
        return spectrum.largest_eigenpair(self.weights, self.sink)

    def eigvalsh(self) -> Float[Array, "*batch n"]:
        """All eigenvalues, by the secular equation in O(n²) time and O(n) memory.

        They interlace with the weights in descending order, s_k ≥ λ_k ≥ s_{k+1}, and without a sink
        the least is 0.

        Returns:
            The eigenvalues, ascending, shape [..., n], each to its own last digits.

        Numerics:
            An eigenvalue between weights that tie, or one that is 0, has the mean derivative over
            its eigenvectors; of the former there is no second derivative (NaN).

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(*(f"{x:.4f}" for x in jacobian.eigvalsh()))
            0.0000 0.2500 0.3750
        """
        self._whole("eigvalsh")
        return eigenvalues.eigenvalues(self.weights, self.sink)

    def effective_rank(self) -> Float[Array, "*batch"]:
        """tr(C)² / ‖C‖_F², shape [...]: how many equal eigenvalues would do; 0 where C = 0."""
        return formulas.effective_rank(self.weights, self.sink, self._mesh("effective_rank"))

    # ------------------------------------------------------------------ inverse and determinant

    def solve(
        self, b: Shaped[ArrayLike, "..."], damping: Shaped[ArrayLike, "..."] = 0.0
    ) -> Float[Array, "*batch n"]:
        """Solves (C + λ I) x = b; with damping λ = 0 by the pseudo-inverse, x = C⁺ b.

            x = α ∘ b + α ∘ s ⟨α ∘ s, b⟩ / (λ ⟨α, s⟩ + s0),    α = 1 / (s + λ)
            C⁺ = H diag(1/s) H,  H = I - 1 1ᵀ / n          (λ = s0 = 0)

        Args:
            b: the right-hand side, broadcastable to [..., n].
            damping: λ ≥ 0, a number or one for each row of the batch, broadcastable to [...]; a
                negative one in an array makes its row NaN.

        Returns:
            x, shape [..., n]. With λ = 0 it is 0 at the classes of weight 0, over which H takes no
            mean.

        Numerics:
            The slopes by weights are as large as b / s², and beyond the range of float32 where s
            is less than 1e-19: there the change in forward mode is right, reverse mode is not.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> print(jacobian.solve(jnp.array([0.25, -0.125, -0.125])).round(4))
            [ 0.6667 -0.3333 -0.3333]
        """
        b, shift = self._vector("solve", "b", b), self._damping("solve", damping)
        return inverse.solve(self.weights, self.sink, b, shift, self._mesh("solve"))

    def slogdet(
        self, damping: Shaped[ArrayLike, "..."] = 0.0
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """Sign and logarithm of det(C + λ I), as `numpy.linalg.slogdet`.

            det(C + λ I) = Π (s + λ) · (λ Σ s / (s + λ) + s0) / t

        With damping λ = 0 it is the pseudo-determinant, the product of the eigenvalues other than
        0: n Π s / t without a sink, s0 Π s / t with one.

        Args:
            damping: λ, as in `solve`.

        Returns:
            The sign, which is 1, and the logarithm, each of shape [...]. With λ = 0 classes of
            weight 0 do not count, and the determinant of C = 0 is 1.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.25, 0.25]), jnp.array(0.0))
            >>> sign, logarithm = jacobian.slogdet()
            >>> print(sign, f"{jnp.exp(logarithm):.5f}")  # 3 · 0.5 · 0.25 · 0.25
            1.0 0.09375
        """
        self._whole("slogdet")
        shift = self._damping("slogdet", damping)
        logarithm = inverse.log_determinant(self.weights, self.sink, shift)
        return jnp.where(jnp.isnan(logarithm), logarithm, 1), logarithm

    # ---------------------------------------------------------------------------------- factors

    def sqrt_mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """B v with a square root of C, B Bᵀ = C.

            B = diag(√s) - s √sᵀ / (t + √(t s0))

        Args:
            v: broadcastable to [..., n].

        Returns:
            The product, shape [..., n].
        """
        v, mesh = self._vector("sqrt_mv", "v", v), self._mesh("sqrt_mv")
        return factors.root_product(self.weights, self.sink, v, mesh)

    def sqrt_T_mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """Bᵀ v with the B of `sqrt_mv`: ‖Bᵀ v‖² = vᵀ C v.

        Args:
            v: broadcastable to [..., n].

        Returns:
            The product, shape [..., n].
        """
        v, mesh = self._vector("sqrt_T_mv", "v", v), self._mesh("sqrt_T_mv")
        return factors.root_transposed_product(self.weights, self.sink, v, mesh=mesh)

    def rank_factor(self) -> factors.RankFactor:
        """F of n - 1 columns with F Fᵀ = C, as an operator of n numbers.

        Returns:
            An operator with the methods `mv` (of n - 1 numbers), `T_mv` and `as_matrix`, of which
            only the last makes an array [..., n, n - 1]. With a sink C has the rank n and no such
            F: then all of the row is NaN, and `sqrt_mv` is the factor to take.

        Raises:
            ValueError: there are fewer than two classes, and C is 0.

        Example:
            >>> import jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.SimplexJacobian(jnp.array([0.5, 0.5]), jnp.array(0.0))
            >>> print(jacobian.rank_factor().as_matrix().round(4))
            [[ 0.5]
             [-0.5]]
        """
        self._whole("rank_factor")
        n = self.weights.shape[-1]
        if known(lambda: n < 2, False):
            raise ValueError(
                f"SimplexJacobian.rank_factor: weights must have two classes or more, got {n}"
            )
        defined = jnp.where(self.sink == 0, 1, jnp.nan).astype(self.weights.dtype)
        return factors.RankFactor(defined[..., None] * self.weights)

    def cholesky_mv(self, v: Shaped[ArrayLike, "..."]) -> Float[Array, "*batch n"]:
        """L v with the Cholesky factor of C, L Lᵀ = C and L lower triangular.

            L = (I - [i > j] s_i / q_j) diag(√(s_j q_j / q_{j-1})),    q_j = Σ_{k>j} s_k + s0

        Args:
            v: broadcastable to [..., n].

        Returns:
            The product, shape [..., n]. Without a sink the last column of L is 0.
        """
        self._whole("cholesky_mv")
        v = self._vector("cholesky_mv", "v", v)
        return factors.cholesky_product(self.weights, self.sink, v)

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Float[Array, "*shape n"]:
        """Samples of the normal distribution with mean 0 and covariance C.

        Args:
            key: a key of `jax.random`.
            shape: how many samples, in as many axes, of each row of the batch.

        Returns:
            B ε for standard normal ε and the B of `sqrt_mv`, shape [*shape, ..., n]; differentiable
            by the weights. Without a sink every sample sums to 0.

        Raises:
            TypeError: `shape` is not a sequence of integers.

        Example:
            >>> import jax, jax.numpy as jnp, jaxsoft
            >>> jacobian = jaxsoft.softmax_jacobian(jnp.zeros((2, 3)))
            >>> print(jacobian.sample(jax.random.key(0), (1000,)).shape)
            (1000, 2, 3)
        """
        self._whole("sample")
        size = (*validation.sizes("SimplexJacobian.sample", "shape", shape), *self.weights.shape)
        noise = jax.random.normal(key, size, self.weights.dtype)
        weights = jnp.broadcast_to(self.weights, size)
        return factors.root_product(weights, jnp.broadcast_to(self.sink, size[:-1]), noise)

    # --------------------------------------------------------------------------------- arguments

    def _mesh(self, method: str) -> Mesh | None:
        return validation.mesh(f"SimplexJacobian.{method}", self.axis_name)

    def _whole(self, method: str) -> None:
        """Raises `ValueError` for what is no sum over the classes, if these are divided."""
        validation.undivided(f"SimplexJacobian.{method}", self.axis_name)

    def _vector(self, method: str, argument: str, value: Any) -> Array:
        function = f"SimplexJacobian.{method}"
        value = validation.floating(function, argument, value)
        value = validation.broadcast(function, argument, value, self.weights.shape, OF_CLASSES)
        return value.astype(self.weights.dtype)

    def _mask(self, method: str, value: Any) -> Array:
        function, shape = f"SimplexJacobian.{method}", self.weights.shape
        return validation.boolean(function, "mask", value, shape, OF_CLASSES)

    def _per_row(self, method: str, argument: str, value: Any) -> Array:
        function = f"SimplexJacobian.{method}"
        value = options.non_negative(function, argument, value, self.sink.shape, OF_ROWS)
        return value.astype(self.weights.dtype)

    def _damping(self, method: str, value: Any) -> Array | None:
        """None for the number 0, with which only the pseudo-inverse is computed."""
        array = self._per_row(method, "damping", value)
        return None if isinstance(value, (int, float)) and value == 0 else array
