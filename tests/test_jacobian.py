"""The structured Jacobian: each method against dense float64, saturated rows against mpmath."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft import SimplexJacobian
from tests import exact

RNG = np.random.default_rng(0)


def rows():
    """Weights and sink of one row each: random, tied, with zeros, of one and of two classes."""
    p = RNG.dirichlet(np.ones(7))
    yield "random", p, 0.0
    yield "random, sink", p * 0.7, 0.3
    yield "temperature", p / 0.2, 0.0
    yield "temperature, sink", 0.6 * p / 3.0, 0.4 / 3.0
    yield "tied", np.full(5, 0.2), 0.0
    yield "tied tops", np.array([0.4, 0.4, 0.1, 0.1]), 0.0
    yield "zeros", np.array([0.5, 0.0, 0.2, 0.0, 0.3]), 0.0
    yield "zeros, sink", np.array([0.5, 0.0, 0.2, 0.0, 0.1]), 0.2
    yield "dominated", np.array([0.9, 0.05, 0.03, 0.02]), 0.0
    yield "sink dominates", np.array([0.05, 0.03, 0.02]), 0.9
    yield "two classes", np.array([0.3, 0.7]), 0.0
    yield "one class", np.array([1.0]), 0.0
    yield "one class, sink", np.array([0.4]), 0.6
    yield "no weight", np.zeros(3), 0.0


ROWS = {name: (s, s0) for name, s, s0 in rows()}


@pytest.fixture(params=ROWS)
def row(request):
    s, s0 = ROWS[request.param]
    return SimplexJacobian(jnp.asarray(s), jnp.asarray(s0)), dense(s, s0)


def dense(s, s0):
    total = s.sum() + s0
    return np.diag(s) - np.outer(s, s) / (total or 1.0)


def close(actual, expected, rtol=1e-11, atol=1e-15):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def vectors(n, count):
    return np.random.default_rng(1).normal(size=(count, n))


def columns(product, n):
    """The matrix of a linear map of R^n."""
    return np.stack([np.asarray(product(e)) for e in np.eye(n)], -1)


# ---------------------------------------------------------------------------- against dense


def test_products_and_entries(row):
    jacobian, matrix = row
    n = len(matrix)
    v = vectors(n, 1)[0]
    close(jacobian.as_matrix(), matrix)
    assert np.array_equal(jacobian.as_matrix(), jacobian.as_matrix().T)
    assert jacobian.T is jacobian
    close(jacobian.mv(v), matrix @ v, atol=1e-14)
    close(jacobian.mv(np.ones(n)), matrix @ np.ones(n))
    close(jacobian.quadratic_form(v), v @ matrix @ v)
    close(jacobian.diagonal(), np.diag(matrix))
    close(jacobian.trace(), np.trace(matrix))
    close(columns(lambda e: jacobian.row(int(np.argmax(e))), n), matrix)


def test_norms_and_rank(row):
    jacobian, matrix = row
    for order in (1, 2, np.inf, "fro"):
        close(jacobian.norm(order), np.linalg.norm(matrix, order))
    frobenius = np.linalg.norm(matrix)
    rank = (np.trace(matrix) / frobenius) ** 2 if frobenius else 0.0
    close(jacobian.effective_rank(), rank)


def test_the_largest_eigenpair(row):
    jacobian, matrix = row
    lower, upper = jacobian.norm_bounds()
    largest = np.linalg.eigvalsh(matrix)[-1]
    assert lower <= largest + 1e-15
    assert largest - 1e-15 <= upper <= 2 * largest + 1e-15
    value, vector = jacobian.eigh_max()
    close(value, np.linalg.eigvalsh(matrix)[-1])
    close(np.linalg.norm(vector), 1.0)
    close(matrix @ vector, value * vector, atol=1e-14)


def test_all_eigenvalues(row):
    jacobian, matrix = row
    values = np.asarray(jacobian.eigvalsh())
    close(values, np.linalg.eigvalsh(matrix), atol=1e-14)
    weights = np.sort(jacobian.weights)
    assert np.all(values <= weights)  # they interlace
    assert np.all(values[1:] >= weights[:-1])
    close(values[-1], jacobian.norm(2))
    close(values.sum(), np.trace(matrix), atol=1e-14)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5, 10.0])
def test_inverse_and_determinant(row, damping):
    jacobian, matrix = row
    n = len(matrix)
    b = vectors(n, 1)[0]
    sign, logarithm = jacobian.slogdet(damping)
    if damping:
        shifted = matrix + damping * np.eye(n)
        close(jacobian.solve(b, damping), np.linalg.solve(shifted, b))
        expected = np.linalg.slogdet(shifted)
        close(sign, expected[0])
        close(logarithm, expected[1], atol=1e-13)
    else:
        close(jacobian.solve(b), np.linalg.pinv(matrix, rcond=1e-13) @ b, rtol=1e-8, atol=1e-12)
        values = np.linalg.eigvalsh(matrix)
        values = values[values > 1e-13]
        close(sign, 1.0)
        close(logarithm, np.log(values).sum(), atol=1e-12)


def test_factors(row):
    jacobian, matrix = row
    n = len(matrix)
    root = columns(jacobian.sqrt_mv, n)
    close(root @ root.T, matrix)
    close(columns(jacobian.sqrt_T_mv, n), root.T)
    lower = columns(jacobian.cholesky_mv, n)
    close(lower @ lower.T, matrix)
    np.testing.assert_array_equal(lower, np.tril(lower))


def test_the_rank_factor(row):
    jacobian, matrix = row
    n = len(matrix)
    if n == 1:
        with pytest.raises(ValueError, match="rank_factor: weights must have two classes or more"):
            jacobian.rank_factor()
        return
    factor = np.asarray(jacobian.rank_factor())
    assert factor.shape == (n, n - 1)
    if jacobian.sink:
        assert np.all(np.isnan(factor))
    else:
        close(factor @ factor.T, matrix)
    batch = SimplexJacobian(jnp.stack([jacobian.weights] * 2), jnp.stack([jacobian.sink] * 2))
    np.testing.assert_array_equal(batch.rank_factor()[1], factor)


@pytest.mark.parametrize("sink", [None, 0.5])
def test_samples_have_the_covariance(sink):
    x = jnp.asarray(RNG.normal(size=(2, 4)))
    jacobian = jaxsoft.softmax_jacobian(x, sink=sink)
    samples = np.asarray(jacobian.sample(jax.random.key(0), (200, 500)))
    assert samples.shape == (200, 500, 2, 4)
    for i, matrix in enumerate(np.asarray(jacobian.as_matrix())):
        covariance = np.cov(samples[:, :, i].reshape(-1, 4).T)
        # Of 100,000 samples: five standard errors of an entry.
        limit = 5 * np.sqrt(2 / 1e5) * np.max(np.diag(matrix))
        np.testing.assert_allclose(covariance, matrix, atol=limit)


def test_second_derivative_of_softmax():
    x = jnp.asarray(RNG.normal(size=6) * 2)
    u, v = vectors(6, 2)
    along = lambda x: jax.jvp(jaxsoft.softmax, (x,), (u,))[1]
    expected = jax.jvp(along, (x,), (v,))[1]
    close(jaxsoft.softmax_jacobian(x).second(u, v), expected, atol=1e-14)


# ---------------------------------------------------------------------------- closed algebra


def test_the_family_is_closed(row):
    jacobian, matrix = row
    n = len(matrix)
    close((2.5 * jacobian).as_matrix(), 2.5 * matrix)
    close((jacobian * 2.5).as_matrix(), 2.5 * matrix)
    keep = np.arange(n) % 2 == 0
    kept = np.ix_(keep, keep)
    restricted = jacobian.restrict(keep)
    close(restricted.as_matrix()[kept], matrix[kept])
    assert not np.any(restricted.weights[~keep])
    dropped = np.ix_(~keep, ~keep)
    schur = matrix[kept] - matrix[np.ix_(keep, ~keep)] @ (
        np.linalg.pinv(matrix[dropped]) @ matrix[np.ix_(~keep, keep)]
    )
    close(jacobian.eliminate(keep).as_matrix()[kept], schur, atol=1e-13)
    ids = np.arange(n) % 3
    partition = np.eye(3)[ids]
    close(jacobian.merge(ids, 3).as_matrix(), partition.T @ matrix @ partition, atol=1e-15)


def test_the_certificate_is_an_exact_box():
    x = np.array([1.0, 0.2, -0.5, 0.9])
    radius = 0.3
    lower, upper = jaxsoft.softmax_jacobian(x).certificate(radius)
    for i in range(4):
        towards = np.where(np.arange(4) == i, radius, -radius)
        close(upper[i], jaxsoft.softmax(x + towards)[i])
        close(lower[i], jaxsoft.softmax(x - towards)[i])
    moved = np.asarray(jaxsoft.softmax(x + radius * RNG.uniform(-1, 1, size=(1000, 4))))
    assert np.all((moved >= np.asarray(lower)) & (moved <= np.asarray(upper)))


# ---------------------------------------------------------------------------- from logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"where": np.array([True, False, True, True, True])},
        {"temperature": 0.4},
        {"sink": 0.3},
        {"temperature": 2.0, "sink": -0.5, "where": np.array([True, True, True, False, True])},
    ],
)
def test_it_is_the_jacobian_of_softmax(options):
    x = jnp.asarray(RNG.normal(size=(2, 3, 5)))
    softmax = functools.partial(jaxsoft.softmax, **options)
    p, jacobian = jaxsoft.softmax_and_jacobian(x, **options)
    np.testing.assert_array_equal(p, softmax(x))
    expected = jax.vmap(jax.vmap(jax.jacfwd(softmax)))(x)
    close(jacobian.as_matrix(), expected)
    close(jaxsoft.softmax_jacobian(x, **options).as_matrix(), expected)
    v = RNG.normal(size=(2, 3, 5))
    close(jacobian.mv(v), np.einsum("...ij,...j", expected, v), atol=1e-15)


def test_the_class_axis_comes_last():
    x = jnp.asarray(RNG.normal(size=(4, 3)))
    close(jaxsoft.softmax_jacobian(x, 0).weights, jaxsoft.softmax(x, 0).T)
    flat = jaxsoft.softmax_jacobian(x, (0, 1)).as_matrix()
    expected = jax.jacfwd(lambda x: jaxsoft.softmax(x, None).ravel())(x).reshape(12, 12)
    close(flat, expected)


def test_edge_cases_of_logits():
    inf, nan = np.inf, np.nan
    x = jnp.array([[0.0, 1.0, -inf], [-inf, -inf, -inf], [0.0, nan, 1.0], [0.0, inf, 1.0]])
    jacobian = jaxsoft.softmax_jacobian(x)
    matrices = jacobian.as_matrix()
    assert np.all(np.isfinite(matrices[:2]))
    assert not np.any(matrices[0, 2])
    assert not np.any(matrices[1])
    assert np.all(np.isnan(matrices[2:]))
    for value in (jacobian.norm(2), jacobian.trace(), jacobian.norm("fro")):
        assert np.all(np.isfinite(value[:2]))
        assert value[1] == 0
        assert np.all(np.isnan(value[2:]))
    assert jaxsoft.softmax_jacobian(jnp.zeros((2, 0))).as_matrix().shape == (2, 0, 0)
    assert jaxsoft.softmax_jacobian(jnp.zeros(3, jnp.bfloat16)).weights.dtype == jnp.float32
    assert jaxsoft.softmax_jacobian(np.zeros(3, int)).weights.dtype == jnp.float64


# ---------------------------------------------------------------------------- saturated rows


def methods(v):
    return {
        "as_matrix": lambda j: j.as_matrix(),
        "mv": lambda j: j.mv(v),
        "diagonal": lambda j: j.diagonal(),
        "trace": lambda j: j.trace(),
        "quadratic_form": lambda j: j.quadratic_form(v),
        "1": lambda j: j.norm(1),
        "2": lambda j: j.norm(2),
        "eigvalsh": lambda j: j.eigvalsh()[1:],
        "fro": lambda j: j.norm("fro"),
        "root": lambda j: j.sqrt_T_mv(v),
        "solve": lambda j: j.solve(v, 1e-3),
        "slogdet": lambda j: j.slogdet(1e-3)[1],
    }


def exact_methods(x, v):
    mp = exact.mpmath
    exponentials = [mp.exp(mp.mpf(float(a)) - mp.mpf(float(x.max()))) for a in x]
    total = mp.fsum(exponentials)
    p = [e / total for e in exponentials]
    n, v = len(p), [mp.mpf(float(a)) for a in v]
    matrix = mp.matrix(n, n)
    for i in range(n):
        for j in range(n):
            other = mp.fsum(q for k, q in enumerate(p) if k != i)
            matrix[i, j] = p[i] * other if i == j else -p[i] * p[j]
    mean = mp.fsum(a * b for a, b in zip(p, v, strict=True))
    product = [a * (b - mean) for a, b in zip(p, v, strict=True)]
    damped = matrix + mp.mpf(float(np.float32(1e-3))) * mp.eye(n)
    root = [mp.sqrt(a) * (b - mean) for a, b in zip(p, v, strict=True)]
    return {
        "as_matrix": [[matrix[i, j] for j in range(n)] for i in range(n)],
        "mv": product,
        "diagonal": [matrix[i, i] for i in range(n)],
        "trace": mp.fsum(matrix[i, i] for i in range(n)),
        "quadratic_form": mp.fsum(a * b for a, b in zip(v, product, strict=True)),
        "1": max(2 * matrix[i, i] for i in range(n)),
        "2": max(mp.eigsy(matrix, eigvals_only=True)),
        "eigvalsh": sorted(mp.eigsy(matrix, eigvals_only=True))[1:],
        "fro": mp.sqrt(mp.fsum(matrix[i, j] ** 2 for i in range(n) for j in range(n))),
        "root": root,
        "solve": list(mp.lu_solve(damped, mp.matrix(v))),
        "slogdet": mp.log(mp.det(damped)),
    }


@pytest.mark.parametrize("gap", [20, 40, 60, 80])
def test_saturated_rows_in_float32(gap):
    x = np.array([0.0, gap, 0.5, -1.0, 0.25], np.float32)
    v = np.array([1.0, -0.5, 2.0, 0.25, -1.5], np.float32)
    wanted = exact_methods(x, v)
    jacobian = jaxsoft.softmax_jacobian(jnp.asarray(x))
    for name, method in methods(v).items():
        expected = np.array(wanted[name], object).astype(float)
        actual = np.asarray(method(jacobian), float)
        # Products of two probabilities below float32's smallest normal number are lost.
        np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=2e-38, err_msg=name)


# ---------------------------------------------------------------------------- transformations

DIFFERENTIABLE = {
    "mv": lambda j, v: j.mv(v),
    "trace": lambda j, v: j.trace(),
    "quadratic_form": lambda j, v: j.quadratic_form(v),
    "norm 2": lambda j, v: j.norm(2),
    "norm fro": lambda j, v: j.norm("fro"),
    "eigenvector": lambda j, v: j.eigh_max()[1],
    "eigvalsh": lambda j, v: j.eigvalsh(),
    "solve": lambda j, v: j.solve(v, 0.1),
    "solve, pseudo": lambda j, v: j.solve(v),
    "slogdet": lambda j, v: j.slogdet(0.1)[1],
    "slogdet, pseudo": lambda j, v: j.slogdet()[1],
    "sqrt_mv": lambda j, v: j.sqrt_mv(v),
    "cholesky_mv": lambda j, v: j.cholesky_mv(v),
}


def central_differences(f, x, step=1e-5):
    moved = [(f(x + step * e) - f(x - step * e)) / (2 * step) for e in np.eye(x.size)]
    return np.stack([np.asarray(m) for m in moved], -1)


@pytest.mark.parametrize("sink", [None, 0.3])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_by_the_logits(name, sink):
    x, v = np.array([0.3, 1.4, -0.2, 0.8]), vectors(4, 1)[0]
    f = lambda x: DIFFERENTIABLE[name](jaxsoft.softmax_jacobian(x, sink=sink), v)
    expected = central_differences(f, x)
    for derivative in (jax.jacfwd, jax.jacrev, lambda f: jax.jit(jax.jacrev(f))):
        np.testing.assert_allclose(derivative(f)(jnp.asarray(x)), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if "pseudo" not in name])
def test_derivatives_at_a_masked_class(name):
    x, v = jnp.array([0.3, 1.4, -np.inf, 0.8]), vectors(4, 1)[0]
    keep = np.array([0, 1, 3])
    f = lambda x, v: jnp.sum(jnp.cos(DIFFERENTIABLE[name](jaxsoft.softmax_jacobian(x), v)))
    for derivative in (jax.jacfwd, jax.jacrev):
        gradient = derivative(f)(x, v)
        assert gradient[2] == 0
        if name not in ("solve", "slogdet"):
            close(gradient[keep], derivative(f)(x[keep], v[keep]), atol=1e-14)
        assert np.all(np.isfinite(gradient))


def test_batches_vmap_and_jit_agree():
    x = jnp.asarray(RNG.normal(size=(6, 5)))
    v = jnp.asarray(RNG.normal(size=(6, 5)))
    for name, method in DIFFERENTIABLE.items():
        f = lambda x, v, method=method: method(jaxsoft.softmax_jacobian(x), v)
        close(jax.vmap(f)(x, v), f(x, v), atol=1e-14)
        close(jax.jit(f)(x, v), f(x, v), atol=1e-14)
        close(jnp.stack([f(*pair) for pair in zip(x, v, strict=True)]), f(x, v), atol=1e-14)
        assert f(x, v).shape[0] == 6, name


def test_it_is_a_pytree():
    jacobian = jaxsoft.softmax_jacobian(jnp.asarray(RNG.normal(size=(3, 4))))
    leaves, treedef = jax.tree.flatten(jacobian)
    assert [leaf.shape for leaf in leaves] == [(3, 4), (3,)]
    again = jax.tree.unflatten(treedef, leaves)
    np.testing.assert_array_equal(again.weights, jacobian.weights)
    traces = jax.vmap(lambda j: j.trace())(jacobian)
    np.testing.assert_array_equal(traces, jacobian.trace())


N = 20_000
SCALABLE = DIFFERENTIABLE | {
    "norm 1": lambda j, v: j.norm(1),
    "row": lambda j, v: j.row(3),
    "effective_rank": lambda j, v: j.effective_rank(),
    "second": lambda j, v: j.second(v, v),
    "certificate": lambda j, v: j.certificate(0.1)[0],
    "restrict": lambda j, v: j.restrict(v > 0).trace(),
    "eliminate": lambda j, v: j.eliminate(v > 0).trace(),
}


@pytest.mark.parametrize("name", SCALABLE)
def test_nothing_makes_a_square_array(name):
    x = jax.ShapeDtypeStruct((N,), jnp.float32)
    f = lambda x, v: jnp.sum(SCALABLE[name](jaxsoft.softmax_jacobian(x), v))
    for fun in (f, jax.grad(f, argnums=(0, 1))):
        memory = jax.jit(fun).lower(x, x).compile().memory_analysis()
        # n x n would be 1.6 GB; `eigvalsh` works in blocks of 2 MB.
        assert memory.temp_size_in_bytes < (1000 if name == "eigvalsh" else 100) * 4 * N


# ---------------------------------------------------------------------------- errors

J = SimplexJacobian(jnp.full((2, 3), 0.25), jnp.full(2, 0.25))


def call(fun, *args):
    # The tests check annotations at run time; here the method's own check is to answer.
    return inspect.unwrap(fun)(*args)


def made(*args):
    return call(SimplexJacobian.__init__, object.__new__(SimplexJacobian), *args)


@pytest.mark.parametrize(
    ("fun", "args", "error", "message"),
    [
        (made, (0.5, 0.0), ValueError, ": weights must have shape [..., n], got ()"),
        (made, ([0.5], 0.0), TypeError, ": weights must be an array or a number, got list"),
        (made, (J.weights, np.zeros(3)), ValueError, ": sink must broadcast to (2,)"),
        (J.mv, (np.zeros(4),), ValueError, ".mv: v must broadcast to (2, 3)"),
        (J.mv, (np.zeros(3, complex),), TypeError, ".mv: v must be real, got dtype complex128"),
        (J.solve, (np.zeros(3), -1.0), ValueError, ".solve: damping must be 0 or more, got -1.0"),
        (J.norm, (3,), ValueError, ".norm: ord must be 1, 2, inf or 'fro', got 3"),
        (J.row, (3,), ValueError, ".row: i must lie in [0, 3), got 3"),
        (J.restrict, (np.zeros(3),), TypeError, ".restrict: mask must be boolean, got dtype float"),
        (
            J.eliminate,
            (np.zeros(2, bool),),
            ValueError,
            ".eliminate: mask must broadcast to (2, 3)",
        ),
        (J.merge, (np.zeros(3), 2), TypeError, ".merge: segment_ids must be integers"),
        (J.merge, (np.zeros(2, int), 2), ValueError, ".merge: segment_ids must have shape (3,)"),
        (J.merge, (np.zeros(3, int), 1.5), TypeError, ".merge: num_segments must be an integer"),
        (J.merge, (np.zeros(3, int), -1), ValueError, ".merge: num_segments must be 0 or more"),
        (J.__rmul__, (-1.0,), ValueError, ".__mul__: factor must be 0 or more, got -1.0"),
        (J.sample, (jax.random.key(0), 3), TypeError, ".sample: shape must be a sequence of int"),
        (J.sample, (jax.random.key(0), (-1,)), ValueError, ".sample: shape must hold numbers of 0"),
        (J.certificate, (-0.1,), ValueError, ".certificate: radius must be 0 or more, got -0.1"),
    ],
)
def test_errors_of_methods(fun, args, error, message):
    bound = getattr(fun, "__self__", None)
    with pytest.raises(error, match=f"^SimplexJacobian{re.escape(message)}"):
        call(fun.__func__, bound, *args) if bound is not None else fun(*args)


@pytest.mark.parametrize("fun", [jaxsoft.softmax_jacobian, jaxsoft.softmax_and_jacobian])
def test_errors_of_functions(fun):
    with pytest.raises(ValueError, match=rf"^{fun.__name__}: axis must lie in \[0, 0\)"):
        call(fun, 1.0)
    with pytest.raises(TypeError, match=f"^{fun.__name__}: x must be an array or a number"):
        call(fun, [1.0])
    with pytest.raises(ValueError, match=f"^{fun.__name__}: temperature must be positive"):
        fun(jnp.zeros(3), temperature=0.0)


def test_no_class():
    empty = jaxsoft.SimplexJacobian(jnp.zeros((2, 0)), jnp.zeros(2))
    for value in (empty.norm(), empty.trace(), *empty.norm_bounds(), empty.effective_rank()):
        np.testing.assert_array_equal(value, [0.0, 0.0])
    assert empty.eigvalsh().shape == empty.mv(jnp.zeros((2, 0))).shape == (2, 0)
    with pytest.raises(ValueError, match=r"^SimplexJacobian\.eigh_max: weights must have a class"):
        empty.eigh_max()


def test_a_negative_radius_spoils_its_row_alone():
    jacobian = jaxsoft.SimplexJacobian(jnp.full((2, 3), 1 / 3), jnp.zeros(2))
    low, high = jacobian.certificate(jnp.array([-0.5, 0.5]))
    np.testing.assert_array_equal(np.isnan(low), [[True] * 3, [False] * 3])
    np.testing.assert_array_equal(high[1], jacobian.certificate(0.5)[1][1])


W = np.array([0.3, -1.0, 2.0, 0.5, 0.75], np.float32)
OF_A_ROW = {
    "mv": lambda J, v: J.mv(v) @ v[::-1],
    "quadratic_form": lambda J, v: J.quadratic_form(v),
    "trace": lambda J, v: J.trace(),
    "norm 1": lambda J, v: J.norm(1),
    "norm 2": lambda J, v: J.norm(),
    "norm fro": lambda J, v: J.norm("fro"),
    "eigvalsh": lambda J, v: J.eigvalsh() @ v,
    "eigh_max": lambda J, v: J.eigh_max()[1] @ v,
    "effective_rank": lambda J, v: J.effective_rank(),
    "slogdet": lambda J, v: J.slogdet(0.1 * jax.lax.stop_gradient(J.weights.max()))[1],
    "slogdet, pseudo": lambda J, v: J.slogdet()[1],
    "solve": lambda J, v: J.solve(v, 0.1 * jax.lax.stop_gradient(J.weights.max())) @ v[::-1],
    "certificate": lambda J, v: J.certificate(0.1 / jax.lax.stop_gradient(J.weights.max()))[1] @ v,
    "sqrt_mv": lambda J, v: J.sqrt_mv(v) @ v[::-1],
    "cholesky_mv": lambda J, v: J.cholesky_mv(v) @ v[::-1],
}


def gradients(fun, x):
    """In float32 and, of the very same numbers, in float64."""
    gradient, x = jax.jit(jax.grad(fun)), x.astype(np.float32)
    return [np.asarray(gradient(x.astype(t), W.astype(t)), float) for t in (np.float32, float)]


# What a derivative divides by, a sum of weights of 1e-35 or of 1e25, has no square in float32.
@pytest.mark.parametrize("sink", [None, 1.0])
@pytest.mark.parametrize("name", OF_A_ROW)
def test_gradients_of_a_saturated_row_in_float32(name, sink):
    fun = lambda x, v: OF_A_ROW[name](jaxsoft.softmax_jacobian(x, sink=sink), v)
    single, double = gradients(fun, np.array([80.0, 0.0, -0.5, 0.25, -1.25]))
    np.testing.assert_allclose(single, double, rtol=0, atol=2e-5 * np.max(np.abs(double)))


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@pytest.mark.parametrize("name", [name for name in OF_A_ROW if name != "solve"])  # 1 / s²
def test_gradients_by_weights_of_any_size(name, scale):
    fun = lambda s, v: OF_A_ROW[name](jaxsoft.SimplexJacobian(s, jnp.zeros((), s.dtype)), v)
    single, double = gradients(fun, scale * np.array([0.45, 0.25, 0.15, 0.1, 0.05]))
    np.testing.assert_allclose(single, double, rtol=0, atol=2e-5 * np.max(np.abs(double)))
