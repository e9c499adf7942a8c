"""jaxsoft.lineax: the operator against dense matrices, and the solver in every mode."""

import runpy
import sys

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import jaxsoft.lineax
from jaxsoft import SimplexJacobian, softmax_jacobian
from jaxsoft.lineax import SimplexOperator, SimplexSolver

MASK = np.array([True, True, False, True, True])

# Each row by the options of `softmax_jacobian`; float64.
ROWS = {
    "plain": {},
    "mask": {"where": MASK},
    "temperature": {"temperature": 0.25},
    "sink": {"sink": np.array([0.5])},
    "all": {"where": MASK, "temperature": 2.0, "sink": np.array([0.5])},
}
LOGITS = np.random.default_rng(0).normal(size=5)
VECTOR = np.random.default_rng(1).normal(size=5)
DAMPINGS = (0.0, 0.125)


def dense(z, where=None, temperature=1.0, sink=None):
    """The Jacobian by its textbook formula, for JAX to differentiate."""
    z = z / temperature if where is None else jnp.where(where, z / temperature, -jnp.inf)
    p = jax.nn.softmax(z if sink is None else jnp.concatenate([z, sink]))[: len(z)]
    return (jnp.diag(p) - p[:, None] * p[None, :]) / temperature


def solved_densely(z, b, damping, options):
    matrix = dense(z, **options)
    if not isinstance(damping, float) or damping:
        return jnp.linalg.solve(matrix + damping * jnp.eye(len(b)), b)
    return jnp.linalg.pinv(matrix) @ b


def operator_at(z, options):
    return SimplexOperator(softmax_jacobian(z, **options))


def identity(operator):
    return lx.IdentityLinearOperator(operator.in_structure())


def solved(z, b, damping, options):
    return lx.linear_solve(operator_at(z, options), b, SimplexSolver(damping)).value


def solved_as_sum(z, b, damping, options):
    operator = operator_at(z, options)
    return lx.linear_solve(operator + damping * identity(operator), b, SimplexSolver()).value


