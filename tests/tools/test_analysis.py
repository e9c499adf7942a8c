"""jaxsoft.analysis against dense float64, and at its edges."""

import functools
import inspect
import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import jaxtyping
import mpmath
import numpy as np
import pytest

import jaxsoft
from jaxsoft.analysis import (
    JacobianReport,
    attention_jacobian,
    fisher_vp,
    ggn_vp,
    input_jacobian,
    input_sensitivity,
    jacobian_report,
)

INF, NAN = np.inf, np.nan
FLOATS = [name for name in JacobianReport._fields if name not in ("predicted", "runner_up")]


def normal(seed, *shape, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(actual, expected, tolerance=1e-12):
    """Within a tolerance relative to the largest entry."""
    expected = np.asarray(expected)
    scale = max(np.max(np.abs(expected), initial=0), np.finfo(float).tiny)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def trees_close(actual, expected, tolerance=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: close(a, b, tolerance), actual, expected)


def dense_softmax(x, where=None, temperature=1.0):
    """Probabilities of one row and the whole Jacobian by the logits, by numpy."""
    x = np.asarray(x, float)
    keep = np.isfinite(x) if where is None else np.asarray(where) & np.isfinite(x)
    z = np.where(keep, x, 0) / temperature
    p = np.where(keep, np.exp(z - z[keep].max()), 0)
    p /= p.sum()
    return p, (np.diag(p) - np.outer(p, p)) / temperature


# ------------------------------------------------------------------------------------- the report


def dense_report(x, where=None, temperature=1.0):
    """Everything from the dense matrix of one row; ∂H/∂T by differences of order six."""
    p, jacobian = dense_softmax(x, where, temperature)
    kept = np.flatnonzero(p)
    ranked = kept[np.argsort(-np.asarray(x)[kept], kind="stable")]
    off = np.abs(jacobian - np.diag(np.diag(jacobian)))

    def entropy(t):
        q = dense_softmax(x, where, t)[0][kept]
        return -np.sum(q * np.log(q))

    return {
        "predicted": ranked[0],
        "runner_up": ranked[1],
        "entropy": entropy(temperature),
        "top_eigenvalue": np.linalg.eigvalsh(jacobian)[-1],
        "trace": np.trace(jacobian),
        "frobenius_norm": np.linalg.norm(jacobian),
        "effective_rank": np.trace(jacobian) ** 2 / np.linalg.norm(jacobian) ** 2,
        "temperature_sensitivity": sixth_order(
            lambda s: entropy(temperature + s), 1e-2 * temperature
        ),
        "cross_influence": off.max(),
        "certified_radius": (x[ranked[0]] - x[ranked[1]]) / 2,
    }  # fmt: skip


def floats(*args, **kwargs):
    """The floating numbers of the report, along a new last axis."""
    report = jacobian_report(*args, **kwargs)
    return jnp.stack([getattr(report, name) for name in FLOATS], -1)


def sixth_order(fun, h):
    """The derivative of a function of one number at 0, by central differences."""
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    return sum(w * (fun(k * h) - fun(-k * h)) / h for k, w in weights.items())


def assert_dense(report, rows, where, temperature):
    for i, row in enumerate(rows):
        for name, expected in dense_report(row, where, temperature).items():
            # A sixth-order difference of h = 0.01 T is good to about 1e-9 of the entropy.
            tolerance = 1e-8 if name == "temperature_sensitivity" else 2e-12
            actual = getattr(report, name)[i]
            np.testing.assert_allclose(actual, expected, rtol=tolerance, err_msg=name)


def report_of_six(x, where=True, temperature=1.0):
    """The report of six rows of seven logits: the same program in many tests, compiled once."""
    where = jnp.broadcast_to(jnp.asarray(where), (6, 7))
    temperature = jnp.broadcast_to(jnp.asarray(temperature, x.dtype), (6, 1))
    return jacobian_report(x, where=where, temperature=temperature)


def test_report_is_that_of_the_dense_matrix():
    x = np.array(2 * normal(0, 6, 7))
    x[1] += 1e4
    x[2, 3] = -INF
    mask = np.array([True, False, True, True, False, True, True])
    report = jacobian_report(jnp.asarray(x))
    assert_dense(report, x, None, 1.0)
    for where, temperature in ((mask, 2.5), (np.ones(7, bool), 0.7)):
        assert_dense(report_of_six(jnp.asarray(x), where, temperature), x, where, temperature)
    assert all(getattr(report, name).dtype == jnp.float64 for name in FLOATS)
    assert report.predicted.dtype == report.runner_up.dtype == jnp.int32


def test_report_of_equal_logits():
    report = row_of(report_of_six(jnp.full((6, 7), 3.0), np.arange(7) < 5), 0)
    assert (report.predicted, report.runner_up) == (0, 1)
    assert report.certified_radius == report.temperature_sensitivity == 0
    np.testing.assert_allclose(report.entropy, np.log(5), rtol=1e-15)
    for name, expected in {
        "top_eigenvalue": 0.2, "trace": 0.8, "frobenius_norm": 0.4, "effective_rank": 4.0,
        "cross_influence": 0.04,
    }.items():  # fmt: skip
        np.testing.assert_allclose(getattr(report, name), expected, rtol=1e-15)


def row_of(report, i):
    return jax.tree.map(lambda leaf: leaf[i], report)


def exact_report(row, temperature):
    """By 50 digits, for a row of float32 numbers whose first is the largest."""
    with mpmath.workdps(50):
        t, x = mpmath.mpf(temperature), [mpmath.mpf(float(value)) for value in row]
        e = [mpmath.exp((value - x[0]) / t) for value in x]
        p = [value / mpmath.fsum(e) for value in e]
        n = len(p)
        jacobian = mpmath.matrix(n, n)
        for i in range(n):
            for j in range(n):
                others = mpmath.fsum(p[k] for k in range(n) if k != i)
                jacobian[i, j] = p[i] * (others if i == j else -p[j]) / t
        mean = mpmath.fsum(map(mpmath.fmul, p, x))
        variance = mpmath.fsum(q * (value - mean) ** 2 for q, value in zip(p, x, strict=True))
        norm = mpmath.sqrt(mpmath.fsum(entry**2 for entry in jacobian))
        trace = mpmath.fsum(jacobian[i, i] for i in range(n))
        return {
            "entropy": -mpmath.fsum(q * mpmath.log(q) for q in p),
            "top_eigenvalue": max(mpmath.eigsy(jacobian, eigvals_only=True)),
            "trace": trace,
            "frobenius_norm": norm,
            "effective_rank": (trace / norm) ** 2,
            "temperature_sensitivity": variance / t**3,
            "cross_influence": p[0] * p[1] / t,
            "certified_radius": (x[0] - x[1]) / 2,
        }


def test_report_of_saturated_rows_keeps_its_digits():
    rows = np.array([[gap, 0.25, 0.0] for gap in (20, 40, 80, 20, 40, 80)], np.float32)
    temperatures = np.array([1, 1, 1, 1.5, 1.5, 1.5], np.float32)
    report = jacobian_report(jnp.asarray(rows), temperature=jnp.asarray(temperatures)[:, None])
    for i, (row, temperature) in enumerate(zip(rows, temperatures, strict=True)):
        for name, expected in exact_report(row, float(temperature)).items():
            error = abs(mpmath.mpf(float(getattr(report, name)[i])) / expected - 1)
            assert error < 3e-6, (name, i, float(error))


def test_report_along_any_axes_and_under_vmap():
    rows = normal(1, 6, 7)
    temperature = jnp.linspace(0.5, 2, 6)
    expected = report_of_six(rows, temperature=temperature[:, None])
    padded = jnp.pad(rows, ((0, 0), (0, 1)))  # [6, 2 × 4], with a class that is masked
    apart = padded.reshape(6, 2, 4).transpose(1, 0, 2)
    where = (jnp.arange(8) < 7).reshape(2, 1, 4)
    each = jax.vmap(lambda x, t: jacobian_report(x, None, temperature=t))

    @jax.jit
    def reports():
        return (
            jacobian_report(apart, (0, 2), where, temperature=temperature[None, :, None]),
            each(rows, temperature[:, None]),
            jacobian_report(rows.T, 0, temperature=temperature[None]),
        )

    for report in reports():
        trees_close(report, expected, 1e-14)


def test_report_is_differentiable():
    x, v = normal(3, 6), normal(4, 6)
    mask = jnp.array([True, True, False, True, True, True])
    values = jax.jit(lambda x, t: floats(x, where=mask, temperature=t))
    derivatives = jax.jit(
        lambda *at: (jax.jacrev(values, (0, 1))(*at), jax.jvp(values, at, (v, 1.0))[1])
    )
    (by_x, by_t), forward = derivatives(x, 1.3)
    np.testing.assert_allclose(by_x @ v + by_t, forward, rtol=1e-12)
    difference = sixth_order(lambda s: values(x + s * v, 1.3 + s), 1e-3)
    np.testing.assert_allclose(forward, difference, rtol=1e-9)
    np.testing.assert_array_equal(by_x[:, 2], 0)


def test_derivatives_of_the_report_are_finite_in_saturated_and_one_class_rows():
    x = jnp.array(
        [[1e4, 0, 0], [80, 0, -INF], [3, -INF, -INF], [-INF, -INF, -INF], [-1e30, 1e30, 0]],
        jnp.float32,
    )
    derivatives = jax.jit(jax.vmap(jax.jacrev(lambda x, t: floats(x, temperature=t))))
    for temperature in (1.0, 1e-3):
        by_x = derivatives(x, jnp.full(5, temperature, jnp.float32))
        assert np.all(np.isfinite(by_x))
        np.testing.assert_array_equal(by_x[2:4], 0)


def test_report_of_rows_without_a_second_class():
    x = jnp.full((6, 7), -INF).at[0, 3].set(3.0).at[1:3].set(NAN).at[1, 5].set(4.0)
    x = x.at[4, 2].set(-1e300)
    where = np.ones((6, 7), bool)
    where[1:3] = np.arange(7) == 5
    where[2] = False
    report = report_of_six(x, where)
    single, none = jacobian_report(jnp.array([[3.0], [-INF]])), jacobian_report(jnp.zeros(0))
    one_class = [row_of(report, 0), row_of(report, 1), row_of(report, 4), row_of(single, 0)]
    no_class = [*(row_of(report, i) for i in (2, 3, 5)), row_of(single, 1), none]
    assert [int(row.predicted) for row in one_class] == [3, 5, 2, 0]
    assert [int(row.predicted) for row in no_class] == [-1] * 5
    for row in one_class + no_class:
        assert row.runner_up == -1
        radius = 0 if row.predicted == -1 else INF
        numbers = {name: float(getattr(row, name)) for name in FLOATS}
        assert numbers == dict.fromkeys(FLOATS, 0.0) | {"certified_radius": radius}
    assert jacobian_report(jnp.zeros((0, 3))).trace.shape == (0,)


def test_bad_rows_of_the_report_are_nan_alone():
    good = normal(5, 6, 7)
    x = good.at[1, 2].set(NAN).at[3, 0].set(INF)
    report = report_of_six(x, temperature=jnp.ones((6, 1)).at[4].set(-1.0))
    without = report_of_six(good)
    bad, rest = np.array([1, 3, 4]), np.array([0, 2, 5])
    for name in FLOATS:
        assert np.all(np.isnan(getattr(report, name)[bad])), name
        np.testing.assert_array_equal(getattr(report, name)[rest], getattr(without, name)[rest])
    np.testing.assert_array_equal(report.predicted[bad], -1)
    np.testing.assert_array_equal(report.runner_up[bad], -1)


def test_certified_radius_is_exact():
    for seed in range(10):
        x, temperature = 3 * normal(seed, 6, 7), jnp.linspace(0.3, 3, 6)[:, None]
        report = report_of_six(x, temperature=temperature)
        own = np.arange(7) == np.asarray(report.predicted)[:, None]
        worst = np.where(own, -1.0, 1.0)  # the predicted class down, all others up
        for factor, stays in ((1 - 1e-12, True), (1 + 1e-12, False)):
            moved = x + factor * report.certified_radius[:, None] * worst
            answers = np.argmax(np.asarray(moved / temperature), -1)
            assert np.all((answers == np.asarray(report.predicted)) == stays)


def test_report_of_16_bits_and_integers():
    x = jnp.array([[1, 4, 2], [0, 0, 9]])
    wide = jacobian_report(x.astype(jnp.float32))
    assert wide.trace.dtype == jnp.float32
    trees_close(jacobian_report(x.astype(jnp.bfloat16)), wide, 0)
    of_integers = jax.eval_shape(jacobian_report, x)
    assert of_integers.trace == jax.ShapeDtypeStruct((2,), jnp.float64)


# ------------------------------------------------------------------------------------- the inputs


def network(seed, d, n, hidden=6):
    w1, w2 = weights_of(seed, d, n, hidden)
    return lambda x: w2 @ jnp.tanh(w1 @ x.reshape(-1))


def weights_of(seed, d, n, hidden=6):
    return normal(seed, hidden, d), normal(seed + 1, n, hidden)


def dense_input_jacobian(seed, x, n, hidden=6, where=None, temperature=1.0):
    """By numpy, of the network of this seed."""
    w1, w2 = map(np.asarray, weights_of(seed, x.shape[1], n, hidden))
    inner = [np.tanh(w1 @ row) for row in np.asarray(x)]
    of_model = [w2 * (1 - row**2) @ w1 for row in inner]
    jacobians = [dense_softmax(w2 @ row, where, temperature)[1] for row in inner]
    return np.stack([j @ of for j, of in zip(jacobians, of_model, strict=True)])


@pytest.mark.parametrize(("n", "d"), [(3, 8), (9, 4), (1, 3), (4, 1)])
def test_input_jacobian_is_the_dense_product(n, d):
    f, x = network(7, d, n), normal(8, 5, d)
    jacobian = jax.jit(lambda x: input_jacobian(f, x))(x)
    close(jacobian, dense_input_jacobian(7, x, n), 1e-13)


def test_chunks_of_examples_make_the_whole():
    f, x = network(7, 3, 4), normal(8, 5, 3)

    @jax.jit
    def of_chunks(x):
        jacobians = [input_jacobian(f, x, batch_size=size) for size in (None, 1, 2, 100)]
        return jacobians, [input_sensitivity(f, x, batch_size=size) for size in (None, 2)]

    for whole, *others in of_chunks(x):
        for other in others:
            close(other, whole, 1e-14)


@pytest.mark.parametrize(("n", "d"), [(3, 8), (9, 4), (1, 3), (4, 1), (60, 35)])
def test_input_sensitivity_is_the_top_singular_value(n, d):
    f, x = network(9, d, n, hidden=50), normal(10, 5, d)
    expected = np.linalg.norm(dense_input_jacobian(9, x, n, hidden=50), 2, axis=(1, 2))
    close(input_sensitivity(f, x, steps=60), expected, 1e-13)
    if min(n - 1, d) > 32:  # fewer steps by default than the rank: a lower bound
        default = input_sensitivity(f, x)
        assert np.all(default <= expected * (1 + 1e-13))
        close(default, expected, 1e-12)


def test_inputs_keep_the_shape_of_an_example():
    f, x = network(11, 12, 5), normal(12, 4, 3, 4)
    jacobian, flat, sensitivity = jax.jit(
        lambda x: (
            input_jacobian(f, x),
            input_jacobian(lambda x: f(x.reshape(3, 4)), x.reshape(4, 12)),
            input_sensitivity(f, x),
        )
    )(x)
    assert jacobian.shape == (4, 5, 3, 4)
    close(np.reshape(jacobian, (4, 5, 12)), flat, 1e-15)
    close(sensitivity, np.linalg.norm(flat, 2, axis=(1, 2)), 1e-13)
    assert input_jacobian(f, x[:0]).shape == (0, 5, 3, 4)
    assert input_sensitivity(f, x[:0]).shape == (0,)
    empty = jnp.zeros((2, 0))
    constant = lambda x: jnp.zeros(3) + jnp.sum(x)
    assert input_jacobian(constant, empty).shape == (2, 3, 0)
    np.testing.assert_array_equal(input_sensitivity(constant, empty), 0)


def test_a_model_holds_its_own_temperature_and_mask():
    f, x, temperature = network(9, 3, 4), normal(8, 5, 3), 0.4
    keep = jnp.array([True, False, True, True])
    model = lambda x: jnp.where(keep, f(x) / temperature, -INF)
    w, v = normal(26, 3, 4), normal(27, 3, 4)

    @jax.jit
    def found(x):
        linear = lambda w, x: jnp.where(keep, x @ w / temperature, -INF)
        return input_jacobian(model, x), input_sensitivity(model, x), ggn_vp(linear, w, x, v)

    jacobian, sensitivity, product = found(x)
    expected = dense_input_jacobian(9, x, 4, where=keep, temperature=temperature)
    close(jacobian, expected, 1e-13)
    close(sensitivity, np.linalg.norm(expected, 2, axis=(1, 2)), 1e-13)
    x, w, v = map(np.asarray, (x, w, v))
    of_logits = [dense_softmax(row @ w, keep, temperature)[1] @ (row @ v) for row in x]
    close(product, np.einsum("id,in->dn", x, of_logits) / temperature / 5, 1e-13)


@pytest.mark.optimised
def test_inputs_of_a_confident_example():
    # In float32 1 - p is 0 here, and squares of the small probabilities underflow.
    w, b = np.array([[1.0, 2.0], [0.5, -1.0], [-2.0, 1.0]]), np.array([80.0, 0.0, 1.0])
    f = lambda x: jnp.asarray(w, jnp.float32) @ x + jnp.asarray(b, jnp.float32)
    e = np.exp(b - b[0])
    p = e / e.sum()
    jacobian = np.diag(p) - np.outer(p, p)
    jacobian[0, 0] = p[0] * (p[1] + p[2])
    exact = jacobian @ w
    x = jnp.zeros((1, 2), jnp.float32)
    np.testing.assert_allclose(input_jacobian(f, x)[0], exact, rtol=3e-6)
    expected = np.linalg.norm(exact / p[2], 2) * p[2]
    np.testing.assert_allclose(input_sensitivity(f, x)[0], expected, rtol=3e-6)


def test_inputs_of_wide_models_and_of_16_bits():
    f = network(13, 4, 3)
    x = normal(14, 2, 4)
    narrow = lambda x: f(x.astype(float)).astype(jnp.bfloat16)
    jacobian, sensitivity = jax.jit(
        lambda x: (input_jacobian(narrow, x), input_sensitivity(narrow, x))
    )(x.astype(jnp.bfloat16))
    assert jacobian.dtype == sensitivity.dtype == jnp.float32
    close(jacobian, dense_input_jacobian(13, x, 3), 4 * 2.0**-8)


def test_a_bad_example_is_nan_alone():
    f, x = network(15, 4, 3), normal(16, 3, 4)
    both = jax.jit(lambda x: (input_jacobian(f, x), input_sensitivity(f, x)))
    bad = np.where(np.arange(12).reshape(3, 4) == 4, NAN, x)
    for spoilt, good in zip(both(bad), both(x), strict=True):
        assert np.all(np.isnan(spoilt[1]))
        close(np.asarray(spoilt)[::2], np.asarray(good)[::2], 1e-14)


def test_a_constant_model_has_no_sensitivity():
    x = normal(17, 2, 3)
    models = (lambda x: jnp.zeros(4) * x[0], lambda x: jnp.array([0.0, -INF]) + x[0])
    of_model = lambda f, x: (
        input_jacobian(f, x),
        jax.value_and_grad(lambda x: input_sensitivity(f, x).sum())(x),
    )
    for jacobian, (value, gradient) in jax.jit(lambda x: [of_model(f, x) for f in models])(x):
        np.testing.assert_array_equal(jacobian, 0)
        assert value == 0
        assert np.all(np.isfinite(gradient))


def test_input_sensitivity_is_differentiable_by_input_and_model():
    x, w, v = normal(18, 3, 5), normal(19, 4, 5), normal(20, 4, 5)

    def penalty(x, w):
        return jnp.sum(input_sensitivity(lambda x: jnp.sin(w @ x), x))

    def dense(x, w):
        def of_example(x):
            jacobian = jax.jacfwd(lambda x: jax.nn.softmax(jnp.sin(w @ x)))(x)
            return jnp.linalg.norm(jacobian, 2)

        return jnp.sum(jax.vmap(of_example)(x))

    exact, reverse, forward = jax.jit(
        lambda x, w: (
            jax.grad(dense, (0, 1))(x, w),
            jax.grad(penalty, (0, 1))(x, w),
            jax.jvp(lambda w: penalty(x, w), (w,), (v,))[1],
        )
    )(x, w)
    trees_close(reverse, exact, 1e-11)
    close(forward, np.sum(np.asarray(exact[1]) * v), 1e-11)


def test_nothing_is_of_the_size_of_the_matrix():
    n = 4096
    matrix = 4 * n * n
    x = jax.ShapeDtypeStruct((n,), jnp.float32)
    w = jax.ShapeDtypeStruct((n, 8), jnp.float32)
    inputs = jax.ShapeDtypeStruct((1, 8), jnp.float32)

    def sensitivity(w, x):
        return input_sensitivity(lambda x: w @ x, x)

    def jacobian(w, x):
        return input_jacobian(lambda x: w @ x, x)

    for fun, args in ((jacobian_report, (x,)), (sensitivity, (w, inputs)), (jacobian, (w, inputs))):
        compiled = jax.jit(fun).lower(*args).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < matrix / 16


# ------------------------------------------------------------------------------------- curvature


def mlp(params, x):
    w2, scale = params["out"]
    return jnp.tanh(x @ params["w1"]) @ w2 * scale


MLP = {"w1": normal(21, 3, 4), "out": (normal(22, 4, 5), normal(23))}
X = normal(24, 6, 3)


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)


