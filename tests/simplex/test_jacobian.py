"""The structured Jacobian: each method against dense float64, saturated rows against mpmath."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxsoft
from jaxsoft import SimplexJacobian
from tests.exact import mpmath as mp

RNG = np.random.default_rng(0)


def rows():
    """Weights and sink of one row each: random, tied, with zeros, of one and of two classes.

    Few lengths, for each one is compiled.
    """
    p = RNG.dirichlet(np.ones(5))
    yield "random", p, 0.0
    yield "random, sink", p * 0.7, 0.3
    yield "temperature", p / 0.2, 0.0
    yield "temperature, sink", 0.6 * p / 3.0, 0.4 / 3.0
    yield "tied", np.full(5, 0.2), 0.0
    yield "tied tops", np.array([0.4, 0.4, 0.1, 0.05, 0.05]), 0.0
    yield "zeros", np.array([0.5, 0.0, 0.2, 0.0, 0.3]), 0.0
    yield "zeros, sink", np.array([0.5, 0.0, 0.2, 0.0, 0.1]), 0.2
    yield "dominated", np.array([0.9, 0.04, 0.03, 0.02, 0.01]), 0.0
    yield "sink dominates", np.array([0.03, 0.03, 0.02, 0.015, 0.005]), 0.9
    yield "two classes", np.array([0.3, 0.7]), 0.0
    yield "one class", np.array([1.0]), 0.0
    yield "one class, sink", np.array([0.4]), 0.6
    yield "no weight", np.zeros(5), 0.0


ROWS = {name: (s, s0) for name, s, s0 in rows()}


@pytest.fixture(params=ROWS)
def row(request):
    s, s0 = ROWS[request.param]
    return SimplexJacobian(jnp.asarray(s), jnp.asarray(s0)), dense(s, s0)


def dense(s, s0):
    total = s.sum() + s0
    return np.diag(s) - np.outer(s, s) / (total or 1.0)


def close(actual, expected, rtol=1e-11, atol=1e-15, err_msg=""):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=err_msg)


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
    assert not np.any(np.signbit(jacobian.as_matrix()) & (matrix == 0))
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
    factor = jacobian.rank_factor()
    columns_of = np.asarray(factor.as_matrix())
    assert columns_of.shape == (n, n - 1)
    close(factor.mv(np.ones(n - 1)), columns_of.sum(1), atol=1e-14)
    close(columns(factor.T_mv, n), columns_of.T)
    if jacobian.sink:
        assert np.all(np.isnan(columns_of))
    else:
        close(columns_of @ columns_of.T, matrix)
    batch = SimplexJacobian(jnp.stack([jacobian.weights] * 2), jnp.stack([jacobian.sink] * 2))
    close(batch.rank_factor().as_matrix()[1], columns_of)


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
    expected = jax.jit(jax.vmap(jax.vmap(jax.jacfwd(softmax))))(x)
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


@pytest.mark.parametrize(
    ("x", "temperature", "sink", "logits"),
    [
        ([3e38, 0.0], 3e38, 2.0, [1.0, 0.0, 2.0]),
        ([0.0, 1.0], 1e30, 1e10, [0.0, 0.0, 1e10]),
    ],
)
def test_a_sink_that_its_temperature_would_take_out_of_range(x, temperature, sink, logits):
    x, temperature, sink = (jnp.asarray(a, jnp.float32) for a in (x, temperature, sink))
    fun = lambda *args: jaxsoft.softmax_and_jacobian(args[0], temperature=args[1], sink=args[2])
    p, jacobian = fun(x, temperature, sink)
    expected = np.exp(np.array(logits) - np.max(logits))
    expected /= expected.sum()
    np.testing.assert_allclose(p, expected[:2], rtol=1e-6)
    # Weights p / T below float32's smallest normal number are lost.
    weights = np.array([*jacobian.weights, jacobian.sink], float)
    np.testing.assert_allclose(weights, expected / float(temperature), rtol=1e-6, atol=1.2e-38)
    slopes = jax.grad(lambda *args: fun(*args)[0][0], (0, 1, 2))(x, temperature, sink)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


# ---------------------------------------------------------------------------- saturated rows


MASK = np.array([True, False, True, True, False])
SEGMENTS = np.array([0, 2, 0, 5, 1])  # the class of id 5 is left out
SATURATED = {
    "as_matrix": lambda j, v: j.as_matrix(),
    "row": lambda j, v: j.row(1),
    "mv": lambda j, v: j.mv(v),
    "diagonal": lambda j, v: j.diagonal(),
    "trace": lambda j, v: j.trace(),
    "quadratic_form": lambda j, v: j.quadratic_form(v),
    "1": lambda j, v: j.norm(1),
    "2": lambda j, v: j.norm(2),
    "fro": lambda j, v: j.norm("fro"),
    "norm_bounds": lambda j, v: jnp.stack(j.norm_bounds(), -1),
    "eigh_max": lambda j, v: j.eigh_max()[1],
    "eigvalsh": lambda j, v: j.eigvalsh(),
    "effective_rank": lambda j, v: j.effective_rank(),
    "solve": lambda j, v: j.solve(v, 1e-3),
    "solve, pseudo": lambda j, v: j.solve(v),
    "slogdet": lambda j, v: j.slogdet(1e-3)[1],
    "slogdet, pseudo": lambda j, v: j.slogdet()[1],
    "sqrt_mv": lambda j, v: j.sqrt_mv(v),
    "sqrt_T_mv": lambda j, v: j.sqrt_T_mv(v),
    "cholesky_mv": lambda j, v: j.cholesky_mv(v),
    "rank_factor": lambda j, v: j.rank_factor().mv(v[:-1]),
    "rank_factor, transposed": lambda j, v: j.rank_factor().T_mv(v),
    "restrict": lambda j, v: j.restrict(MASK).as_matrix(),
    "eliminate": lambda j, v: j.eliminate(MASK).as_matrix(),
    "merge": lambda j, v: j.merge(SEGMENTS, 3).as_matrix(),
    "second": lambda j, v: j.second(v, v[::-1]),
    "certificate": lambda j, v: jnp.stack(j.certificate(0.75), -1),
}


class ExactMatrix:
    """C(s, s0) in long arithmetic, entry by entry from what the family is."""

    def __init__(self, s, s0):
        self.s, self.s0, self.n = s, s0, len(s)
        self.t = mp.fsum(s) + s0
        self.support = [i for i in range(self.n) if s[i]]
        self.matrix = mp.matrix(self.n, self.n)
        for i in self.support:
            for j in self.support:
                self.matrix[i, j] = (s[i] if i == j else 0) - s[i] * s[j] / self.t

    def rows(self):
        return self.matrix.tolist()

    def spectrum(self):
        """The eigenvalues, ascending, and the vector of the last, positive where it is largest."""
        values, vectors = mp.eigsy(self.matrix)
        top = max(range(self.n), key=lambda i: self.s[i])
        vector = vectors[:, self.n - 1]
        return list(values), [x * mp.sign(vector[top]) for x in vector]

    def cholesky(self):
        lower = mp.matrix(self.n, self.n)
        for j in range(self.n):
            for i in range(j, self.n):
                done = mp.fsum(lower[i, k] * lower[j, k] for k in range(j))
                rest = self.matrix[i, j] - done
                if i == j:
                    lower[i, j] = mp.sqrt(rest) if rest > mp.mpf(10) ** -60 else mp.mpf(0)
                elif lower[j, j]:
                    lower[i, j] = rest / lower[j, j]
        return lower

    def root(self):
        """The B of which the classes beside the sink have no part in B Bᵀ = C but by s √sᵀ."""
        kappa = 1 / (self.t + mp.sqrt(self.t * self.s0))
        entry = lambda i, j: mp.sqrt(self.s[i]) * (i == j) - kappa * self.s[i] * mp.sqrt(self.s[j])
        return mp.matrix([[entry(i, j) for j in range(self.n)] for i in range(self.n)])

    def rank_factor(self):
        """diag(√s) times the reflection that takes √a to the negative last unit vector."""
        u = [mp.sqrt(s / self.t) + (i == self.n - 1) for i, s in enumerate(self.s)]
        entry = lambda i, j: mp.sqrt(self.s[i]) * ((i == j) - u[i] * u[j] / u[-1])
        return mp.matrix([[entry(i, j) for j in range(self.n - 1)] for i in range(self.n)])

    def pseudo_inverse(self, v):
        """On the support C x = v; without a sink x is free of constants, and v is freed of them."""
        k, constant = len(self.support), 0 if self.s0 else 1
        mean = constant * mp.fsum(v[i] for i in self.support) / k
        matrix = mp.matrix(
            [[self.matrix[i, j] + constant for j in self.support] for i in self.support]
        )
        found = mp.lu_solve(matrix, mp.matrix([v[i] - mean for i in self.support]))
        out = [mp.mpf(0)] * self.n
        for i, x in zip(self.support, found, strict=True):
            out[i] = x
        return out

    def methods(self, v):
        s, s0, t, matrix, n = self.s, self.s0, self.t, self.matrix, self.n
        v, column = [mp.mpf(float(a)) for a in v], mp.matrix(v.astype(float).tolist())
        values, vector = self.spectrum()
        trace = mp.fsum(matrix[i, i] for i in range(n))
        frobenius = mp.sqrt(mp.fsum(x**2 for x in matrix))
        one, two = sorted(s, reverse=True)[:2]
        keep = [a if k else mp.mpf(0) for a, k in zip(s, MASK, strict=True)]
        dropped = mp.fsum(s) - mp.fsum(keep)
        merged = [mp.fsum(a for a, k in zip(s, SEGMENTS, strict=True) if k == i) for i in range(3)]
        left = mp.fsum(a for a, k in zip(s, SEGMENTS, strict=True) if k > 2)
        mean = lambda x: mp.fsum(a * b for a, b in zip(s, x, strict=True)) / t
        centred = lambda x: ([a - mean(x) for a in x], -mean(x))
        (p, p0), (q, q0) = centred(v), centred(v[::-1])
        w = [a * b for a, b in zip(p, q, strict=True)]
        covariance = mean(w) + s0 / t * p0 * q0
        decay = mp.exp(-mp.mpf(0.75) * t)
        rest = [mp.fsum(s[:i] + s[i + 1 :]) for i in range(n)]
        low = [
            a * decay**2 / ((a * decay**2 + b + s0 * decay) or 1)
            for a, b in zip(s, rest, strict=True)
        ]
        high = [a / ((a + b * decay**2 + s0 * decay) or 1) for a, b in zip(s, rest, strict=True)]
        return {
            "as_matrix": self.rows(),
            "row": list(matrix[1, :]),
            "mv": list(matrix * column),
            "diagonal": [matrix[i, i] for i in range(n)],
            "trace": trace,
            "quadratic_form": (column.T * matrix * column)[0],
            "1": max(mp.fsum(map(abs, row)) for row in self.rows()),
            "2": values[-1],
            "fro": frobenius,
            "norm_bounds": [two * (t + one - two) / t, one * (t - one + two) / t],
            "eigh_max": vector,
            "eigvalsh": values,
            "effective_rank": (trace / frobenius) ** 2,
            "solve": list(mp.lu_solve(damped(s, s0, np.float32(1e-3)), column)),
            "solve, pseudo": self.pseudo_inverse(v),
            "slogdet": mp.log(mp.det(damped(s, s0, np.float32(1e-3)))),
            "slogdet, pseudo": mp.fsum(mp.log(x) for x in values if x > mp.mpf(10) ** -60),
            "sqrt_mv": list(self.root() * column),
            "sqrt_T_mv": list(self.root().T * column),
            "cholesky_mv": list(self.cholesky() * column),
            "rank_factor": list(self.rank_factor() * column[: n - 1]) if not s0 else [mp.nan] * n,
            "rank_factor, transposed": (
                list(self.rank_factor().T * column) if not s0 else [mp.nan] * (n - 1)
            ),
            "restrict": ExactMatrix(keep, s0 + dropped).rows(),
            "eliminate": ExactMatrix(keep, s0).rows(),
            "merge": ExactMatrix(merged, s0 + left).rows(),
            "second": [t * a * (x - covariance) for a, x in zip(s, w, strict=True)],
            "certificate": [list(pair) for pair in zip(low, high, strict=True)],
        }


GAPS = np.array([20, 40, 60, 80], np.float32)
ABSENT = np.array([True, True, False, True, True])


def saturated_case(options, ahead):
    """Rows with a class, or the sink, ahead by each of the gaps, and their matrices."""
    temperature = options.get("temperature", 1.0)
    z = np.tile(np.array([0.0, 0.75, 0.5, -1.0, 0.25], np.float32), (4, 1))
    sink = np.full((4, 1), options.get("sink", -np.inf), np.float32)
    (sink[:, 0] if ahead == "sink" else z[:, 1])[...] = GAPS
    matrices = []
    for row, extra in zip(z, sink[:, 0], strict=True):
        mask = options.get("where", np.ones(5, bool))
        powers = [mp.exp(float(x)) if k else mp.mpf(0) for x, k in zip(row, mask, strict=True)]
        mass = mp.exp(float(extra)) if np.isfinite(extra) else mp.mpf(0)
        t = temperature * (mp.fsum(powers) + mass)
        matrices.append(ExactMatrix([e / t for e in powers], mass / t))
    options = options | ({"sink": sink} if "sink" in options else {})
    return jaxsoft.softmax_jacobian(jnp.asarray(z * np.float32(temperature)), **options), matrices


# With exact differences of logits: what is measured is not the rounding of the input.
@pytest.mark.parametrize(
    ("options", "ahead"),
    [
        ({}, "class"),
        ({"where": ABSENT}, "class"),
        ({"temperature": 2.0}, "class"),
        ({"sink": 1.25}, "class"),
        ({"sink": 1.25}, "sink"),
        ({"sink": 1.25, "temperature": 0.5, "where": ABSENT}, "class"),
    ],
)
def test_saturated_rows_in_float32(options, ahead):
    v = np.array([1.0, -0.5, 2.0, 0.25, -1.5], np.float32)
    jacobian, matrices = saturated_case(options, ahead)
    wanted = [matrix.methods(v) for matrix in matrices]
    for name, method in SATURATED.items():
        with np.errstate(invalid="ignore"):  # numpy 1.26 warns of a NaN among objects
            expected = np.array([row[name] for row in wanted], object).astype(float)
        actual = np.asarray(method(jacobian, v), float)
        # Products of two probabilities below float32's smallest normal number are lost.
        np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=2e-38, err_msg=name)


@pytest.mark.parametrize("name", ["slopes", "values"])
def test_the_determinant_at_any_damping_in_float32(name):
    tops = np.array([[0.4, 0.25, 0.2, 0.1, 0.05], [1.0, 1e-12, 2e-12, 5e-13, 3e-12]], np.float32)
    dampings = np.array([1e-20, 1e-13, 1e-3, 1.0, 1e8, 1e25], np.float32)
    sinks = np.array([0.0, 0.3, 1e-12], np.float32)
    s, damping, s0 = (
        np.stack([case[i] for case in itertools.product(tops, dampings, sinks)]) for i in range(3)
    )
    values = lambda s, s0, damping: SimplexJacobian(s, s0).slogdet(damping)[1]
    if name == "values":
        np.testing.assert_allclose(
            jax.jit(values)(s, s0, damping),
            [float(mp.log(mp.det(damped(*row)))) for row in zip(s, s0, damping, strict=True)],
            rtol=3e-6,
        )
        return
    total = lambda *args: jnp.sum(values(*args))
    slopes = jax.jit(jax.grad(total, (0, 1, 2)))(s, s0, damping)
    for i, row in enumerate(zip(s, s0, damping, strict=True)):
        inverse = damped(*row) ** -1
        shares = mp.matrix([float(x) for x in row[0]]) / (
            mp.fsum(map(float, row[0])) + float(row[1])
        )
        forms = [
            ((e - shares).T * inverse * (e - shares))[0]
            for e in (*(mp.eye(5)[:, j] for j in range(5)), mp.zeros(5, 1))
        ]
        expected = np.array([*forms, mp.fsum(inverse[j, j] for j in range(5))]).astype(float)
        actual = np.array([*slopes[0][i], slopes[1][i], slopes[2][i]], float)
        np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=2e-38, err_msg=str(row))


def damped(s, s0, damping):
    """C + λ I; floats are taken as they are."""
    matrix = ExactMatrix([mp.mpmathify(x) for x in s], mp.mpmathify(s0)).matrix
    return matrix + mp.mpf(float(damping)) * mp.eye(len(s))


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
    "rank_factor": lambda j, v: j.rank_factor().mv(v[..., :-1]),
}


def each_at(x, v, sink=None):
    """What each method makes of the Jacobian at logits; with a sink there is no rank factor."""
    jacobian = jaxsoft.softmax_jacobian(x, sink=sink)
    names = [name for name in DIFFERENTIABLE if sink is None or name != "rank_factor"]
    return {name: DIFFERENTIABLE[name](jacobian, v) for name in names}


@pytest.mark.parametrize("sink", [pytest.param(None, marks=pytest.mark.slow), 0.3])
def test_derivatives_by_the_logits(sink):
    x, v = np.array([0.3, 1.4, -0.2, 0.8]), vectors(4, 1)[0]
    f, step = lambda x: each_at(x, v, sink), 1e-5
    moved = jax.jit(jax.vmap(f))(np.concatenate([x + step * np.eye(4), x - step * np.eye(4)]))
    derivatives = [jax.jacfwd(f), jax.jacrev(f)]
    if sink is not None:
        derivatives.append(jax.jit(jax.jacrev(f)))
    for found in (derivative(x) for derivative in derivatives):
        for name, values in moved.items():
            expected = np.moveaxis(np.asarray(values[:4] - values[4:]) / (2 * step), 0, -1)
            np.testing.assert_allclose(found[name], expected, rtol=1e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_derivatives_of_a_rank_factor_that_is_none(derivative):
    f = lambda x: jaxsoft.softmax_jacobian(x, sink=0.3).rank_factor().mv(np.ones(3))
    assert np.all(np.isnan(derivative(f)(np.array([0.3, 1.4, -0.2, 0.8]))))


def test_derivatives_at_a_masked_class():
    x, v = np.array([0.3, 1.4, -np.inf, 0.8]), vectors(4, 1)[0]
    keep = np.array([0, 1, 3])

    @jax.jit
    def gradients(x, v):
        f = lambda x: jax.tree.map(lambda a: jnp.sum(jnp.cos(a)), each_at(x, v))
        return jax.jacfwd(f)(x), jax.jacrev(f)(x)

    for masked, kept in zip(gradients(x, v), gradients(x[keep], v[keep]), strict=True):
        for name in DIFFERENTIABLE:
            if "pseudo" in name:
                continue
            assert masked[name][2] == 0, name
            assert np.all(np.isfinite(masked[name])), name
            if name not in ("solve", "slogdet"):
                close(masked[name][keep], kept[name], atol=1e-14, err_msg=name)


def test_batches_vmap_and_jit_agree():
    x, v = RNG.normal(size=(2, 6, 5))
    batch, jitted = each_at(x, v), jax.jit(each_at)
    rows = [jitted(*pair) for pair in zip(x, v, strict=True)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    for others in (jitted(x, v), jax.jit(jax.vmap(each_at))(x, v), stacked):
        for name, values in batch.items():
            assert values.shape[0] == 6, name
            close(others[name], values, atol=1e-14, err_msg=name)


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
    fun = jax.value_and_grad(f, argnums=(0, 1))
    memory = jax.jit(fun).lower(x, x).compile().memory_analysis()
    # n x n would be 1.6 GB; `eigvalsh` works in blocks of 2 MB.
    assert memory.temp_size_in_bytes < (1000 if name == "eigvalsh" else 100) * 4 * N


# ---------------------------------------------------------------------------- a stack of matrices


def batch_of(*shape, seed=2):
    return jaxsoft.softmax_jacobian(np.random.default_rng(seed).normal(size=shape), sink=0.3)


@pytest.mark.parametrize(
    ("batch", "of_columns"),
    [
        ((), (4,)),
        ((), (4, 3)),
        ((), (4, 4)),
        ((), (5, 4, 3)),  # one C for five matrices
        ((2,), (4,)),
        ((2,), (2, 4, 3)),
        ((2,), (1, 4, 3)),
        ((2,), (5, 1, 4, 3)),
        ((4,), (4, 4, 4)),
        ((2, 4), (2, 4, 4, 1)),
        ((2,), (2, 4, 0)),
    ],
)
def test_products_are_those_of_numpy(batch, of_columns):
    jacobian = batch_of(*batch, 4)
    v = np.random.default_rng(3).normal(size=of_columns)
    rows = v if v.ndim == 1 else np.swapaxes(v, -1, -2)
    matrix = np.asarray(jacobian.as_matrix())
    close(jacobian @ v, matrix @ v, atol=1e-14)
    close(rows @ jacobian, rows @ matrix, atol=1e-14)
    close(jnp.asarray(rows) @ jacobian, rows @ matrix, atol=1e-14)
    assert (jacobian @ v.astype(np.float32)).dtype == jacobian.dtype


def test_the_number_of_axes_tells_vectors_from_matrices():
    jacobian = batch_of(4, 4)  # of such sizes the shape alone would leave it open
    v = vectors(4, 4)
    np.testing.assert_array_equal(jacobian @ v, jacobian.mv(v))
    np.testing.assert_array_equal(v @ jacobian, jacobian.mv(v))
    close(jacobian @ v[None], np.asarray(jacobian.as_matrix()) @ v, atol=1e-14)
    np.testing.assert_array_equal(jax.vmap(lambda j, v: j @ v)(jacobian, v), jacobian.mv(v))
    by_columns = jax.vmap(lambda j: j @ v)(jacobian)  # within vmap C is one, and v a matrix
    close(by_columns, jacobian @ v[None], atol=1e-14)


def test_products_keep_what_mv_keeps():
    jacobian = jaxsoft.softmax_jacobian(jnp.array([40.0, 0.0, 1.0, -2.0], jnp.float32))
    v = vectors(4, 3).T.astype(np.float32)
    expected = np.stack([jacobian.mv(column) for column in v.T], -1)
    np.testing.assert_array_equal(jacobian @ v, expected)
    np.testing.assert_array_equal(v.T @ jacobian, expected.T)
    assert np.all(expected != 0)


def test_derivatives_of_products_with_matrices():
    structured = lambda x, v: (v.T @ jaxsoft.softmax_jacobian(x)) @ v
    plain = lambda x, v: v.T @ jax.jacfwd(jax.nn.softmax)(x) @ v

    @jax.jit
    def derivatives(x, v):
        ways = itertools.product((jax.jacfwd, jax.jacrev, jax.hessian), (0, 1))
        return [[way(f, i)(x, v) for f in (structured, plain)] for way, i in ways]

    for actual, expected in derivatives(vectors(4, 1)[0], vectors(4, 3).T):
        close(actual, expected, atol=1e-13)


@pytest.mark.parametrize(
    "index",
    [
        1,
        -3,
        np.int8(2),
        slice(1, None),
        (slice(None), 1),
        (0, -1),
        None,
        ...,
        (),
        (..., 1),
        (..., None, slice(None, 1)),
        (1, None, ..., 0),
        np.array([2, 0]),
        jnp.array([[0, 1]]),
        np.array([True, False, True]),
        np.ones((3, 2), bool),
        (np.array([0, 2]), np.array([1, 1])),
        (np.array([0, 2]), None, 1),
    ],
    ids=str,
)
def test_an_index_is_that_of_the_batch(index):
    jacobian = batch_of(3, 2, 4)
    places = index if isinstance(index, tuple) else (index,)
    trailing = () if any(item is Ellipsis for item in places) else (...,)
    expected = np.asarray(jacobian.as_matrix())[(*places, *trailing, slice(None), slice(None))]
    chosen = jacobian[index]
    np.testing.assert_array_equal(chosen.as_matrix(), expected)
    assert chosen.shape == expected.shape
    np.testing.assert_array_equal(chosen.sink, np.asarray(jacobian.sink)[index])


def test_shape_length_and_iteration():
    jacobian = batch_of(3, 2, 4)
    assert (jacobian.shape, jacobian.ndim, jacobian.dtype) == ((3, 2, 4, 4), 4, jnp.float64)
    assert np.shape(jacobian) == jacobian.as_matrix().shape
    assert len(jacobian) == len(list(jacobian)) == 3
    first, *_ = jacobian
    np.testing.assert_array_equal(first.weights, jacobian.weights[0])
    assert bool(jacobian)
    assert bool(first[0])
    traced = jax.jit(lambda j: j[0, jnp.int32(1)].trace())(jacobian)  # a place known when it runs
    np.testing.assert_array_equal(traced, jacobian.trace()[0, 1])


def test_division():
    jacobian, matrix = batch_of(2, 4), batch_of(2, 4).as_matrix()
    close((jacobian / 4).as_matrix(), matrix / 4)
    close(
        (jacobian / np.array([2.0, 0.5])).as_matrix(), matrix / np.array([2.0, 0.5])[:, None, None]
    )
    rows = np.isnan((jacobian / jnp.array([-1.0, 0.0])).trace())
    np.testing.assert_array_equal(rows, [True, True])
    gradient = jax.grad(lambda c: (jacobian / c).trace().sum())(2.0)
    close(gradient, -jacobian.trace().sum() / 4)


@pytest.mark.parametrize("make", [np.asarray, np.array, jnp.asarray, jnp.array])
def test_no_array_is_made_unasked(make):
    message = r"^SimplexJacobian: \(4, 4\) .* as_matrix\(\) makes one"
    if make in (jnp.asarray, jnp.array) and jax.__version_info__ < (0, 7):
        # jax 0.6 does not ask: it refuses by itself what is none of its arrays.
        message = r"^Unexpected input type for array: <class 'jaxsoft.SimplexJacobian'>$"
    for value in (batch_of(4), [batch_of(4)] * 2):
        with pytest.raises(TypeError, match=message):
            make(value)


def test_leaves_of_any_kind():
    treedef = jax.tree.structure(batch_of(4))
    struct = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    for leaf in (None, object(), "s", struct):
        jacobian = jax.tree.unflatten(treedef, [leaf, leaf])
        assert repr(leaf) in repr(jacobian)
        again = jax.tree.map(lambda leaf: leaf, jacobian, is_leaf=lambda x: x is None)
        assert again.weights is leaf
        assert bool(jacobian)
    assert (jacobian.shape, jacobian.dtype) == ((2, 3, 3), jnp.float32)


# ---------------------------------------------------------------------------- export


def outputs(j, v):
    """What every method makes of Jacobians with weights of shape [b, n]."""
    values = {name: method(j, v) for name, method in SCALABLE.items()}
    total = lambda j, v: sum(jnp.sum(DIFFERENTIABLE[name](j, v)) for name in SLOPES)
    return values, jax.grad(total, (0, 1), allow_int=True)(j, v), EXPORTED(j, v)


SLOPES = ("mv", "norm 2", "eigvalsh", "solve", "slogdet", "rank_factor")
EXPORTED = lambda j, v: {
    "jacobian": 2 * j[:, None] / 4,
    "factor": j.rank_factor(),
    "matrix": j.as_matrix(),
    "products": (j @ v, j @ v[..., None], v[:, None] @ j),
    "merge": j.merge(jnp.zeros(v.shape[1], int), 2),
    "sample": j.sample(jax.random.key(0), (2,)).shape[0],
}


@pytest.fixture
def symbolic(monkeypatch):
    """Annotations are checked at run time, but `int` is not the type of a symbolic size."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["b, 6", "b, n"])
