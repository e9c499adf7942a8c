"""Every function in every mode, against `jax.jacfwd` of a plain float64 reference."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.testing import MODES, assert_derivatives
from tests.cases import CASES, OF_PROBABILITIES, arrays, plain_softmax

GIVEN = arrays(3, 5)
X, Y, V = (jnp.asarray(GIVEN[name]) for name in ("x", "y", "v"))
MANY = arrays(2, 20)  # classes: of up to 16 each meets each
MANY["x"][0, 3] += 8

# All of them for some functions; for every case a part in which it is differentiated forward and
# reverse, for several rows and twice.
IN_ALL_MODES = ("softmax", "cross_entropy")
# What others stand for: the same with options, and numbers and many classes in other tests.
SELDOM = ("softmax, a number", "log_softmax", "logsumexp, weights", "entropy", "kl_divergence")
PART = ("value", "vmap(jvp)", "vjp(scan)", "jacfwd(jacrev)", "jacrev(jacrev)")
OF_ORDER_TWO = MODES[-4:]
REST = tuple(mode for mode in MODES if mode not in PART)


def assert_right(name, given, modes, **options):
    """A function with a row of the table, in these modes."""
    fun, reference, _ = case = CASES[name]
    if name in OF_PROBABILITIES:  # the modes of two rows scale the second, which then sums to 3/4
        modes = [mode for mode in modes if not ("vmap" in mode or "scan" in mode)]
    given = {name: jnp.asarray(array) for name, array in case.chosen(given).items()}
    assert_derivatives(fun, given, reference=reference, modes=modes, **options)


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*slow(SELDOM), *(n for n in CASES if n not in SELDOM)])
def test_derivatives_in_float64(name):
    assert_right(name, GIVEN, PART)


@pytest.mark.parametrize("name", [*IN_ALL_MODES, *slow(n for n in CASES if n not in IN_ALL_MODES)])
def test_the_other_modes_in_float64(name):
    assert_right(name, GIVEN, REST)


@pytest.mark.parametrize("modes", [PART, pytest.param(REST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmax_vjp"])
def test_many_classes(name, modes):
    assert_right(name, MANY, modes)


@pytest.mark.parametrize("modes", [PART, pytest.param(REST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis", [0, None])
def test_other_axes(axis, modes):
    rows = lambda x: x.T if axis == 0 else x.reshape(1, -1)
    back = lambda p: p.T if axis == 0 else p.reshape(X.shape)
    reference = lambda x: back(plain_softmax(rows(x)))
    assert_derivatives(lambda x: jaxsoft.softmax(x, axis), X, reference=reference, modes=modes)


@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_products_from_probabilities_under_vmap(name):
    case = CASES[name]
    rows = {name: np.stack([a, a[::-1]]) for name, a in case.chosen(GIVEN).items()}
    held = {name: a for name, a in rows.items() if a.dtype == int}
    derivative = lambda f: jax.vmap(jax.jacrev(lambda live, held: f(live | held)))
    everything = jax.jit(
        lambda live: [(jax.vmap(f)(live | held), derivative(f)(live, held)) for f in case[:2]]
    )
    found, wanted = everything({name: a for name, a in rows.items() if name not in held})
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-16)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-15), found[1], wanted[1])


@pytest.mark.parametrize("modes", [PART, pytest.param(REST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["softmax", "cross_entropy"])
def test_first_order_in_other_dtypes(name, dtype, modes):
    given = GIVEN | {"x": X.astype(dtype)}
    first = [mode for mode in modes if mode not in OF_ORDER_TWO]
    assert_right(name, given, first, order=1)


def test_third_order_of_softmax():
    forward = lambda fun: jax.jacfwd(jax.jacfwd(jax.jacfwd(fun)))
    mixed = lambda fun: jax.jacfwd(jax.jacrev(jax.jacfwd(fun)))
    reverse = lambda fun: jax.jacrev(jax.jacrev(jax.jacrev(fun)))
    funs = (jaxsoft.softmax, jax.jit(jaxsoft.softmax), jax.checkpoint(jaxsoft.softmax))
    all_of_them = lambda x: [outer(fun)(x) for outer in (mixed, reverse) for fun in funs]
    exact, found = jax.jit(lambda x: (forward(plain_softmax)(x), all_of_them(x)))(X[0])
    for derivative in found:
        np.testing.assert_allclose(derivative, exact, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize(
    "name", ["cross_entropy", *slow(["softmax", "log_softmax", "kl_divergence"])]
)
def test_numerical_derivatives_of_order_two(name):
    fun = jax.jit(lambda live: CASES[name].fun(GIVEN | live))
    live = {name: a for name, a in CASES[name].chosen(GIVEN).items() if a.dtype == float}
    check_grads(fun, (live,), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy"])
def test_taylor_coefficients(name):
    """Along a curve of the third degree, by `jax.jvp` within `jax.jvp`."""
    fun, reference = (lambda x, f=f: f(GIVEN | {"x": x}) for f in CASES[name][:2])
    series = v, w, u = Y, V, X[::-1]

    def coefficients(fun):
        derivative = lambda t: fun(X + t * v + t**2 / 2 * w + t**3 / 6 * u)
        out = []
        for _ in series:
            along = lambda f, t: jax.jvp(f, (t,), (1.0,))[1]
            derivative = functools.partial(along, derivative)
            out.append(derivative(0.0))
        return out

    found, exact = jax.jit(lambda: (coefficients(fun), coefficients(reference)))()
    np.testing.assert_allclose(found, exact, atol=1e-12)
    # `jet` raises on functions with a rule (jax-ml/jax#30352). Once it does not, it leaves the
    # rules out, and might return the wrong values.
    refusals = (KeyError, TypeError, AttributeError, jax.errors.UnexpectedTracerError)
    with contextlib.suppress(*refusals):
        _, by_jet = jet.jet(fun, (X,), (series,))
        np.testing.assert_allclose(by_jet, exact, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "softmax",
        "cross_entropy",
        "entropy",
        pytest.param("entropy, options", marks=pytest.mark.slow),
    ],
)
def test_order_two_within_a_scan(name):
    # `jacfwd(jacrev)` of a loop is where a bare `custom_vjp` would come to light.
    def looped(fun, x):
        step = lambda total, row: (total + fun(GIVEN | {"x": row}).sum(), None)
        return jax.lax.scan(step, jnp.zeros(()), jnp.stack([x, 0.5 * x]))[0]

    fun, reference = (functools.partial(looped, f) for f in CASES[name][:2])
    nestings = jax.hessian, lambda f: jax.jacrev(jax.jacfwd(f))
    exact = jax.jacfwd(jax.jacfwd(reference))
    wanted, *found = jax.jit(lambda x: [exact(x), *(of(fun)(x) for of in nestings)])(X)
    for matrix in found:
        np.testing.assert_allclose(matrix, wanted, atol=1e-13)


@pytest.mark.parametrize("reference", [plain_softmax, jaxsoft.softmax])
def test_the_dense_jacobian_of_the_two_rules(reference):
    x = X[0]
    p = np.asarray(jaxsoft.softmax(x))
    dense = np.diag(p * (1 - p)) - (1 - np.eye(5)) * np.outer(p, p)
    np.testing.assert_allclose(jax.jacfwd(reference)(x), dense, atol=1e-16, rtol=1e-13)
    entry = jaxsoft.softmax_derivative
    entries = [[entry(p, i, j) for j in range(5)] for i in range(5)]
    np.testing.assert_allclose(entries, dense, rtol=1e-13)


# ------------------------------------------------------------------------ what is kept


def kept(fun, x, above):
    """Size and dtype of what reverse mode keeps, if it is larger than so many numbers."""
    # jax 0.6 keeps Python numbers among the arrays.
    leaves = map(jnp.asarray, jax.tree.leaves(jax.vjp(fun, x)[1]))
    return [(leaf.size, leaf.dtype) for leaf in leaves if leaf.size > above]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"axis": (0, 1)}, {"sink": 0.0}, {"where": np.ones((1, 1), bool)}]
)
def test_softmax_keeps_one_array(dtype, jit, options):
    x = jnp.ones((64, 100), dtype)
    fun = functools.partial(jaxsoft.softmax, **options)
    large = kept(jax.jit(fun) if jit else fun, x, above=100)
    assert [leaf for leaf in large if jnp.issubdtype(leaf[1], jnp.floating)] == [(6400, x.dtype)]
    assert len(large) == (2 if "where" in options else 1)  # and the mask, which is an argument


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1},
        {"ignore_index": 3, "class_weights": np.ones(100)},
    ],
)
def test_cross_entropy_keeps_the_logits_alone(dtype, options):
    x, labels = jnp.ones((64, 100), dtype), jnp.zeros(64, int)
    fun = lambda x: jaxsoft.cross_entropy(x, labels, **options)
    assert kept(fun, x, above=100) == [(6400, x.dtype)]