def dense_fisher(model, params, x, weights, *, by_classes):
    """Σ_i w_i Σ_y p_y g gᵀ, from the scores; or Σ_i w_i Gᵀ (diag p - p pᵀ) G."""
    vector, unflatten = flat(params)
    jacobians = np.asarray(jax.jit(jax.jacfwd(lambda u: model(unflatten(u), x)))(vector))
    total = np.zeros((vector.size, vector.size))
    for logits, of_model, weight in zip(model(params, x), jacobians, weights, strict=True):
        p, middle = dense_softmax(logits)
        if by_classes:
            scores = (np.eye(p.size) - p) @ of_model
            total += weight * np.einsum("y,yi,yj->ij", p, scores, scores)
        else:
            total += weight * of_model.T @ middle @ of_model
    return total


@pytest.mark.parametrize("fun", [fisher_vp, ggn_vp])
@pytest.mark.parametrize("weighted", [False, True])
def test_curvature_is_the_dense_one(fun, weighted):
    weights = jnp.array([1.0, 0.5, 0.0, 2.0, 1.0, 0.25]) if weighted else None
    vector, unflatten = flat(MLP)
    v = normal(25, vector.size)
    each = np.ones(6) if weights is None else np.asarray(weights)
    dense = dense_fisher(mlp, MLP, X, each / each.sum(), by_classes=fun is fisher_vp)
    product = jax.jit(lambda params, v: fun(mlp, params, X, v, weights=weights))
    trees_close(product(MLP, unflatten(v)), unflatten(jnp.asarray(dense @ v)), 1e-13)


