"""SimplexJacobian as a `lineax` operator, and the solver for it."""

from typing import Any, TypeAlias

import jax
from jaxtyping import Array, ArrayLike, Float

from jaxsoft._core import options
from jaxsoft._simplex import formulas
from jaxsoft._simplex.operator import SimplexJacobian

try:
    import lineax as lx
except ModuleNotFoundError as error:
    raise ImportError(
        'jaxsoft.lineax needs lineax: pip install ".[lineax]" in a checkout of the repository'
    ) from error

# The Jacobian, and the number that the solver adds to its diagonal.
_State: TypeAlias = tuple[SimplexJacobian, ArrayLike]


class SimplexOperator(lx.AbstractLinearOperator):
    """The Jacobian of softmax at one row, as a linear operator of lineax.

        C = diag(s) - s sᵀ / (Σs + s0)

    It composes with the operators of lineax: sums, products, scaling, tags, and products with the
    `lineax.JacobianLinearOperator` of a model. Products with vectors, the diagonal and the
    tridiagonal take O(n); only `as_matrix` and `lineax.materialise` make an n x n array. lineax
    knows it as symmetric and positive semidefinite, never as diagonal, tridiagonal or triangular.

    Attributes:
        jacobian: the Jacobian of one row, weights of shape [n]. For a batch, `jax.vmap` a function
            that makes the operator.

    Raises:
        TypeError: `jacobian` is not a `SimplexJacobian`.
        ValueError: it has batch axes.

    Example:
        >>> import jax.numpy as jnp, lineax as lx
        >>> from jaxsoft import softmax_jacobian
        >>> from jaxsoft.lineax import SimplexOperator
        >>> operator = SimplexOperator(softmax_jacobian(jnp.log(jnp.array([0.5, 0.25, 0.25]))))
        >>> print(operator.mv(jnp.array([1.0, 0.0, 0.0])))
        [ 0.25  -0.125 -0.125]
        >>> scale = lx.DiagonalLinearOperator(jnp.array([1.0, 2.0, 2.0]))
        >>> print((scale @ operator @ scale).as_matrix())
        [[ 0.25 -0.25 -0.25]
         [-0.25  0.75 -0.25]
         [-0.25 -0.25  0.75]]
    """

    jacobian: SimplexJacobian

    def __check_init__(self) -> None:
        if not isinstance(self.jacobian, SimplexJacobian):
            raise TypeError(
                "SimplexOperator: jacobian must be a SimplexJacobian, "
                f"got {type(self.jacobian).__name__}"
            )
        shape = self.jacobian.weights.shape
        if len(shape) != 1:
            raise ValueError(
                "SimplexOperator: jacobian must have weights of shape [n], for a batch inside "
                f"jax.vmap, got {shape}"
            )

    def mv(self, vector: Float[ArrayLike, " n"]) -> Float[Array, " n"]:
        """The product C v, in O(n)."""
        return self.jacobian.mv(vector)

    def as_matrix(self) -> Float[Array, "n n"]:
        """C itself, an n x n array."""
        return self.jacobian.as_matrix()

    def transpose(self) -> "SimplexOperator":
        """The operator itself: C is symmetric."""
        return self

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """Shape [n] and the dtype of the weights."""
        return jax.ShapeDtypeStruct(self.jacobian.weights.shape, self.jacobian.dtype)

    out_structure = in_structure


lx.diagonal.register(SimplexOperator, lambda operator: operator.jacobian.diagonal())

for _same in (lx.linearise, lx.conj):
    _same.register(SimplexOperator, lambda operator: operator)

for _holds in (lx.is_symmetric, lx.is_positive_semidefinite):
    _holds.register(SimplexOperator, lambda operator: True)

# False also where n is 1 or 2 or C is 0: lineax would take the operator apart.
for _fails in (
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
):
    _fails.register(SimplexOperator, lambda operator: False)


@lx.materialise.register(SimplexOperator)
def _(operator: SimplexOperator) -> lx.MatrixLinearOperator:
    return lx.MatrixLinearOperator(operator.as_matrix(), lx.positive_semidefinite_tag)


@lx.tridiagonal.register(SimplexOperator)
def _(operator: SimplexOperator) -> tuple[Array, Array, Array]:
    s = operator.jacobian.weights
    _, a, _ = formulas.fractions(s, operator.jacobian.sink)
    beside = -s[:-1] * a[1:]
    return operator.jacobian.diagonal(), beside, beside


