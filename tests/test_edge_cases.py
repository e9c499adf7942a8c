"""The table of edge cases: values, and derivatives forward and reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.testing._precision import enable_x64

INF, NAN = np.inf, np.nan

# Every function of logits, as one of [rows, n] that gives numbers per row.
PER_ROW = {
    "softmax": jaxsoft.softmax,
    "softmax, temperature": lambda x, **k: jaxsoft.softmax(x, temperature=0.5, **k),
    "softmax, sink": lambda x, **k: jaxsoft.softmax(x, sink=0.3, **k),
    "log_softmax": jaxsoft.log_softmax,
    "log_softmax, sink": lambda x, **k: jaxsoft.log_softmax(x, temperature=2.0, sink=0.3, **k),
    "logsumexp": lambda x, **k: jaxsoft.logsumexp(x, -1, **k),
    "logsumexp, b": lambda x, **k: jaxsoft.logsumexp(x, -1, b=jnp.full_like(x, 0.5), **k),
    "entropy": jaxsoft.entropy,
    "entropy, temperature": lambda x, **k: jaxsoft.entropy(x, temperature=0.5, **k),
    "kl_divergence": lambda x, **k: jaxsoft.kl_divergence(x, 0.5 * x, **k),
    "cross_entropy": lambda x, **k: jaxsoft.cross_entropy(x, jnp.zeros(x.shape[0], int), **k),
    "cross_entropy, soft": lambda x, **k: jaxsoft.cross_entropy(
        x, jnp.zeros_like(x).at[:, 0].set(0.9).at[:, 1].set(0.1), **k
    ),
    "cross_entropy, options": lambda x, **k: jaxsoft.cross_entropy(
        x, jnp.zeros(x.shape[0], int), z_loss=0.1, softcap=30.0, temperature=2.0, **k
    ),
}
LOSSES = [name for name in PER_ROW if name.startswith("cross_entropy")]
EMPTY_VALUE = {"log_softmax": -INF, "log_softmax, sink": -INF, "logsumexp": -INF}
EMPTY_VALUE |= {"logsumexp, b": -INF} | dict.fromkeys(LOSSES, INF)


def jacobians(fun, x, *rest):
    """The Jacobian by x, forward and reverse, eager and jitted."""
    for program in programs(fun):
        yield program(x, *rest)


@functools.cache
def programs(fun):
    """One program for all rows of a shape: nearly all the time of these tests is compilation."""
    derivatives = (jax.jacfwd(fun), jax.jacrev(fun))
    return [program for d in derivatives for program in (d, jax.jit(d))]


@functools.cache
def jitted(fun):
    return jax.jit(fun)


@functools.cache
def masked(name, mask):
    """The function under a mask, given as nested tuples; the same object for each mask."""
    return lambda x: PER_ROW[name](x, where=jnp.array(mask))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", PER_ROW)
def test_a_row_of_minus_infinity(name, jit):
    fun = jitted(PER_ROW[name]) if jit else PER_ROW[name]
    x = jnp.array([[-INF, -INF, -INF], [1.0, 2.0, 0.5]])
    np.testing.assert_array_equal(fun(x)[0], EMPTY_VALUE.get(name, 0.0))
    assert np.all(np.isfinite(fun(x)[1]))
    for jacobian in jacobians(fun, x):
        assert np.all(np.isfinite(jacobian))
        assert not np.any(jacobian[0])


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "entropy"])
def test_a_row_of_minus_infinity_stacked_from_columns(name, n):
    # XLA makes maxima of two arrays of it, instead of a reduction.
    fun = jax.jit(lambda column: PER_ROW[name](jnp.stack([column] * n, -1)))
    column = jnp.array([-INF, 1.0])
    np.testing.assert_array_equal(fun(column)[0], EMPTY_VALUE.get(name, 0.0))
    for jacobian in jacobians(fun, column):
        assert np.all(np.isfinite(jacobian))
        assert not np.any(jacobian[0])


@pytest.mark.parametrize("name", PER_ROW)
def test_a_row_masked_throughout(name):
    x = jnp.array([[1.0, -2.0, NAN], [1.0, 2.0, 0.5]])
    fun = masked(name, ((False,), (True,)))
    # Masked classes have no target, so no loss; an id is a target wherever it lies.
    empty = EMPTY_VALUE | {"cross_entropy, soft": 0.0}
    np.testing.assert_array_equal(fun(x)[0], empty.get(name, 0.0))
    for jacobian in jacobians(fun, x):
        assert np.all(np.isfinite(jacobian))
        assert not np.any(jacobian[0])


@pytest.mark.parametrize("name", [n for n in PER_ROW if n != "cross_entropy, soft"])
def test_entries_of_minus_infinity_have_no_derivative(name):
    x = jnp.array([[0.3, -INF, 1.0, 2.0], [5.0, -INF, 0.2, -1.0]])
    fun = PER_ROW[name]
    finite = jnp.array([0, 2, 3])
    alone = fun(x[:, finite])
    whole = fun(x)
    if whole.ndim == 2:
        np.testing.assert_array_equal(whole[:, 1], -INF if name.startswith("log") else 0.0)
        whole = whole[:, finite]
    np.testing.assert_allclose(whole, alone, rtol=1e-15)
    reference = jax.jacrev(fun)(x[:, finite])
    for jacobian in jacobians(fun, x):
        assert np.all(np.isfinite(jacobian))
        assert not np.any(jacobian[..., 1])
        outputs = jacobian
        if jacobian.ndim == 4:
            assert not np.any(jacobian[:, 1])
            outputs = jacobian[:, finite]
        np.testing.assert_allclose(outputs[..., finite], reference, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("hidden", [1e4, INF, -INF, NAN])
@pytest.mark.parametrize("name", PER_ROW)
def test_nothing_under_a_false_mask_has_influence(name, hidden):
    seen = jnp.array([[0.3, 5.0, 1.0, 2.0], [0.1, 0.2, 0.3, 0.4]])
    mask = ((True, True, False, True), (True, True, True, False))
    x = jnp.where(jnp.array(mask), seen, hidden)
    fun = masked(name, mask)
    np.testing.assert_array_equal(fun(x), fun(seen))
    for one, other in zip(jacobians(fun, x), jacobians(fun, seen), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.all(np.isfinite(one))
    hessian, expected = jax.hessian(fun)(x), jax.hessian(fun)(seen)
    np.testing.assert_array_equal(hessian, expected)


@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize("name", PER_ROW)
def test_a_bad_entry_spoils_its_row_alone(name, bad):
    good = jnp.array([[1.0, 2.0, 0.5], [0.1, 0.2, 0.3]])
    x = jnp.insert(good, 1, jnp.array([0.0, bad, 0.0]), axis=0)
    fun, rows = PER_ROW[name], jnp.array([0, 2])
    if name in ("logsumexp", "logsumexp, b") and bad == INF:
        np.testing.assert_array_equal(fun(x)[1], INF)  # as jax.nn.logsumexp
    elif "softcap" not in name and name != "cross_entropy, options":  # a cap makes +inf finite
        assert np.all(np.isnan(fun(x)[1]))
    np.testing.assert_array_equal(fun(x)[rows], fun(good))
    # Of as many rows: XLA may round the last rows of an array otherwise than those before them.
    harmless = jnp.insert(good, 1, 0.0, axis=0)
    for jacobian, other in zip(jacobians(fun, x), jacobians(fun, harmless), strict=True):
        own, expected = jacobian[rows][..., rows, :], other[rows][..., rows, :]
        np.testing.assert_array_equal(own, expected)


def test_a_bad_row_has_a_nan_derivative():
    x = jnp.array([[1.0, NAN, 0.0], [NAN, 2.0, 1.0]])
    for name, fun in PER_ROW.items():
        jacobian = jax.jacrev(fun)(x)
        for row in (0, 1):
            assert np.all(np.isnan(jacobian[row][..., row, :])), name


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_one_class(dtype):
    x = jnp.array([[3.0], [-2.0]], dtype)
    np.testing.assert_array_equal(jaxsoft.softmax(x), jnp.ones_like(x))
    np.testing.assert_array_equal(jaxsoft.log_softmax(x), jnp.zeros_like(x))
    np.testing.assert_array_equal(jaxsoft.logsumexp(x, -1), x[:, 0])
    np.testing.assert_array_equal(jaxsoft.entropy(x), jnp.zeros(2, dtype))
    np.testing.assert_array_equal(jaxsoft.cross_entropy(x, jnp.zeros(2, int)), jnp.zeros(2))
    for fun in (jaxsoft.softmax, jaxsoft.log_softmax, jaxsoft.entropy, PER_ROW["cross_entropy"]):
        for jacobian in jacobians(fun, x):
            assert not np.any(np.asarray(jacobian, float))


def test_no_class():
    x = jnp.zeros((3, 0))
    for fun in (jaxsoft.softmax, jaxsoft.log_softmax):
        assert fun(x).shape == (3, 0)
        assert jax.jacrev(fun)(x).shape == (3, 0, 3, 0)
        assert jax.jacfwd(fun)(x).shape == (3, 0, 3, 0)
    np.testing.assert_array_equal(jaxsoft.logsumexp(x, -1), [-INF] * 3)
    np.testing.assert_array_equal(jaxsoft.entropy(x), [0.0] * 3)
    np.testing.assert_array_equal(jaxsoft.kl_divergence(x, x), [0.0] * 3)
    assert np.all(np.isnan(jaxsoft.cross_entropy(x, jnp.zeros(3, int))))
    assert jaxsoft.softmax_vjp(x, x).shape == (3, 0)


def test_no_row():
    x = jnp.zeros((0, 4))
    assert jaxsoft.softmax(x).shape == jaxsoft.log_softmax(x).shape == (0, 4)
    assert jaxsoft.logsumexp(x, -1).shape == jaxsoft.entropy(x).shape == (0,)
    assert jaxsoft.cross_entropy(x, jnp.zeros(0, int)).shape == (0,)
    assert jax.grad(lambda x: jaxsoft.cross_entropy(x, jnp.zeros(0, int)).sum())(x).shape == (0, 4)


def test_float16_does_not_overflow_its_sum():
    x = jnp.zeros(70_000, jnp.float16)
    np.testing.assert_array_equal(jaxsoft.softmax(x), np.full(70_000, 1 / 70_000, np.float16))
    np.testing.assert_allclose(jaxsoft.logsumexp(x), np.float16(np.log(70_000)), rtol=1e-3)
    np.testing.assert_allclose(jaxsoft.cross_entropy(x, 5), np.log(70_000), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool"])
def test_integers_become_the_default_float(dtype):
    x = jnp.array([1, 0, 1], dtype)
    assert jaxsoft.softmax(x).dtype == jnp.float64
    np.testing.assert_array_equal(jaxsoft.softmax(x), jaxsoft.softmax(x.astype(float)))
    assert jaxsoft.cross_entropy(x, 0).dtype == jnp.float64
    with enable_x64(False):
        assert jaxsoft.softmax(np.array([1, 0, 1], dtype)).dtype == jnp.float32


@functools.cache
def at_temperature(temperature):
    return lambda x: jaxsoft.softmax(x, temperature=temperature)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("size", [3e9, 1e30, 3.4028235e38])
def test_logits_of_any_size_and_any_temperature(size, temperature, jit):
    x = jnp.array([[size, -size, 0.0], [size, size, size], [-size, -size, -size]], jnp.float32)
    fun = at_temperature(temperature)
    p = (jitted(fun) if jit else fun)(x)
    assert np.all(np.isfinite(p))
    np.testing.assert_allclose(np.sum(p, -1), 1, rtol=2e-7)
    exact = np.exp((np.asarray(x, float) - float(x.max())) / temperature)[0]
    np.testing.assert_allclose(p[0], exact / exact.sum(), rtol=1e-5)
    with_temperature = lambda x, t: jaxsoft.softmax(x, temperature=t)
    derivatives = jax.jacrev(with_temperature, (0, 1))(x, jnp.float32(temperature))
    if temperature >= 0.3:  # 1 / T² is beyond float32 below
        assert all(np.all(np.isfinite(d)) for d in derivatives)


@pytest.mark.parametrize("sink", [-3e38, 0.0, 3e38])
@pytest.mark.parametrize("temperature", [1e-30, 1.0])
def test_a_sink_beside_logits_of_any_size(temperature, sink):
    x = jnp.array([3e38, -3e38, 1.0], jnp.float32)
    fun = lambda x, t, s: jaxsoft.softmax(x, temperature=t, sink=s)
    args = x, jnp.float32(temperature), jnp.float32(sink)
    half = 0.5 if sink == 3e38 and temperature == 1 else 1
    np.testing.assert_array_equal(fun(*args), [half, 0, 0])
    assert all(np.all(np.isfinite(d)) for d in jax.jit(jax.jacrev(fun, (0, 1, 2)))(*args))


@pytest.mark.parametrize("label", [-1, -3, 3, 100, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("jit", [False, True])
def test_a_label_out_of_range_is_nan_in_its_row(label, jit):
    x = jnp.array([[1.0, 2.0, 0.5], [0.1, 0.2, 0.3]])
    labels = jnp.array([label, 1])
    fun = jitted(jaxsoft.cross_entropy) if jit else jaxsoft.cross_entropy
    assert np.isnan(fun(x, labels)[0])
    np.testing.assert_array_equal(fun(x, labels)[1], fun(x[1], 1))
    for jacobian in jacobians(fun, x, labels):
        assert np.all(np.isnan(jacobian[0, 0]))
        assert np.all(np.isfinite(jacobian[1, 1]))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "int64"])
def test_labels_of_any_integer_type(dtype):
    x = jnp.arange(300.0)[None]
    top = min(np.iinfo(dtype).max, 255)
    loss = jaxsoft.cross_entropy(x, jnp.array([top], dtype))
    np.testing.assert_array_equal(loss, jaxsoft.cross_entropy(x, jnp.array([top], "int32")))
    if np.iinfo(dtype).max > 300:
        assert np.isnan(jaxsoft.cross_entropy(x, np.array([np.iinfo(dtype).max], dtype)))[0]
        wrapped = np.array([2**32 + 3 if dtype == "int64" else 2**32 - 1], dtype)
        assert np.isnan(jaxsoft.cross_entropy(x, wrapped))[0]


@pytest.mark.parametrize("ignore_index", [-100, -1, 1, 7])
def test_ignored_examples_have_no_loss_and_no_gradient(ignore_index):
    x = jnp.array([[1.0, 2.0, 0.5], [0.1, 0.2, 0.3], [NAN, INF, -INF]])
    labels = jnp.array([ignore_index, 2, ignore_index])
    fun = lambda x: jaxsoft.cross_entropy(
        x, labels, ignore_index=ignore_index, z_loss=0.1, label_smoothing=0.1
    )
    np.testing.assert_array_equal(fun(x)[jnp.array([0, 2])], 0)
    assert fun(x)[1] > 0
    for jacobian in jacobians(fun, x):
        assert not np.any(jacobian[jnp.array([0, 2])])
        assert np.all(np.isfinite(jacobian))
    everything = jnp.full(3, ignore_index)
    ignored = lambda x: jaxsoft.cross_entropy(x, everything, ignore_index=ignore_index).sum()
    loss, gradient = jax.value_and_grad(ignored)(x)
    assert loss == 0
    assert not np.any(gradient)


def test_a_target_of_zero_on_minus_infinity_contributes_nothing():
    x = jnp.array([[0.5, -INF, 1.0]])
    target = jnp.array([[0.25, 0.0, 0.75]])
    fun = jaxsoft.cross_entropy
    finite = jnp.array([0, 2])
    np.testing.assert_array_equal(fun(x, target), fun(x[:, finite], target[:, finite]))
    for derivative in (jax.jacfwd, jax.jacrev):
        for block, expected in zip(
            derivative(fun, (0, 1))(x, target),
            derivative(fun, (0, 1))(x[:, finite], target[:, finite]),
            strict=True,
        ):
            assert not np.any(block[..., 1])
            np.testing.assert_allclose(block[..., finite], expected, rtol=1e-14)


def test_a_label_without_probability_costs_infinity():
    x = jnp.array([0.5, -INF, 1.0])
    assert jaxsoft.cross_entropy(x, 1) == INF
    gradient = jax.grad(jaxsoft.cross_entropy)(x, 1)
    np.testing.assert_allclose(gradient, jaxsoft.softmax(x))
    weights = jnp.array([1.0, 0.0, 1.0])
    assert jaxsoft.cross_entropy(x, 1, class_weights=weights) == 0


def test_a_temperature_that_is_not_positive_spoils_its_row_alone():
    x = jnp.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    p = jaxsoft.softmax(x, temperature=jnp.array([[0.0], [1.0], [-1.0]]))
    np.testing.assert_array_equal(np.isnan(p), [[True, True], [False, False], [True, True]])
    np.testing.assert_array_equal(p[1], jaxsoft.softmax(x[1]))


def test_a_scalar_along_all_axes():
    assert jaxsoft.softmax(2.0, axis=None) == 1
    assert jaxsoft.logsumexp(2.0) == 2
    assert jaxsoft.entropy(2.0, axis=None) == 0