def test_fisher_is_the_gauss_newton_matrix_and_semi_definite():
    vector, unflatten = flat(MLP)

    def matrix(fun):
        return jax.vmap(lambda v: flat(fun(mlp, MLP, X, unflatten(v)))[0])(jnp.eye(vector.size))

    fisher, ggn = jax.jit(lambda: (matrix(fisher_vp), matrix(ggn_vp)))()
    close(fisher, ggn, 1e-13)
    close(fisher, fisher.T, 1e-14)
    assert np.linalg.eigvalsh(fisher)[0] > -1e-14


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    w, labels = normal(26, 3, 5), np.array([0, 1, 2, 3, 4, 0])
    v = normal(27, 3, 5)
    # Class weights scale the Hessian of each example, and an ignored example has none.
    class_weights = np.array([1.0, 2.0, 0.5, 1.0, 3.0])
    weights = np.where(labels == 3, 0, class_weights[labels])

    def weighted(w):
        losses = jaxsoft.cross_entropy(X @ w, labels, class_weights=class_weights, ignore_index=3)
        return losses.sum()

    @jax.jit
    def both(w):
        linear = lambda w, x: x @ w
        losses = (lambda w: jaxsoft.cross_entropy(X @ w, labels).mean(), weighted)
        products = (
            ggn_vp(linear, w, X, v),
            ggn_vp(linear, w, X, v, weights=weights, reduction="sum"),
        )
        return products, [jnp.tensordot(jax.hessian(loss)(w), v, 2) for loss in losses]

    for product, expected in zip(*both(w), strict=True):
        close(product, expected, 1e-13)