def close(actual, expected, tolerance=1e-11):
    """Equal to a tolerance relative to the largest entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert abs(actual - expected).max() <= tolerance * abs(expected).max()


def random_operator(n=5, dtype=jnp.float64):
    return SimplexOperator(softmax_jacobian(jax.random.normal(jax.random.key(n), (n,), dtype)))


# ------------------------------------------------------------------------------------- operator


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_operator_is_the_dense_matrix(options):
    operator, matrix = operator_at(LOGITS, options), np.asarray(dense(LOGITS, **options))
    close(operator.mv(VECTOR), matrix @ VECTOR)
    close(operator.T.mv(VECTOR), matrix.T @ VECTOR)
    close(lx.linearise(operator).mv(VECTOR), matrix @ VECTOR)
    close(lx.conj(operator).mv(VECTOR), matrix @ VECTOR)
    close(operator.as_matrix(), matrix)
    close(lx.materialise(operator).as_matrix(), matrix)
    close(lx.diagonal(operator), np.diag(matrix))
    for part, offset in zip(lx.tridiagonal(operator), (0, -1, 1), strict=True):
        close(part, np.diag(matrix, offset))
    assert operator.in_structure() == jax.ShapeDtypeStruct((5,), jnp.float64)
    assert operator.out_structure() == operator.in_structure()


def test_every_function_of_lineax_knows_the_operator():
    dispatched = {name: f for name, f in vars(lx).items() if hasattr(f, "registry")}
    assert {"linearise", "materialise", "diagonal", "is_symmetric", "conj"} <= dispatched.keys()
    assert [name for name, f in dispatched.items() if SimplexOperator not in f.registry] == []


@pytest.mark.parametrize("n", [1, 2, 5])
def test_what_lineax_may_assume(n):
    names = [name for name in vars(lx) if name.startswith(("is_", "has_"))]
    true = {name for name in names if getattr(lx, name)(random_operator(n))}
    assert true == {"is_symmetric", "is_positive_semidefinite"}
    assert lx.is_positive_semidefinite(lx.materialise(random_operator(n)))


def test_operators_of_lineax_around_it():
    operator, v = random_operator(), jnp.asarray(VECTOR)
    c = np.asarray(operator.as_matrix())
    other = np.random.default_rng(2).normal(size=(5, 5))
    matrix, scale = lx.MatrixLinearOperator(jnp.asarray(other)), lx.DiagonalLinearOperator(v)
    close((operator @ matrix).mv(v), c @ (other @ VECTOR))
    close((matrix @ operator).T.mv(v), c @ (other.T @ VECTOR))
    close((operator + matrix).as_matrix(), c + other)
    close((operator - matrix).mv(v), (c - other) @ VECTOR)
    close((scale @ operator @ scale).as_matrix(), VECTOR[:, None] * c * VECTOR)
    close(lx.diagonal(3.0 * -operator / 2.0), -1.5 * np.diag(c))
    assert lx.is_positive_semidefinite(operator + operator)
    assert lx.is_symmetric(2.0 * operator)


def test_gauss_newton_operator_of_a_model():
    weights = np.random.default_rng(3).normal(size=(5, 3))
    x, v = jnp.arange(3.0), jnp.asarray(VECTOR[:3])

    def model(x, _):
        return jnp.tanh(jnp.asarray(weights) @ x)

    jacobian = lx.JacobianLinearOperator(model, x)
    operator = SimplexOperator(softmax_jacobian(model(x, None)))
    curvature = jacobian.T @ operator @ jacobian
    j = np.asarray(jax.jacfwd(model)(x, None))
    expected = j.T @ np.asarray(dense(model(x, None))) @ j
    close(curvature.mv(v), expected @ v)
    close(curvature.as_matrix(), expected)
    damped = lx.TaggedLinearOperator(
        curvature + 0.5 * identity(curvature), lx.positive_semidefinite_tag
    )
    step = lx.linear_solve(damped, v, lx.CG(rtol=1e-12, atol=1e-12)).value
    close(step, np.linalg.solve(expected + 0.5 * np.eye(3), v), 1e-10)


# --------------------------------------------------------------------------------------- solver


def test_default_solver_fails_on_a_singular_row():
    row = SimplexOperator(SimplexJacobian(jnp.array([0.5, 0.5]), jnp.array(0.0)))
    b = jnp.array([1.0, -1.0])
    with pytest.raises(RuntimeError, match="non-finite"):
        lx.linear_solve(row, b)
    assert lx.linear_solve(row, b, throw=False).result != lx.RESULTS.successful
    # [[1, -1], [-1, 1]] / 4 times [2, -2] is b.
    close(lx.linear_solve(row, b, SimplexSolver()).value, [2.0, -2.0], 0)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_solution(options, damping):
    expected = solved_densely(LOGITS, VECTOR, damping, options)
    tolerance = 1e-11 if damping else 1e-8
    close(solved(LOGITS, VECTOR, damping, options), expected, tolerance)
    close(solved(LOGITS, VECTOR, jnp.asarray(damping), options), expected, tolerance)
    close(solved_as_sum(LOGITS, VECTOR, damping, options), expected, tolerance)


def test_solution_with_multiples_tags_and_both_dampings():
    operator, b = random_operator(), jnp.asarray(VECTOR)
    c, unit = np.asarray(operator.as_matrix()), identity(operator)
    tagged = lx.TaggedLinearOperator(operator, lx.positive_semidefinite_tag)
    for damped, expected in [
        (tagged, c + 0.5 * np.eye(5)),
        (4.0 * operator, 4 * c + 0.5 * np.eye(5)),
        (0.25 * unit + operator, c + 0.75 * np.eye(5)),
        ((operator + unit) / 4.0 + 0.5 * unit, c / 4 + 1.25 * np.eye(5)),
    ]:
        found = lx.linear_solve(damped, b, SimplexSolver(0.5)).value
        close(found, np.linalg.solve(expected, VECTOR))


def three_ways(z, b, damping, options):
    """The pseudo-inverse, and the damping first in the solver and then in the operator."""
    of_solver = solved(z, b, 0.125, options)
    of_operator = solved_as_sum(z, b, damping, options)
    return jnp.stack([solved(z, b, 0.0, options), of_solver, of_operator])


def three_ways_densely(z, b, damping, options):
    return jnp.stack([solved_densely(z, b, d, options) for d in (0.0, 0.125, damping)])


@pytest.mark.parametrize("name", ["mask", "all"])
def test_derivatives_by_logits_vector_and_damping(name):
    def derivatives(f, jacobian):
        of_three = jacobian(lambda *args: f(*args, ROWS[name]), (0, 1, 2))
        return jax.jit(of_three)(LOGITS, VECTOR, jnp.asarray(0.125))

    expected = derivatives(three_ways_densely, jax.jacfwd)
    for jacobian in (jax.jacfwd, jax.jacrev):
        for found, wanted in zip(derivatives(three_ways, jacobian), expected, strict=True):
            close(found[0], wanted[0], 1e-8)
            close(found[1:], wanted[1:])


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_derivative_by_the_damping_of_the_solver_is_refused(derivative):
    with pytest.raises(RuntimeError, match="cannot be autodifferentiated"):
        derivative(lambda d: solved(LOGITS, VECTOR, d, {}))(0.125)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivative_by_the_logits(outer):
    def of(f):
        loss = lambda z: VECTOR @ f(z, VECTOR, 0.0, {})
        return jax.jit(outer(jax.jacrev(loss)))(LOGITS)

    close(of(solved), of(solved_densely), 1e-7)


def test_vmap_is_a_loop():
    z = jnp.asarray(np.random.default_rng(4).normal(size=(3, 5)))
    b = jnp.asarray(np.random.default_rng(5).normal(size=(3, 5)))
    damping = jnp.array([0.0, 0.25, 0.5])

    def gradient(z, b, damping):
        return jax.grad(lambda z: jnp.sum(solved(z, b, damping, {}) ** 2))(z)

    for f in (jax.jit(lambda *args: solved(*args, {})), jax.jit(gradient)):
        rows = [f(*row) for row in zip(z, b, damping, strict=True)]
        close(jax.jit(jax.vmap(f))(z, b, damping), np.stack(rows), 1e-14)
        rows = [f(z[0], b[0], d) for d in damping]
        close(jax.jit(jax.vmap(f, (None, None, 0)))(z[0], b[0], damping), np.stack(rows), 1e-14)
    batch = jax.vmap(SimplexOperator)(softmax_jacobian(z))
    found = jax.vmap(lambda operator, v: operator.mv(v))(batch, b)
    close(found, softmax_jacobian(z).mv(b), 1e-14)


def test_confident_row_in_float32():
    z, b = jnp.array([30.0, 1.0, 0.0, -2.0], jnp.float32), jnp.array([1.0, 2.0, -1.0, 0.5])
    derivative = jax.jit(jax.jacrev(lambda z, b: solved(z, b, 0.0, {}), (0, 1)))
    found = derivative(z, b.astype(jnp.float32))
    for of_float32, of_float64 in zip(found, derivative(z.astype(float), b), strict=True):
        assert of_float32.dtype == jnp.float32
        # The exponentials of the gap of 32 are off by gap/2 eps, and the rest adds a few.
        assert np.isfinite(of_float32).all()
        close(of_float32.astype(float), of_float64, 24 * np.finfo(np.float32).eps)


def test_no_array_of_n_by_n():
    n = 4096
    z, b = jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.float32)

    def loss(z, b):
        return jnp.sum(solved(z, b, 0.0, {}) ** 2) + jnp.sum(solved_as_sum(z, b, 0.1, {}) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(z, b).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * n * 4


# --------------------------------------------------------------------------------------- errors


def test_operator_refuses_what_is_not_one_row():
    # The tests check annotations at run time; here the operator's own check is to answer.
    operator = object.__new__(SimplexOperator)
    object.__setattr__(operator, "jacobian", np.eye(3))
    with pytest.raises(TypeError, match="jacobian must be a SimplexJacobian, got ndarray"):
        operator.__check_init__()
    with pytest.raises(ValueError, match=r"of shape \[n\], for a batch inside.*, got \(2, 5\)"):
        SimplexOperator(softmax_jacobian(jnp.zeros((2, 5))))


def test_solver_refuses_a_wrong_damping():
    with pytest.raises(ValueError, match=r"SimplexSolver: damping must be 0 or more, got -0\.5"):
        SimplexSolver(-0.5)
    with pytest.raises(ValueError, match=r"SimplexSolver: damping must broadcast to \(\).*\(2,\)"):
        SimplexSolver(jnp.zeros(2))
    with pytest.raises(TypeError, match="SimplexSolver: damping must be real"):
        SimplexSolver(1j)
    # The sign of what is traced is seen by lineax, in the solution.
    with pytest.raises(RuntimeError, match="non-finite"):
        solved(LOGITS, VECTOR, jnp.asarray(-0.5), {})


def test_solver_refuses_other_operators():
    operator = random_operator()
    unit = identity(operator)
    for other in (operator @ operator, operator + operator, unit + unit, -operator, 2.0 * unit):
        with pytest.raises(ValueError, match="SimplexSolver: operator must be a SimplexOperator"):
            lx.linear_solve(other, jnp.asarray(VECTOR), SimplexSolver(1.0))


@pytest.mark.parametrize("present", [False, True])
def test_without_lineax(monkeypatch, present):
    if not present:
        monkeypatch.setitem(sys.modules, "lineax", None)
        with pytest.raises(ImportError, match=r'needs lineax: pip install "\.\[lineax\]" in'):
            runpy.run_path(jaxsoft.lineax.__file__)
    else:
        assert "SimplexOperator" in runpy.run_path(jaxsoft.lineax.__file__)