def test_export_with_symbolic_sizes(symbolic, sizes):
    pytest.importorskip("flatbuffers", reason="JAX writes programs by it")
    b, n = jax.export.symbolic_shape(sizes, constraints=["n >= 4"] if "n" in sizes else [])
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float64) for shape in ((b, n), (b,), (b, n)))
    weights, sink, v = arrays
    jacobian = jax.tree.unflatten(jax.tree.structure(batch_of(4)), [weights, sink])
    written = jax.export.export(jax.jit(outputs))(jacobian, v).serialize()
    program = jax.export.deserialize(written)
    jacobian, v = batch_of(3, 6)[:], np.random.default_rng(4).normal(size=(3, 6))
    trees_close(program.call(jacobian, v), outputs(jacobian, v))


def trees_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(close, rtol=1e-9, atol=1e-11), actual, expected)


def test_softmax_jacobian_is_exported_with_a_symbolic_batch(symbolic):
    both = lambda x: jaxsoft.softmax_and_jacobian(x, where=x < 2, temperature=0.5, sink=0.1)
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 6"), jnp.float64)
    exported = jax.export.export(jax.jit(both))(x)
    for b in (1, 3):
        x = np.random.default_rng(5).normal(size=(b, 6))
        trees_close(exported.call(x), both(x))


