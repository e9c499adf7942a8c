"""The accuracy contract, against 50-digit arithmetic."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxsoft
from jaxsoft._rows import cpu
from jaxsoft.testing import error_in_eps
from tests.exact import DTYPES, EPS, Exact, rows

pytestmark = pytest.mark.optimised

WIDE = ("float32", "float64")
TABLE = [(dtype, name) for dtype in DTYPES for name in rows(dtype)]


@functools.cache
def exact_row(dtype, name):
    return Exact(rows(dtype)[name])


@pytest.fixture(params=TABLE, ids=lambda case: f"{case[0]}, {case[1]}")
def case(request):
    dtype, name = request.param
    return dtype, exact_row(dtype, name)


@functools.cache
def jitted(fun):
    """One program for all rows of a length."""
    return jax.jit(fun)


def eager_and_jitted(fun, *args):
    yield fun(*args)
    yield jitted(fun)(*args)


def pulled_back(x, g):
    return jax.vjp(jaxsoft.softmax, x)[1](g)[0]


def pushed_forward(x, v):
    return jax.jvp(jaxsoft.softmax, (x,), (v,))[1]


def product_of_stored(x, g):
    return jaxsoft.softmax_vjp(jaxsoft.softmax(x), g)


loss_and_gradient = jax.value_and_grad(jaxsoft.cross_entropy)


def bound(dtype, eps, gap):
    """The contract: some eps and gap/2; 16-bit types are rounded once from float32."""
    return eps + gap / 2 if dtype in WIDE else 0.6


def vectors(exact, dtype):
    """Tangents and cotangents: one-hot at the top and elsewhere, random, and with an offset."""
    n = exact.row.size
    noise = np.random.default_rng(1).normal(size=n)
    hot = {0, n - 1, int(np.argmax(exact.row))} if n < 10_000 else {int(np.argmax(exact.row))}
    yield from (np.eye(1, n, k)[0].astype(DTYPES[dtype]) for k in hot)
    yield noise.astype(DTYPES[dtype])


def labels(exact):
    n = exact.row.size
    choice = {0, n - 1, int(np.argmax(exact.row)), int(np.argmin(exact.row))}
    return [y for y in sorted(choice) if exact.row[y] > -np.inf]


def within(error, limit):
    excess = np.max(np.asarray(error) - limit)
    assert excess <= 0, f"{np.max(error):.3g} eps, {excess:.3g} over the bound"


def test_softmax(case):
    dtype, exact = case
    expected = exact.rounded(exact.p)
    for p in eager_and_jitted(jaxsoft.softmax, exact.row):
        within(error_in_eps(p, expected), bound(dtype, 6, exact.gaps))


def test_log_softmax(case):
    dtype, exact = case
    expected = exact.rounded(exact.log_p)
    for y in eager_and_jitted(jaxsoft.log_softmax, exact.row):
        within(error_in_eps(y, expected), bound(dtype, 6, exact.gaps.max()))


def test_logsumexp(case):
    dtype, exact = case
    mean = mpmath.fsum(p * abs(x) for p, x in zip(exact.p, exact.x, strict=True) if p > 0)
    scale = max(abs(exact.logsumexp), mean)
    for value in eager_and_jitted(jaxsoft.logsumexp, exact.row):
        within(error_in_eps(value, exact.logsumexp, scale=scale or 1), bound(dtype, 3, 0))


def test_vjp_and_jvp_of_softmax(case):
    dtype, exact = case
    # An entry is a product of two probabilities, so the gap counts once for each.
    limit = 8 + exact.gaps.max() if dtype in WIDE else 2
    smallest = float(jnp.finfo("float64" if dtype == "float64" else "float32").tiny) / EPS[dtype]
    if dtype == "float16":
        smallest = float(jnp.finfo(dtype).smallest_subnormal) / EPS[dtype]
    for v in vectors(exact, dtype):
        product, spread = exact.jacobian_product(v)
        expected, scale = exact.rounded(product), np.maximum(spread, smallest)
        for fun in (pulled_back, pushed_forward):
            for result in eager_and_jitted(fun, exact.row, v):
                within(error_in_eps(result, expected, scale=scale), limit)
    if dtype in WIDE:  # with a common offset, reverse mode
        noise = np.random.default_rng(1).normal(size=exact.row.size).astype(dtype)
        v = noise + DTYPES[dtype](1000)
        product, spread = exact.jacobian_product(v)
        expected, scale = exact.rounded(product), np.maximum(spread, smallest)
        for fun in (pulled_back, product_of_stored):
            within(error_in_eps(jitted(fun)(exact.row, v), expected, scale=scale), limit)


def test_cross_entropy(case):
    dtype, exact = case
    for label in labels(exact):
        loss_limit = bound(dtype, 6, exact.gaps.max())
        # The whole row enters the entry of the label, one exponential each of the others.
        gaps = exact.gaps.copy()
        gaps[label] = exact.gaps.max()
        others = mpmath.fsum(p for i, p in enumerate(exact.p) if i != label)
        expected = exact.rounded([*exact.p[:label], -others, *exact.p[label + 1 :]])
        for loss, gradient in eager_and_jitted(loss_and_gradient, exact.row, label):
            within(error_in_eps(loss, -exact.log_p[label], dtype=dtype), loss_limit)
            within(error_in_eps(gradient, expected), bound(dtype, 8, gaps))


def statistics_within_the_contract(exact, repeats, dtype):
    """Of the rows one after another, so many times."""
    x = np.tile([one.row for one in exact], (repeats, 1))
    labels = np.argmax(x, -1)
    log_p, loss = jaxsoft.log_softmax(x), jaxsoft.cross_entropy(x, labels)
    lse = jaxsoft.logsumexp(x, -1)
    for i, one in enumerate(exact):
        every = slice(i, None, len(exact))
        limit = bound(dtype, 6, one.gaps.max())
        expected = one.rounded(one.log_p)
        errors = error_in_eps(log_p[every], np.tile(expected, (repeats, 1)), dtype=dtype)
        within(errors, limit)
        errors = error_in_eps(loss[every], np.full(repeats, -expected[labels[i]]), dtype=dtype)
        within(errors, limit)
        scale = max(
            abs(float(one.logsumexp)), float(mpmath.fdot(one.p, map(abs, one.row.tolist())))
        )
        errors = error_in_eps(
            lse[every], np.full(repeats, float(one.logsumexp)), dtype=dtype, scale=scale
        )
        within(errors, bound(dtype, 3, 0))


# On a CPU the sums of many rows are made otherwise than those of a few, those of large arrays again
# otherwise, and those of long rows in bfloat16.
@pytest.mark.parametrize("dtype", [*WIDE, "bfloat16"])
@pytest.mark.parametrize(("repeats", "large"), [(1, False), (1400, False), (2, True)])
def test_however_many_rows_there_are(dtype, repeats, large, monkeypatch):
    names = ("random n=1000", "all tied", "saturated n=1000")
    exact = [exact_row(dtype, name) for name in names if name in rows(dtype)]
    if large:
        monkeypatch.setattr(cpu, "_CACHE", 0)
        monkeypatch.setattr(cpu, "_LONG", 0)
    statistics_within_the_contract(exact, repeats, dtype)


@pytest.mark.parametrize("dtype", [*WIDE, "bfloat16"])
def test_an_odd_number_of_short_rows(dtype):
    statistics_within_the_contract([exact_row(dtype, "random n=10")], 4097, dtype)


@pytest.mark.parametrize("dtype", WIDE)
def test_a_hundred_thousand_classes(dtype):
    row = (2 * np.random.default_rng(4).normal(size=100_000)).astype(dtype)
    exact = Exact(row)
    limit = exact.gaps.max() / 2
    p = exact.rounded(exact.p)
    within(error_in_eps(jaxsoft.softmax(row), p), 6 + exact.gaps / 2)
    within(error_in_eps(jaxsoft.log_softmax(row), exact.rounded(exact.log_p)), 6 + limit)
    within(error_in_eps(jaxsoft.logsumexp(row), exact.logsumexp), 3)
    hot = np.eye(1, row.size, 7)[0].astype(dtype)
    product, spread = exact.jacobian_product(hot)
    expected = exact.rounded(product)
    within(error_in_eps(pulled_back(row, hot), expected, scale=spread), 8 + 2 * limit)
    loss, gradient = loss_and_gradient(row, 7)
    within(error_in_eps(loss, -exact.log_p[7]), 6 + limit)
    p[7] = exact.rounded([exact.p[7] - 1])[0]
    within(error_in_eps(gradient, p), 8 + limit)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", ["iris", "gap 20, spread", "gap 60", "random n=10", "all tied"])
def test_cross_entropy_with_targets(dtype, name):
    exact = exact_row(dtype, name)
    target = np.random.default_rng(2).dirichlet(np.ones(exact.row.size)).astype(dtype)
    target[np.argmax(exact.row)] = 1.0  # nearly all of it where the row is confident
    target = target.astype(dtype)
    q = [mpmath.mpf(float(t)) for t in target]
    total = mpmath.fsum(q)
    loss = -mpmath.fsum(t * y for t, y in zip(q, exact.log_p, strict=True))
    gradient = [total * p - t for p, t in zip(exact.p, q, strict=True)]
    whole = mpmath.fsum(exact.p)  # of 90 digits, so that some are left of whole - p
    scale = [p * (total - t) + t * (whole - p) for p, t in zip(exact.p, q, strict=True)]
    value, slope = jax.value_and_grad(jaxsoft.cross_entropy)(jnp.asarray(exact.row), target)
    within(error_in_eps(value, loss), 8 + exact.gaps.max() / 2)
    within(error_in_eps(slope, gradient, scale=scale), 10 + exact.gaps.max() / 2)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", ["iris", "gap 20, spread", "gap 60", "random n=10", "near tie"])
def test_entropy(dtype, name):
    exact = exact_row(dtype, name)
    entropy = -mpmath.fsum(p * y for p, y in zip(exact.p, exact.log_p, strict=True) if p > 0)
    value, slope = jax.value_and_grad(jaxsoft.entropy)(jnp.asarray(exact.row))
    within(error_in_eps(value, entropy), 8 + exact.gaps.max() / 2)
    product, spread = exact.jacobian_product(exact.row)
    expected = [-entry for entry in product]
    within(error_in_eps(slope, expected, scale=spread), 8 + exact.gaps.max() / 2)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 1.0, 20.0])
def test_kl_divergence_of_near_and_far_distributions(dtype, distance):
    rng = np.random.default_rng(3)
    x = rng.normal(size=30).astype(dtype)
    y = (x + distance * rng.normal(size=30)).astype(dtype)
    p, q = Exact(x), Exact(y)
    divergence = mpmath.fsum(a * (b - c) for a, b, c in zip(p.p, p.log_p, q.log_p, strict=True))
    # What the rounding of the logarithms leaves: eps of d = log q - log p, squared in the sum.
    spread = float(mpmath.sqrt(2 * divergence))
    limit = 16 + max(p.gaps.max(), q.gaps.max()) + 16 * EPS[dtype] / spread**2
    assert jaxsoft.kl_divergence(x, x) == 0
    within(error_in_eps(jaxsoft.kl_divergence(x, y), divergence), limit)


@pytest.mark.parametrize("jit", [False, True])
def test_the_second_derivative_of_a_confident_example(jit):
    x = jnp.array([20.0, 0.0, 0.0], jnp.float32)
    exact = Exact(np.asarray(x))
    p, other = exact.p, [mpmath.fsum(exact.p[j] for j in range(3) if j != i) for i in range(3)]
    jacobian = [[p[i] * other[i] if i == j else -p[i] * p[j] for j in range(3)] for i in range(3)]
    for fun in (
        jax.jacfwd(jaxsoft.softmax),
        jax.jacrev(jaxsoft.softmax),
        jax.hessian(lambda x: jaxsoft.cross_entropy(x, 0)),
        jax.hessian(lambda x: jaxsoft.cross_entropy(x, 1)),
        jax.hessian(jaxsoft.logsumexp),
        jax.jacrev(jax.grad(jaxsoft.logsumexp)),
    ):
        matrix = (jax.jit(fun) if jit else fun)(x)
        within(error_in_eps(matrix, jacobian), 8 + 10)


@pytest.mark.parametrize("offset", [1e-3, 3e-2, 1.0, -1e-3])
def test_the_gradient_of_a_divergence_of_confident_rows(offset):
    # q - p of class 0 rounds to 0, or to 6e-8, where 2e-10 is right.
    x = np.array([16, 0, 1], np.float32)
    y = (x + np.array([0, offset, offset / 3], np.float32)).astype(np.float32)
    gradient = jax.grad(lambda y: jaxsoft.kl_divergence(x, y))(jnp.asarray(y))
    p, q = Exact(x).p, Exact(y).p
    exact = [float(b - a) for a, b in zip(p, q, strict=True)]
    within(error_in_eps(gradient, np.array(exact)), 8 + Exact(x).gaps.max() / 2)


@pytest.mark.parametrize("name", ["random n=10", "gap 20, spread"])
def test_a_common_offset_in_both_modes_where_devices_share_the_classes(name):
    exact = exact_row("float32", name)
    v = (np.random.default_rng(1).normal(size=10) + 1000).astype(np.float32)

    def divided(x):
        of_part = jax.vmap(lambda x: jaxsoft.softmax(x, axis_name="i"), axis_name="i")
        return of_part(x.reshape(5, 2)).reshape(10)

    product, spread = exact.jacobian_product(v)
    (pulled,) = jax.vjp(divided, exact.row)[1](v)
    _, pushed = jax.jvp(divided, (exact.row,), (v,))
    for found in (pulled, pushed):
        errors = error_in_eps(found, exact.rounded(product), scale=spread)
        within(errors, 8 + exact.gaps.max())
