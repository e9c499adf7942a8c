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

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 3, 5)) * 2
V = RNG.normal(size=(3, 5))
LABELS = np.array([1, 4, 0])
HOT = np.eye(5)[LABELS]
TARGET = RNG.dirichlet(np.ones(5), size=3)
WEIGHTS = RNG.uniform(0.5, 2, size=5)
MASK = RNG.uniform(size=(3, 5)) > 0.3
MASK[:, 0] = MASK[np.arange(3), LABELS] = True
KEPT = MASK.astype(float)
TEMPERATURE = RNG.uniform(0.5, 2, size=(3, 1))
SINK = RNG.normal(size=(3, 1))
MANY = RNG.normal(size=(2, 20)) * 2  # classes: of up to 16 each meets each
MANY[0, 3] += 8


def plain_softmax(x, temperature=1.0, sink=None, mask=None):
    z = x / temperature
    e = jnp.exp(z) if mask is None else jnp.where(mask, jnp.exp(z), 0)
    total = e.sum(-1, keepdims=True)
    return e / (total if sink is None else total + jnp.exp(sink))


def plain_log(p, mask=None):
    return jnp.log(p) if mask is None else jnp.where(mask, jnp.log(jnp.where(mask, p, 1)), 0)


def plain_cross_entropy(x, target, temperature=1.0, cap=None, mask=None, z_loss=0.0):
    x = x if cap is None else cap * jnp.tanh(x / cap)
    e = jnp.exp(x / temperature)
    log_total = jnp.log((e if mask is None else jnp.where(mask, e, 0)).sum(-1, keepdims=True))
    loss = (target * (log_total - x / temperature)).sum(-1)
    return loss + z_loss * log_total[..., 0] ** 2


def plain_product(p, v):
    return p * (v - (p * v).sum(-1, keepdims=True))


# name: (function, reference, arguments)
CASES = {
    "softmax": (jaxsoft.softmax, plain_softmax, (X,)),
    "softmax, axis 0": (lambda x: jaxsoft.softmax(x, 0), lambda x: plain_softmax(x.T).T, (X,)),
    "softmax, all axes": (
        lambda x: jaxsoft.softmax(x, None),
        lambda x: plain_softmax(x.reshape(1, -1)).reshape(x.shape),
        (X,),
    ),
    "softmax, many classes": (jaxsoft.softmax, plain_softmax, (MANY,)),
    "softmax, options": (
        lambda x, t, s: jaxsoft.softmax(x, -1, MASK, temperature=t, sink=s),
        lambda x, t, s: plain_softmax(x, t, s, MASK),
        (X, TEMPERATURE, SINK),
    ),
    "log_softmax": (jaxsoft.log_softmax, lambda x: plain_log(plain_softmax(x)), (X,)),
    "log_softmax, many classes": (
        jaxsoft.log_softmax,
        lambda x: plain_log(plain_softmax(x)),
        (MANY,),
    ),
    "log_softmax, options": (
        lambda x, t, s: jnp.where(MASK, jaxsoft.log_softmax(x, -1, MASK, temperature=t, sink=s), 0),
        lambda x, t, s: plain_log(plain_softmax(x, t, s, MASK), MASK),
        (X, TEMPERATURE, SINK),
    ),
    "logsumexp": (lambda x: jaxsoft.logsumexp(x, -1), lambda x: jnp.log(jnp.exp(x).sum(-1)), (X,)),
    "logsumexp, b and where": (
        lambda x, b: jaxsoft.logsumexp(x, -1, b=b, return_sign=True, where=MASK)[0],
        lambda x, b: jnp.log(jnp.abs((KEPT * b * jnp.exp(x)).sum(-1))),
        (X, V),
    ),
    "entropy": (
        lambda x, t: jaxsoft.entropy(x, -1, MASK, temperature=t),
        lambda x, t: (
            -(
                plain_softmax(x, t, None, MASK) * plain_log(plain_softmax(x, t, None, MASK), MASK)
            ).sum(-1)
        ),
        (X, TEMPERATURE),
    ),
    "kl_divergence": (
        jaxsoft.kl_divergence,
        lambda x, y: (
            plain_softmax(x) * (plain_log(plain_softmax(x)) - plain_log(plain_softmax(y)))
        ).sum(-1),
        (X, Y),
    ),
    "softmax_jvp": (jaxsoft.softmax_jvp, plain_product, (TARGET, V)),
    "softmax_vjp": (jaxsoft.softmax_vjp, plain_product, (TARGET, V)),
    "softmax_vjp, many classes": (
        jaxsoft.softmax_vjp,
        plain_product,
        (plain_softmax(MANY), RNG.normal(size=MANY.shape)),
    ),
    "softmax_derivative": (
        lambda p: jaxsoft.softmax_derivative(p, LABELS, np.array([1, 2, 3])),
        lambda p: jnp.stack([p[0, 1] * (1 - p[0, 1]), -p[1, 4] * p[1, 2], -p[2, 0] * p[2, 3]]),
        (TARGET,),
    ),
    "cross_entropy": (
        lambda x: jaxsoft.cross_entropy(x, LABELS),
        lambda x: plain_cross_entropy(x, HOT),
        (X,),
    ),
    "cross_entropy, options": (
        lambda x, t, c: jaxsoft.cross_entropy(
            x,
            LABELS,
            -1,
            MASK,
            label_smoothing=0.1,
            z_loss=0.01,
            class_weights=WEIGHTS,
            temperature=t,
            softcap=c,
        ),
        lambda x, t, c: plain_cross_entropy(
            x,
            WEIGHTS[None] * (0.9 * HOT + 0.1 * KEPT / KEPT.sum(-1, keepdims=True)),
            t,
            c,
            MASK,
            0.01,
        ),
        (X, TEMPERATURE, np.array(3.0)),
    ),
    "cross_entropy, targets": (
        lambda x, q: jaxsoft.cross_entropy(x, q, label_smoothing=0.1),
        lambda x, q: plain_cross_entropy(x, 0.9 * q + 0.02),
        (X, TARGET),
    ),
}