@pytest.mark.parametrize("fun", [fisher_vp, ggn_vp])
def test_curvature_of_a_confident_model_keeps_its_digits(fun):
    # One parameter scales the logits, of which one is ahead by 40: F = Var_p(logits).
    logits = np.array([40.0, 0.0, 1.0])
    e = np.exp(logits - 40)
    p = e / e.sum()
    variance = p[1] * (logits[1] - 40) ** 2 + p[2] * (logits[2] - 40) ** 2
    model = lambda scale, x: scale * x
    x = jnp.asarray(logits[None], jnp.float32)
    one = jnp.float32(1)
    np.testing.assert_allclose(fun(model, one, x, one), variance, rtol=3e-6)


def test_curvature_at_the_edges():
    fun = jax.jit(fisher_vp, static_argnums=0)  # `ggn_vp` differs in the product by J alone
    v = jax.tree.map(jnp.ones_like, MLP)
    zeros = jax.tree.map(jnp.zeros_like, MLP)
    trees_close(fun(mlp, MLP, X, v, weights=jnp.zeros(6)), zeros)
    trees_close(fun(mlp, MLP, X[:0], v), zeros)
    one = fun(mlp, MLP, X[0], v)  # a single example, logits of shape [n]
    trees_close(one, fun(mlp, MLP, X[:1], v), 1e-14)
    # Per example by vmap; their mean is the whole.
    each = jax.jit(jax.vmap(lambda x: fisher_vp(mlp, MLP, x, v)))(X)
    trees_close(jax.tree.map(lambda leaf: leaf.mean(0), each), fun(mlp, MLP, X, v), 1e-13)
    # An example of weight 0 has no influence, NaN logits included.
    nan_logits = lambda params, x: jnp.where(jnp.arange(6)[:, None] == 2, NAN, mlp(params, x))
    weights = jnp.where(jnp.arange(6) == 2, 0, 1)
    out = fun(nan_logits, MLP, X, v, weights=weights)
    trees_close(out, fun(mlp, MLP, X, v, weights=weights), 1e-14)
    # 16-bit parameters stay 16-bit.
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MLP)
    out = fun(mlp, narrow, X.astype(jnp.bfloat16), v)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(out))


