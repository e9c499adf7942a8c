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
TABLES = {dtype: rows(dtype) for dtype in DTYPES}
LENGTHS = {dtype: sorted({row.size for row in table.values()}) for dtype, table in TABLES.items()}
# The lengths of every run; the other programs are like those of float32.
OFTEN = {
    "float32": LENGTHS["float32"],
    "float64": [3, 50, 1000],
    "bfloat16": [10, 5000],
    "float16": [3],
}


@functools.cache
def exact_row(dtype, name):
    return Exact(TABLES[dtype][name])


@pytest.fixture(
    params=[
        pytest.param((dtype, n), marks=() if n in OFTEN[dtype] else pytest.mark.slow)
        for dtype in DTYPES
        for n in LENGTHS[dtype]
    ],
    ids=lambda group: f"{group[0]}, n={group[1]}",
)
def group(request):
    """The rows of a dtype and a length, by their names: each program is that of all of them."""
    dtype, n = request.param
    return dtype, {
        name: exact_row(dtype, name) for name, row in TABLES[dtype].items() if row.size == n
    }


@functools.cache
def jitted(fun):
    """One program for all rows of a length."""
    return jax.jit(fun)


def eagerly_of_all_and_jitted(fun, given):
    """The results for each of the arguments: of one call with their stack, and row by row."""
    together = fun(*map(np.stack, zip(*given, strict=True)))
    for i, arguments in enumerate(given):
        results = jitted(fun)(*arguments)
        yield {key: (together[key][i], result) for key, result in results.items()}


def derivatives(x, v):
    """J v in both modes, and of probabilities that are stored."""
    p, pullback = jax.vjp(jaxsoft.softmax, x)
    _, pushed = jax.jvp(jaxsoft.softmax, (x,), (v,))
    return {"vjp": pullback(v)[0], "jvp": pushed, "stored": jaxsoft.softmax_vjp(p, v)}


def loss_and_gradient(x, labels):
    loss, pullback = jax.vjp(lambda x: jaxsoft.cross_entropy(x, labels), x)
    return {"loss": loss, "gradient": pullback(np.ones(loss.shape, loss.dtype))[0]}


def bound(dtype, eps, gap):
    """The contract: some eps and gap/2; 16-bit types are rounded once from float32."""
    return eps + gap / 2 if dtype in WIDE else 0.6


def vectors(exact, dtype):
    """Tangents and cotangents: one-hot at the top and elsewhere, random, and with an offset."""
    n = exact.row.size
    noise = np.random.default_rng(1).normal(size=n).astype(dtype)
    for k in sorted({0, n - 1, int(np.argmax(exact.row))}):
        yield f"one-hot {k}", np.eye(1, n, k)[0].astype(dtype)
    yield "random", noise
    if dtype in WIDE:
        yield "offset", noise + DTYPES[dtype](1000)


def labels(exact):
    n = exact.row.size
    choice = {0, n - 1, int(np.argmax(exact.row)), int(np.argmin(exact.row))}
    return [y for y in sorted(choice) if exact.row[y] > -np.inf]


def within(error, limit, *case):
    excess = np.max(np.asarray(error) - limit)
    assert excess <= 0, f"{case}: {np.max(error):.3g} eps, {excess:.3g} over the bound"


def test_softmax(group):
    dtype, table = group
    for name, exact in table.items():
        error = error_in_eps(jaxsoft.softmax(exact.row), exact.rounded(exact.p))
        within(error, bound(dtype, 6, exact.gaps), name)


def test_log_softmax(group):
    dtype, table = group
    for name, exact in table.items():
        error = error_in_eps(jaxsoft.log_softmax(exact.row), exact.rounded(exact.log_p))
        within(error, bound(dtype, 6, exact.gaps.max()), name)


def test_logsumexp(group):
    dtype, table = group
    for name, exact in table.items():
        mean = mpmath.fsum(p * abs(x) for p, x in zip(exact.p, exact.x, strict=True) if p > 0)
        scale = max(abs(exact.logsumexp), mean) or 1
        error = error_in_eps(jaxsoft.logsumexp(exact.row), exact.logsumexp, scale=scale)
        within(error, bound(dtype, 3, 0), name)