@pytest.mark.parametrize("axis_name", [None, "classes", ("a", "b")])
def test_names_of_mesh_axes_are_written(axis_name):
    pytest.importorskip("flatbuffers", reason="JAX writes programs by it")
    jacobian = SimplexJacobian(jnp.ones(3), jnp.zeros(()), axis_name)
    exported = jax.export.export(jax.jit(lambda j: jax.tree.map(lambda x: 2 * x, j)))(jacobian)
    doubled = jax.export.deserialize(exported.serialize()).call(jacobian)
    assert doubled.axis_name == axis_name
    np.testing.assert_array_equal(doubled.weights, 2 * np.ones(3))


def test_other_names_cannot_be_written():
    pytest.importorskip("flatbuffers", reason="JAX writes programs by it")
    for axis_name in (1, ("a", 1)):
        jacobian = SimplexJacobian(jnp.ones(3), jnp.zeros(()), axis_name)
        exported = jax.export.export(jax.jit(lambda j: j.weights))(jacobian)
        with pytest.raises(TypeError, match=r"^SimplexJacobian: axis_name must be None"):
            exported.serialize()


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
        (J.__matmul__, (2.0,), ValueError, ".__matmul__: v must have an axis of classes, got ()"),
        (J.__matmul__, (np.zeros((3, 2)),), ValueError, ".__matmul__: v must broadcast to (2, 3)"),
        (J.__rmatmul__, (np.zeros(2),), ValueError, ".__rmatmul__: v must broadcast to (2, 3)"),
        (J.__matmul__, (np.zeros((2, 4, 3)),), ValueError, ".__matmul__: v of 3 axes must be mat"),
        (J.__rmatmul__, (np.zeros((2, 3, 4)),), ValueError, ".__rmatmul__: v of 3 axes must be ma"),
        (J.__matmul__, (np.zeros((4, 3, 1)),), ValueError, ".__matmul__: v of 3 axes must be mat"),
        (J.__matmul__, (J,), TypeError, ".__matmul__: v must be an array or a number, got Simplex"),
        (J.__matmul__, ([1.0] * 3,), TypeError, ".__matmul__: v must be an array or a number"),
        (J.__truediv__, (0,), ValueError, ".__truediv__: divisor must be positive, got 0"),
        (J.__truediv__, (-1.0,), ValueError, ".__truediv__: divisor must be positive, got -1.0"),
        (J.__truediv__, (np.ones(3),), ValueError, ".__truediv__: divisor must broadcast to (2,)"),
        (J.__getitem__, (2,), IndexError, ": 2 lies outside of batch axis 0 of size 2"),
        (J.__getitem__, ((..., None, -3),), IndexError, ": -3 lies outside of batch axis 0"),
        (J.__getitem__, ((0, 1),), IndexError, ": (0, 1) reaches into the matrices of shape (2, 3"),
        (J.__getitem__, (np.ones((2, 3), bool),), IndexError, ": array("),
        (J[0].__getitem__, (0,), IndexError, ": 0 reaches into the matrices of shape (3, 3)"),
        (J[0].__len__, (), TypeError, ": one matrix, (3, 3), has no length, no batch"),
        (J[0].__iter__, (), TypeError, ": one matrix, (3, 3), has no length, no batch"),
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
    "norm_bounds": lambda J, v: sum(J.norm_bounds()),
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