def test_curvature_is_differentiable():
    v = jax.tree.map(jnp.ones_like, MLP)
    tangent = jax.tree.map(jnp.cos, MLP)

    def form(fun, params):
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), fun(mlp, params, X, v), v)
        return sum(jax.tree.leaves(products))

    def shifted(fun, s):
        return form(fun, jax.tree.map(lambda a, b: a + s * b, MLP, tangent))

    for fun in (fisher_vp, ggn_vp):
        difference = sixth_order(jax.jit(functools.partial(shifted, fun)), 1e-3)
        of_params = functools.partial(form, fun)
        forward, gradient = jax.jit(
            lambda p, of=of_params: (jax.jvp(of, (p,), (tangent,))[1], jax.grad(of)(p))
        )(MLP)
        close(forward, difference, 1e-9)
        reverse = sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(a * b), gradient, tangent)))
        close(reverse, forward, 1e-12)


# ------------------------------------------------------------------------------------- attention


KEEP = np.array([True, False, True, True, True, False, True])


@pytest.mark.parametrize(
    ("sink", "where", "scale", "bias"),
    [(None, None, None, None), (0.4, None, 1.7, None), (0.4, KEEP, None, 0.3 * np.arange(7))],
)
def test_attention_jacobian_is_the_dense_one(sink, where, scale, bias):
    q, K, V = normal(28, 3), normal(29, 7, 3), normal(30, 7, 5)
    alpha = 1 / np.sqrt(3) if scale is None else scale

    def attend(q):
        scores = K @ q * alpha + (0 if bias is None else bias)
        scores = scores if where is None else jnp.where(where, scores, -INF)
        if sink is not None:
            scores = jnp.append(scores, sink)
        return jax.nn.softmax(scores)[:7] @ V

    options = {"scale": scale, "bias": bias, "where": where, "sink": sink}
    out = attention_jacobian(q, K, V, **options)
    close(out, jax.jit(jax.jacfwd(attend))(q), 1e-13)
    close(out, jax.jit(attention_jacobian)(q, K, V, **options), 1e-14)