# lineax differentiates x = A⁺ b by x' = A⁺ (b' - A' x) and, for a solver that does not assume full
# rank, by two terms more. These vanish here: the kernel of C is the same at all logits (the
# constants on the support, and the masked classes), so that C' is 0 on it and does not lead into
# it, C' (b - C x) = 0 and (I - C⁺ C) C' = 0. With a damping λ the matrix has full rank, but lineax
# takes C for it rather than C + λ I, so that the two terms would be wrong. Hence the last method.
class SimplexSolver(lx.AbstractLinearSolver[_State]):
    """The solver of lineax for `SimplexOperator`, in O(n).

        (C + λ I) x = b, with damping λ = 0 the pseudo-inverse: x = C⁺ b

    C is singular unless there is a sink, and lineax's own solver for a positive semidefinite
    operator, Cholesky, then fails. This one solves with a `SimplexOperator`, with tags or without,
    or with its sum with a multiple of the identity, C + λ I. It is differentiable in the vector
    and in the operator, in forward and reverse mode, so that the second form gives the derivative
    by λ; lineax refuses that by the damping of a solver.

    Attributes:
        damping: λ ≥ 0, a number. As an array it may be traced; where it is 0 the result is that
            of the pseudo-inverse.

    Raises:
        TypeError: `damping` is not a real number.
        ValueError: it is negative or not a scalar; in `lineax.linear_solve`, the operator is of
            another kind.

    Example:
        >>> import jax.numpy as jnp, lineax as lx
        >>> from jaxsoft import softmax_jacobian
        >>> from jaxsoft.lineax import SimplexOperator, SimplexSolver
        >>> operator = SimplexOperator(softmax_jacobian(jnp.log(jnp.array([0.5, 0.25, 0.25]))))
        >>> b = jnp.array([0.25, -0.125, -0.125])
        >>> print(lx.linear_solve(operator, b, SimplexSolver()).value.round(4))
        [ 0.6667 -0.3333 -0.3333]
        >>> print(lx.linear_solve(operator, b, SimplexSolver(damping=0.125)).value.round(4))
        [ 0.5  -0.25 -0.25]
    """

    damping: ArrayLike = 0.0

    def __check_init__(self) -> None:
        options.non_negative("SimplexSolver", "damping", self.damping, (), "a scalar")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Takes the Jacobian and the multiple of the identity out of the operator."""
        jacobian, multiple = _parts(operator)
        if jacobian is None:
            raise _unsolvable(operator)
        return jacobian, self.damping + multiple

    def compute(
        self, state: _State, vector: Float[Array, " n"], options: dict[str, Any]
    ) -> tuple[Float[Array, " n"], lx.RESULTS, dict[str, Any]]:
        """Solves, in O(n)."""
        jacobian, damping = state
        # `Any`, for a type checker takes the items of this enumeration for strings.
        result: Any = lx.RESULTS.successful
        return jacobian.solve(vector, damping), result, {}

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The state itself: C is symmetric."""
        return state, options

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The state itself: C is real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """True: the derivative needs no terms for a change of rank, since none happens."""
        return True


def _parts(operator: lx.AbstractLinearOperator) -> tuple[SimplexJacobian | None, Array | float]:
    """The Jacobian and the multiple of the identity of which an operator is the sum."""
    if isinstance(operator, lx.TaggedLinearOperator):
        return _parts(operator.operator)
    if isinstance(operator, SimplexOperator):
        return operator.jacobian, 0.0
    if isinstance(operator, lx.IdentityLinearOperator):
        return None, 1.0
    if isinstance(operator, lx.MulLinearOperator | lx.DivLinearOperator):
        divided = isinstance(operator, lx.DivLinearOperator)
        factor = 1 / operator.scalar if divided else operator.scalar
        jacobian, multiple = _parts(operator.operator)
        return (None if jacobian is None else factor * jacobian), factor * multiple
    if isinstance(operator, lx.AddLinearOperator):
        (one, first), (other, second) = _parts(operator.operator1), _parts(operator.operator2)
        if one is None or other is None:
            return (other if one is None else one), first + second
    raise _unsolvable(operator)


def _unsolvable(operator: lx.AbstractLinearOperator) -> ValueError:
    return ValueError(
        "SimplexSolver: operator must be a SimplexOperator, a multiple of one, or its sum with a "
        f"multiple of lineax.IdentityLinearOperator, got {type(operator).__name__}; for others "
        "take an iterative solver such as lineax.CG"
    )