def test_vjp_and_jvp_of_softmax(group):
    dtype, table = group
    smallest = float(jnp.finfo("float64" if dtype == "float64" else "float32").tiny) / EPS[dtype]
    if dtype == "float16":
        smallest = float(jnp.finfo(dtype).smallest_subnormal) / EPS[dtype]
    cases = [
        (name, kind, exact, v)
        for name, exact in table.items()
        for kind, v in vectors(exact, DTYPES[dtype])
    ]
    results = eagerly_of_all_and_jitted(derivatives, [(exact.row, v) for *_, exact, v in cases])
    for (name, kind, exact, v), found in zip(cases, results, strict=True):
        # An entry is a product of two probabilities, so the gap counts once for each.
        limit = 8 + exact.gaps.max() if dtype in WIDE else 2
        product, spread = exact.jacobian_product(v)
        expected, scale = exact.rounded(product), np.maximum(spread, smallest)
        if kind == "offset":  # of reverse mode alone
            del found["jvp"]
        for mode, both in found.items():
            for result in both:
                within(error_in_eps(result, expected, scale=scale), limit, name, kind, mode)


def test_cross_entropy(group):
    dtype, table = group
    cases = [(name, exact, label) for name, exact in table.items() for label in labels(exact)]
    results = eagerly_of_all_and_jitted(
        loss_and_gradient, [(exact.row, label) for _, exact, label in cases]
    )
    for (name, exact, label), found in zip(cases, results, strict=True):
        loss_limit = bound(dtype, 6, exact.gaps.max())
        # The whole row enters the entry of the label, one exponential each of the others.
        gaps = exact.gaps.copy()
        gaps[label] = exact.gaps.max()
        others = mpmath.fsum(p for i, p in enumerate(exact.p) if i != label)
        expected = exact.rounded([*exact.p[:label], -others, *exact.p[label + 1 :]])
        for loss, gradient in zip(found["loss"], found["gradient"], strict=True):
            error = error_in_eps(loss, -exact.log_p[label], dtype=dtype)
            within(error, loss_limit, name, label)
            within(error_in_eps(gradient, expected), bound(dtype, 8, gaps), name, label)


def statistics_within_the_contract(exact, repeats, dtype):
    """Of the rows one after another, so many times."""
    x = np.tile([one.row for one in exact], (repeats, 1))
    labels = np.argmax(x, -1)
    arrays = jaxsoft.log_softmax(x), jaxsoft.cross_entropy(x, labels), jaxsoft.logsumexp(x, -1)
    for i, one in enumerate(exact):
        # Of numbers that should be equal the least and the largest err the most.
        of_one = (np.asarray(a)[i :: len(exact)].astype(float) for a in arrays)
        log_p, loss, lse = (np.stack([a.min(0), a.max(0)]) for a in of_one)
        limit = bound(dtype, 6, one.gaps.max())
        expected = one.rounded(one.log_p)
        within(error_in_eps(log_p, np.stack([expected] * 2), dtype=dtype), limit)
        within(error_in_eps(loss, np.full(2, -expected[labels[i]]), dtype=dtype), limit)
        scale = max(
            abs(float(one.logsumexp)), float(mpmath.fdot(one.p, map(abs, one.row.tolist())))
        )
        wanted = np.full(2, float(one.logsumexp))
        within(error_in_eps(lse, wanted, dtype=dtype, scale=scale), bound(dtype, 3, 0))


# On a CPU the sums of many rows are made otherwise than those of a few, and those of large arrays
# again otherwise.
@pytest.mark.parametrize("dtype", [*WIDE, "bfloat16"])
@pytest.mark.parametrize(("repeats", "large"), [(1, False), (1400, False), (2, True)])
def test_however_many_rows_there_are(dtype, repeats, large, monkeypatch):
    names = ("random n=1000", "all tied", "saturated n=1000")
    exact = [exact_row(dtype, name) for name in names if name in rows(dtype)]
    if large:
        for limit in ("_CACHE", "_LONG", "_SMALL"):
            monkeypatch.setattr(cpu, limit, 0)
    statistics_within_the_contract(exact, repeats, dtype)