def test_attention_by_scores_keys_and_values_is_as_documented():
    q, K, V = normal(31, 3), normal(32, 6, 3), normal(33, 6, 4)
    alpha = 1 / jnp.sqrt(3.0)
    attend = lambda q, K, V: jax.nn.softmax(alpha * (K @ q)) @ V
    p, jacobian = jaxsoft.softmax_and_jacobian(alpha * (K @ q))
    product = jax.vmap(jacobian.mv, 1, 1)(V)
    by_keys, by_values = jax.jit(jax.jacfwd(attend, (1, 2)))(q, K, V)
    close(jnp.einsum("ia,b->aib", alpha * product, q), by_keys, 1e-13)
    close(jnp.einsum("i,ab->aib", p, jnp.eye(4)), by_values, 1e-13)


def test_attention_loses_nothing_to_an_offset_or_to_confidence():
    q, K, V = normal(34, 3), normal(35, 6, 3), normal(36, 6, 4)
    close(attention_jacobian(q, K, V + 1e6), attention_jacobian(q, K, V), 1e-9)
    # In float32, one score ahead by 40.
    q, K = np.array([1.0]), np.array([[40.0], [0.0], [1.0]])
    V = np.array([[1.0], [3.0], [-2.0]])
    e = np.exp(K[:, 0] - 40)
    p = e / e.sum()
    expected = sum(p[i] * (V[i] - V[0]) * (K[i] - K[0]) for i in (1, 2))
    out = attention_jacobian(*(jnp.asarray(a, jnp.float32) for a in (q, K, V)))
    np.testing.assert_allclose(out[0, 0], expected[0], rtol=3e-6)