def gradient(name, of, sinks=None):
    """By the rows of what a method makes of each Jacobian, one program for a dtype."""
    fun = lambda row, sink: OF_A_ROW[name](of(row, sink), W.astype(row.dtype))
    return jax.jit(jax.vmap(jax.grad(fun), (0, sinks)))


def gradients_agree(gradient, rows, sinks=None):
    """Those in float32 and, of the very same numbers, in float64."""
    rows = np.asarray(rows, np.float32)
    single, double = (
        np.asarray(gradient(rows.astype(t), sinks if sinks is None else sinks.astype(t)), float)
        for t in (np.float32, float)
    )
    for one, other in zip(single, double, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.max(np.abs(other)))


# The methods of every run; the others divide by the same sums.
OFTEN = ("mv", "norm fro", "eigh_max", "slogdet", "solve", "sqrt_mv")
SOME_OFTEN = [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in OF_A_ROW]


@pytest.mark.optimised
# What a derivative divides by, a sum of weights of 1e-35 or of 1e25, has no square in float32.
@pytest.mark.parametrize("name", SOME_OFTEN)
def test_gradients_of_a_saturated_row_in_float32(name):
    of = lambda x, sink: jaxsoft.softmax_jacobian(x, sink=sink)
    row = [80.0, 0.0, -0.5, 0.25, -1.25]
    gradients_agree(gradient(name, of, 0), [row, row], np.array([-np.inf, 1.0]))


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("name", OF_A_ROW)
def test_gradients_of_a_saturated_row_without_a_sink_in_float32(name):
    of = lambda x, _: jaxsoft.softmax_jacobian(x)
    gradients_agree(gradient(name, of), [[80.0, 0.0, -0.5, 0.25, -1.25]])