@pytest.mark.parametrize("dtype", [*WIDE, "bfloat16"])
def test_an_odd_number_of_short_rows(dtype):
    statistics_within_the_contract([exact_row(dtype, "random n=10")], 4097, dtype)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_hundred_thousand_classes(dtype):
    rng = np.random.default_rng(4)  # of so many values the exact exponentials are soon made
    row = rng.choice(2 * rng.normal(size=2000), 100_000).astype(dtype)
    exact = Exact(row)
    limit = exact.gaps.max() / 2
    p = exact.rounded(exact.p)
    within(error_in_eps(jaxsoft.softmax(row), p), 6 + exact.gaps / 2)
    within(error_in_eps(jaxsoft.log_softmax(row), exact.rounded(exact.log_p)), 6 + limit)
    within(error_in_eps(jaxsoft.logsumexp(row), exact.logsumexp), 3)
    hot = np.eye(1, row.size, 7)[0].astype(dtype)
    product, spread = exact.jacobian_product(hot)
    expected = exact.rounded(product)
    pulled_back = jax.vjp(jaxsoft.softmax, row)[1](hot)[0]
    within(error_in_eps(pulled_back, expected, scale=spread), 8 + 2 * limit)
    found = loss_and_gradient(row, 7)
    within(error_in_eps(found["loss"], -exact.log_p[7]), 6 + limit)
    p[7] = exact.rounded([exact.p[7] - 1])[0]
    within(error_in_eps(found["gradient"], p), 8 + limit)


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
    found = jitted(loss_and_gradient)(exact.row, target)
    within(error_in_eps(found["loss"], loss), 8 + exact.gaps.max() / 2)
    within(error_in_eps(found["gradient"], gradient, scale=scale), 10 + exact.gaps.max() / 2)


entropy_and_gradient = jax.value_and_grad(jaxsoft.entropy)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", ["iris", "gap 20, spread", "gap 60", "random n=10", "near tie"])
def test_entropy(dtype, name):
    exact = exact_row(dtype, name)
    entropy = -mpmath.fsum(p * y for p, y in zip(exact.p, exact.log_p, strict=True) if p > 0)
    value, slope = jitted(entropy_and_gradient)(exact.row)
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
    d = np.array([float(c - b) for b, c in zip(p.log_p, q.log_p, strict=True)])
    by_x, spread = p.jacobian_product(-d)
    by_y = np.array([b - a for a, b in zip(p.p, q.p, strict=True)], float)
    limit = 8 + max(p.gaps.max(), q.gaps.max()) / 2
    found, gradients = jax.value_and_grad(jaxsoft.kl_divergence, (0, 1))(jnp.array(x), jnp.array(y))
    within(error_in_eps(found, divergence), limit)
    within(error_in_eps(gradients[0], np.array(by_x, float), scale=spread), limit)
    within(error_in_eps(gradients[1], by_y, scale=np.maximum(spread, np.abs(by_y))), limit)
    assert jaxsoft.kl_divergence(x, x) == 0


@pytest.mark.parametrize("jit", [False, True])
def test_the_second_derivative_of_a_confident_example(jit):
    x = np.array([20.0, 0.0, 0.0], np.float32)
    exact = Exact(x)
    p, other = exact.p, [mpmath.fsum(exact.p[j] for j in range(3) if j != i) for i in range(3)]
    jacobian = [[p[i] * other[i] if i == j else -p[i] * p[j] for j in range(3)] for i in range(3)]

    def all_of_them(x):
        return [
            jax.jacfwd(jaxsoft.softmax)(x),
            jax.jacrev(jaxsoft.softmax)(x),
            jax.hessian(lambda x: jaxsoft.cross_entropy(x, 0))(x),
            jax.hessian(lambda x: jaxsoft.cross_entropy(x, 1))(x),
            jax.hessian(jaxsoft.logsumexp)(x),
            jax.jacrev(jax.grad(jaxsoft.logsumexp))(x),
        ]

    for i, matrix in enumerate((jax.jit(all_of_them) if jit else all_of_them)(x)):
        within(error_in_eps(matrix, jacobian), 8 + 10, i)


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