def test_attention_at_the_edges():
    q, K, V = normal(37, 3), normal(38, 5, 3), normal(39, 5, 2)
    keep = np.array([True, True, False, True, True])

    # Of arguments: jax 0.6.1 folds constants to wrong numbers here.
    @jax.jit
    def found(q, K, V):
        nan_K, nan_V = (jnp.where(keep[:, None], a, NAN) for a in (K, V))
        of_q = lambda q: attention_jacobian(q, nan_K, nan_V, where=keep)
        apart = jax.vmap(attention_jacobian)(
            jnp.stack([q, 2 * q]), *(jnp.stack([a, a]) for a in (K, V))
        )
        equal = [
            (of_q(q), attention_jacobian(q, K[keep], V[keep])),
            (
                attention_jacobian(q, K, V, bias=np.where(keep, 0, -INF)),
                attention_jacobian(q, K, V, where=keep),
            ),
            (apart[1], attention_jacobian(2 * q, K, V)),
        ]
        zero = [
            attention_jacobian(q, K, V, where=False),
            attention_jacobian(q, K[:0], V[:0]),
            attention_jacobian(q, K[:1], V[:1]),
        ]
        return equal, zero, jax.grad(lambda q: jnp.sum(of_q(q) ** 2))(q)

    equal, zero, gradient = found(q, K, V)
    for one, other in equal:
        close(one, other, 1e-14)
    for jacobian in zero:
        np.testing.assert_array_equal(jacobian, np.zeros((2, 3)))
    assert np.all(np.isfinite(gradient))
    narrow = [a.astype(jnp.bfloat16) for a in (q, K, V)]
    assert jax.eval_shape(attention_jacobian, *narrow).dtype == jnp.float32


# ---------------------------------------------------------------------------------------- export