# The slopes of a solution by weights, b / s², lie beyond float32 themselves; its change does not.
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_changes_of_a_solution_by_weights_of_any_size(scale):
    def change(dtype):
        s = jnp.asarray(scale * np.array([0.45, 0.25, 0.15, 0.1, 0.05]), dtype)
        fun = lambda s: SimplexJacobian(s, 0.1 * s[0]).solve(W.astype(dtype), 0.1 * s[1])
        return jax.jvp(fun, (s,), (s * W[::-1].astype(dtype),))[1]

    np.testing.assert_allclose(change(jnp.float32), change(jnp.float64), rtol=2e-5)


@pytest.mark.parametrize("name", [name for name in SOME_OFTEN if name.values != ("solve",)])
def test_gradients_by_weights_of_any_size(name):
    of = lambda s, _: SimplexJacobian(s, jnp.zeros((), s.dtype))
    weights = np.array([0.45, 0.25, 0.15, 0.1, 0.05])
    gradients_agree(gradient(name, of), [1e25 * weights, 1e-25 * weights])


@jax.jit
def most_of_a_row(jacobian, v):
    left_out = "effective_rank", "second", "certificate", "solve"
    return {name: f(jacobian, v) for name, f in OF_A_ROW.items() if name not in left_out}


# The weights of a temperature of 2^-126, the smallest normal float32; and a sum beyond it, of which
# the reciprocal is less than every normal number.
@pytest.mark.parametrize("sink", [0.0, 0.25])
@pytest.mark.parametrize("scale", [2.0**126, 1.5 * 2.0**126])
def test_weights_of_the_smallest_temperature(scale, sink):
    s = jnp.asarray(scale * np.array([0.45, 0.25, 0.15, 0.1, 0.05]), jnp.float32)
    single, double = (
        most_of_a_row(SimplexJacobian(s.astype(t), jnp.asarray(sink * scale, t)), W.astype(t))
        for t in (np.float32, float)
    )
    for name, value in single.items():
        np.testing.assert_allclose(value, double[name], rtol=1e-5, err_msg=name)