OF_PROBABILITIES = (
    "softmax_jvp",
    "softmax_vjp",
    "softmax_vjp, many classes",
    "softmax_derivative",
)


@pytest.mark.parametrize("name", CASES)
def test_every_mode_in_float64(name):
    fun, reference, args = CASES[name]
    modes = MODES
    if name in OF_PROBABILITIES:  # the modes of two rows scale the second, which then sums to 3/4
        modes = tuple(mode for mode in MODES if not ("vmap" in mode or "scan" in mode))
    assert_derivatives(fun, *map(jnp.asarray, args), reference=reference, modes=modes)


@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_products_from_probabilities_under_vmap(name):
    fun, reference, args = CASES[name]
    rows = [jnp.stack([jnp.asarray(a), jnp.asarray(a)[::-1]]) for a in args]
    derivative = lambda f: jax.jit(jax.vmap(jax.jacrev(f)))(*rows)
    np.testing.assert_allclose(jax.vmap(fun)(*rows), jax.vmap(reference)(*rows), atol=1e-16)
    np.testing.assert_allclose(derivative(fun), derivative(reference), atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["softmax", "cross_entropy"])
def test_first_order_in_other_dtypes(name, dtype):
    fun, reference, args = CASES[name]
    assert_derivatives(fun, *(jnp.asarray(a, dtype) for a in args), reference=reference, order=1)


def test_third_order_of_softmax():
    derivative = lambda fun: jax.jacfwd(jax.jacrev(jax.jacfwd(fun)))
    x = jnp.asarray(X[0])
    exact = jax.jit(jax.jacfwd(jax.jacfwd(jax.jacfwd(plain_softmax))))(x)
    for outer in (derivative, lambda f: jax.jacrev(jax.jacrev(jax.jacrev(f)))):
        for fun in (jaxsoft.softmax, jax.jit(jaxsoft.softmax), jax.checkpoint(jaxsoft.softmax)):
            np.testing.assert_allclose(outer(fun)(x), exact, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy", "kl_divergence"])
def test_numerical_derivatives_of_order_two(name):
    fun, _, args = CASES[name]
    check_grads(fun, tuple(map(jnp.asarray, args)), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy"])
def test_taylor_coefficients(name):
    """Along a curve of the third degree, by `jax.jvp` within `jax.jvp`."""
    fun, reference, (x,) = CASES[name]
    x, *series = map(jnp.asarray, (x, Y, V, X[::-1]))

    def coefficients(fun):
        v, w, u = series
        derivative = lambda t: fun(x + t * v + t**2 / 2 * w + t**3 / 6 * u)
        out = []
        for _ in series:
            along = lambda f, t: jax.jvp(f, (t,), (1.0,))[1]
            derivative = functools.partial(along, derivative)
            out.append(derivative(0.0))
        return jnp.stack(out)

    exact = jax.jit(lambda: coefficients(reference))()
    np.testing.assert_allclose(jax.jit(lambda: coefficients(fun))(), exact, atol=1e-12)
    # `jet` raises on functions with a rule (jax-ml/jax#30352). Once it does not, it leaves the
    # rules out, and might return the wrong values.
    refusals = (KeyError, TypeError, AttributeError, jax.errors.UnexpectedTracerError)
    with contextlib.suppress(*refusals):
        _, by_jet = jet.jet(fun, (x,), (series,))
        np.testing.assert_allclose(jnp.stack(by_jet), exact, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "entropy"])
def test_order_two_within_a_scan(name):
    # `jacfwd(jacrev)` of a loop is where a bare `custom_vjp` would come to light.
    fun, reference, args = CASES[name]
    rest = tuple(map(jnp.asarray, args[1:]))

    def looped(fun, x):
        step = lambda total, row: (total + fun(row, *rest).sum(), None)
        return jax.lax.scan(step, jnp.zeros(()), jnp.stack([x, 0.5 * x]))[0]

    x = jnp.asarray(args[0])
    exact = jax.jit(jax.jacfwd(jax.jacfwd(functools.partial(looped, reference))))(x)
    for nesting in (jax.hessian, lambda f: jax.jacrev(jax.jacfwd(f))):
        matrix = nesting(functools.partial(looped, fun))(x)
        np.testing.assert_allclose(matrix, exact, atol=1e-13)


@pytest.mark.parametrize("reference", [plain_softmax, jaxsoft.softmax])
def test_the_dense_jacobian_of_the_two_rules(reference):
    x = jnp.asarray(X[0])
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
@pytest.mark.parametrize("options", [{}, {"axis": (0, 1)}, {"sink": 0.0}, {"where": MASK[:1, :1]}])
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