@pytest.fixture
def symbolic(monkeypatch):
    """Annotations are checked at run time, but `int` is not the type of a symbolic size."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def exported(fun, sizes):
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), jnp.float64)
    return jax.export.export(jax.jit(fun))(x)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["b, 6", "b, n"])
def test_the_report_is_exported(symbolic, sizes):
    pytest.importorskip("flatbuffers", reason="JAX writes programs by it")
    report = lambda x: (jacobian_report(x), jacobian_report(x, where=x < 1, temperature=2.0))
    program = jax.export.deserialize(exported(report, sizes).serialize())
    for x in (normal(40, 3, 6), normal(40, 1, 6), normal(40, 2, 1)):
        if x.shape[1] == 6 or "n" in sizes:
            trees_close(program.call(x), report(x))


def of_models(x):
    """By models with more logits than inputs and with fewer, in whole batches and in parts."""
    wide = lambda x: jnp.concatenate([jnp.sin(x), jnp.cos(x)])
    narrow = lambda x: jnp.stack([x.sum(), x @ x, jnp.sum(x**3)])
    return (
        [input_jacobian(f, x) for f in (wide, narrow)],
        [input_jacobian(f, x, batch_size=2) for f in (wide, narrow)],
        [input_sensitivity(f, x, batch_size=size) for f, size in ((wide, None), (narrow, 2))],
        attention_jacobian(x[0], x, x**2),
        ggn_vp(lambda w, x: x * w[None], x[0], x, x[0]),
        fisher_vp(lambda w, x: x * w[None], x[0], x, x[0]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["b, 6", "b, n"])
def test_products_with_models_are_exported(symbolic, sizes):
    program = exported(of_models, sizes)
    x = normal(41, 3, 6)
    trees_close(program.call(x), of_models(x), 1e-11)


# ---------------------------------------------------------------------------------------- errors


def fails(error, message, fun, *args, **kwargs):
    # The tests check annotations at run time; here the function's own check is to answer.
    # JAX adds a note to an error that is raised within a transformation.
    with pytest.raises(error, match=f"^{re.escape(message)}(\n|$)"):
        inspect.unwrap(fun)(*args, **kwargs)


def test_errors_of_the_report():
    x = jnp.zeros((4, 3))
    name = "jacobian_report"
    message = f"{name}: logits must be an array or a number, got list (use jnp.asarray)"
    fails(TypeError, message, jacobian_report, [1.0])
    message = f"{name}: axis must lie in [-2, 2) for an array of 2 dimensions, got 2"
    fails(ValueError, message, jacobian_report, x, 2)
    message = f"{name}: where must be boolean, got dtype float64"
    fails(TypeError, message, jacobian_report, x, where=x)
    fails(
        ValueError,
        f"{name}: temperature must be positive, got 0.0",
        jacobian_report,
        x,
        temperature=0.0,
    )


@pytest.mark.parametrize("fun", [input_jacobian, input_sensitivity])
def test_errors_of_the_inputs(fun):
    name, x, f = fun.__name__, jnp.zeros((2, 3)), lambda x: x
    fails(TypeError, f"{name}: f must be callable, got int", fun, 3, x)
    message = f"{name}: x must be an array or a number, got list (use jnp.asarray)"
    fails(TypeError, message, fun, f, [1.0])
    fails(ValueError, f"{name}: x must have shape [batch, ...], got ()", fun, f, 1.0)
    message = f"{name}: batch_size must be an integer, got float"
    fails(TypeError, message, fun, f, x, batch_size=2.0)
    fails(ValueError, f"{name}: batch_size must be 1 or more, got 0", fun, f, x, batch_size=0)
    message = f"{name}: f must return an array of logits, got tuple"
    fails(TypeError, message, fun, lambda x: (x, x), x)
    message = f"{name}: f must return floating logits, got dtype bool"
    fails(TypeError, message, fun, lambda x: x > 0, x)
    message = f"{name}: f must return logits of shape [n] for one example, got (3, 1)"
    fails(ValueError, message, fun, lambda x: x[:, None], x)
    message = f"{name}: f must be callable, got ArrayImpl; f comes first, then its arguments"
    fails(TypeError, message, fun, x, f)
    if fun is input_sensitivity:
        fails(ValueError, f"{name}: steps must be 1 or more, got 0", fun, f, x, steps=0)
        fails(TypeError, f"{name}: steps must be an integer, got str", fun, f, x, steps="4")


@pytest.mark.parametrize("fun", [fisher_vp, ggn_vp])
def test_errors_of_the_curvature(fun):
    name = fun.__name__
    params, x, model = {"w": jnp.zeros((3, 2))}, jnp.zeros((4, 3)), lambda p, x: x @ p["w"]
    fails(TypeError, f"{name}: model must be callable, got int", fun, 3, params, x, params)
    message = f"{name}: params['w'] must be floating, got dtype int64"
    fails(TypeError, message, fun, model, {"w": jnp.zeros((3, 2), int)}, x, params)
    message = f"{name}: params['w'] must be an array or a number, got str 'a'"
    fails(TypeError, message, fun, model, {"w": "a"}, x, params)
    cure = "with Equinox: params, static = eqx.partition(model, eqx.is_inexact_array)"
    for leaf in (jax.nn.relu, jnp.tanh, lambda x: x, True, 3):
        kind, model_like = type(leaf).__name__, {"w": params["w"], "rest": (leaf,)}
        message = f"must be a pytree of arrays, got a leaf of type {kind}"
        where = f"{name}: params {message} (params['rest'][0]); {cure}"
        fails(TypeError, where, fun, model, model_like, x, params)
        fails(
            TypeError,
            f"{name}: v {message} (v['rest'][0]); {cure}",
            fun,
            model,
            params,
            x,
            model_like,
        )
    message = f"{name}: model must be callable, got dict; model comes first, then its arguments"
    fails(TypeError, message, fun, params, model, x, params)
    message = f"{name}: v['w'] must have shape (3, 2) (as in params), got (3,)"
    fails(ValueError, message, fun, model, params, x, {"w": jnp.zeros(3)})
    trees = [str(jax.tree.structure(tree)) for tree in (params, 0.0)]
    message = f"{name}: v must have the tree of params, {trees[0]}, got {trees[1]}"
    fails(ValueError, message, fun, model, params, x, 0.0)
    message = f"{name}: reduction must be 'mean' or 'sum', got 'none'"
    fails(ValueError, message, fun, model, params, x, params, reduction="none")
    message = f"{name}: weights must broadcast to (4,) (one weight for each example), got (3,)"
    fails(ValueError, message, fun, model, params, x, params, weights=jnp.ones(3))
    message = f"{name}: model must return logits of shape [..., n], got ()"
    fails(ValueError, message, fun, lambda p, x: p["w"].sum(), params, x, params)
    message = f"{name}: model must return an array of logits, got list"
    fails(TypeError, message, fun, lambda p, x: [p["w"]], params, x, params)
    message = f"{name}: model must return floating logits, got dtype int64"
    fails(TypeError, message, fun, lambda p, x: jnp.zeros((4, 2), int), params, x, params)


def test_errors_of_attention():
    name, fun = "attention_jacobian", attention_jacobian
    q, K, V = jnp.zeros(3), jnp.zeros((5, 3)), jnp.zeros((5, 2))
    message = f"{name}: q must be an array or a number, got list (use jnp.asarray)"
    fails(TypeError, message, fun, [1.0], K, V)
    fails(ValueError, f"{name}: q must have shape [d], got (1, 3)", fun, q[None], K, V)
    fails(ValueError, f"{name}: K must have shape [m, d], got (3,)", fun, q, K[0], V)
    fails(ValueError, f"{name}: V must have shape [m, d_v], got (2,)", fun, q, K, V[0])
    message = f"{name}: K must have shape (5, 3) (q (3,)), got (5, 2)"
    fails(ValueError, message, fun, q, K[:, :2], V)
    fails(ValueError, f"{name}: V must have 5 rows (K (5, 3)), got (4, 2)", fun, q, K, V[:4])
    fails(TypeError, f"{name}: scale must be a number, got str 'a'", fun, q, K, V, scale="a")
    message = f"{name}: sink must be a scalar, got shape (2,)"
    fails(ValueError, message, fun, q, K, V, sink=jnp.zeros(2))
    message = f"{name}: where must broadcast to (5,) (one per key), got (4,)"
    fails(ValueError, message, fun, q, K, V, where=jnp.ones(4, bool))
    message = f"{name}: bias must broadcast to (5,) (one per key), got (4,)"
    fails(ValueError, message, fun, q, K, V, bias=jnp.ones(4))
    fails(TypeError, f"{name}: where must be boolean, got dtype float64", fun, q, K, V, where=q)
