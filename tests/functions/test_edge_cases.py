"""The table of edge cases: values, and derivatives forward and reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.testing._precision import enable_x64
from tests.cases import OF_LOGITS, arrays

INF, NAN = np.inf, np.nan

LOSSES = "cross_entropy", "entmax_loss"

# The value of a row without a class; 0 for the others.
EMPTY_VALUE = {name: -INF for name in OF_LOGITS if name.startswith("log")}
EMPTY_VALUE |= {name: INF for name in OF_LOGITS if name.startswith(LOSSES)}

# All edges are rows of one array, and one program for all rows has what every test looks at: nearly
# all the time of these tests is compilation.
EDGES = {
    "usual": [0.1, 0.2, 0.3, 0.4],
    "-inf throughout": [-INF] * 4,
    "usual, confident": [5.0, -0.5, 0.2, -1.0],
    "-inf": [0.3, -INF, 1.0, 2.0],
    "-inf, confident": [5.0, -INF, 0.2, -1.0],
    "+inf": [0.0, INF, 0.0, 1.0],
    "nan": [1.0, NAN, 0.0, 2.0],
    "nan first": [NAN, 2.0, 1.0, 0.5],
    "usual, last": [1.0, 2.0, 0.5, 0.3],
}
NAMES, X = list(EDGES), np.array(list(EDGES.values()))
USUAL = [i for i, edge in enumerate(NAMES) if edge.startswith("usual")]
SOUND = [i for i, row in enumerate(X) if np.all(row < INF)]
ENTRY = [NAMES.index("-inf"), NAMES.index("-inf, confident")]
FINITE = np.array([0, 2, 3])  # the classes beside an entry of -inf
# Of as many rows: XLA may round the last rows of an array otherwise than those before them.
HARMLESS = np.where(np.isfinite(X).all(1, keepdims=True), X, 0.0)

# Rows under a mask, what is hidden in each of them, and at last one that is masked throughout.
MASK = np.array([[True, True, False, True], [True, True, True, False]] * 4 + [[False] * 4])
SEEN = np.array([[0.3, 5.0, 1.0, 2.0], [0.1, 0.2, 0.3, 0.4]] * 4 + [[1.0, -2.0, 0.5, 0.0]])
UNSEEN = np.array([1e4, 1e4, INF, INF, -INF, -INF, NAN, NAN, NAN])
HIDDEN = np.where(MASK, SEEN, UNSEEN[:, None])


# The only option of kl_divergence is a mask, which all have here.
@pytest.fixture(scope="module", params=[n for n in OF_LOGITS if n != "kl_divergence, options"])
def name(request):
    """A function of the table: all its tests in a row, which share their programs."""
    return request.param


def of_logits(name, classes=slice(None)):
    """A function of the table as one of logits, with some of their classes, and a mask."""
    rows, n = X.shape
    given = arrays(rows, n) | {
        "labels": np.zeros(rows, int),
        "targets": np.array([[0.9, 0.1, 0.0, 0.0]] * rows),
        "softcap": np.array(30.0),
    }
    given = {k: a[..., classes] if a.shape[-1:] == (n,) else a for k, a in given.items()}
    del given["where"]
    # A class of -inf that has a target costs infinity.
    options = {"label_smoothing": 0.0} if name == "cross_entropy, options" else {}
    return lambda x, **mask: OF_LOGITS[name].fun(given | {"x": x, "y": 0.5 * x}, **options, **mask)


def with_jacobians(fun):
    """The value, and the Jacobians by the first argument, forward and reverse."""
    return lambda *args: (fun(*args), jax.jacfwd(fun)(*args), jax.jacrev(fun)(*args))


@functools.cache
def programs(name):
    """Without and with a mask."""
    fun = of_logits(name)
    return with_jacobians(fun), with_jacobians(lambda x, where: fun(x, where=where))


@functools.cache
def found(name, jit, rows):
    """The value of each row and its Jacobians, forward and reverse, [row, ..., row, class]."""
    masked = rows in ("hidden", "seen")
    program = programs(name)[masked]
    program = jitted(program) if jit else program
    x = {"edges": X, "harmless": HARMLESS, "hidden": HIDDEN, "seen": SEEN}[rows]
    return [np.asarray(a) for a in program(*map(jnp.asarray, (x, MASK) if masked else (x,)))]


@functools.cache
def jitted(fun):
    return jax.jit(fun)


EAGER_AND_JIT = pytest.mark.parametrize("jit", [False, True])
SLOW_AND_JIT = pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])


@EAGER_AND_JIT
def test_a_row_of_minus_infinity(name, jit):
    value, *jacobians = found(name, jit, "edges")
    row = NAMES.index("-inf throughout")
    np.testing.assert_array_equal(value[row], EMPTY_VALUE.get(name, 0.0))
    assert np.all(np.isfinite(value[USUAL]))
    for jacobian in jacobians:
        assert not np.any(jacobian[row][..., SOUND, :])
        assert np.all(np.isfinite(jacobian[SOUND][..., SOUND, :]))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_row_of_minus_infinity_stacked_from_columns(n):
    # XLA makes maxima of two arrays of it, instead of a reduction.
    names = "softmax", "log_softmax", "logsumexp", "entropy"
    stacked = lambda fun: lambda column: fun({"x": jnp.stack([column] * n, -1)})
    funs = [with_jacobians(stacked(OF_LOGITS[name].fun)) for name in names]
    results = jax.jit(lambda column: [fun(column) for fun in funs])(np.array([-INF, 1.0]))
    for name, (value, *jacobians) in zip(names, results, strict=True):
        np.testing.assert_array_equal(value[0], EMPTY_VALUE.get(name, 0.0), err_msg=name)
        for jacobian in jacobians:
            assert np.all(np.isfinite(jacobian)), name
            assert not np.any(jacobian[0]), name


@SLOW_AND_JIT
def test_a_row_masked_throughout(name, jit):
    value, *jacobians = found(name, jit, "hidden")
    # Masked classes have no target, so no loss; an id is a target wherever it lies.
    empty = EMPTY_VALUE | {f"{loss}, targets": 0.0 for loss in LOSSES}
    np.testing.assert_array_equal(value[-1], empty.get(name, 0.0))
    for jacobian in jacobians:
        assert np.all(np.isfinite(jacobian))
        assert not np.any(jacobian[-1])


def test_a_mask_of_rows(name):
    fun = of_logits(name)
    program = jax.jit(lambda x, rows: (fun(x, where=rows), jax.jacrev(fun)(x, where=rows)))
    rows = np.arange(len(SEEN))[:, None] % 2 == 0
    found = program(np.where(rows, SEEN, NAN), rows)
    value, _, jacobian = jitted(programs(name)[1])(SEEN, np.broadcast_to(rows, SEEN.shape))
    # Two programs: which products a processor adds without rounding may differ.
    np.testing.assert_allclose(found[0], value, rtol=1e-15)
    np.testing.assert_allclose(found[1], jacobian, rtol=1e-14, atol=1e-16)


@functools.cache
def on_finite_classes(name):
    fun = of_logits(name, FINITE)
    return jax.jit(lambda x: (fun(x), jax.jacrev(fun)(x)))


@EAGER_AND_JIT
def test_entries_of_minus_infinity_have_no_derivative(name, jit):
    if name.endswith("targets"):
        return  # it costs infinity, below
    value, *jacobians = found(name, jit, "edges")
    alone, reference = map(np.asarray, on_finite_classes(name)(X[:, FINITE]))
    value = value[ENTRY]
    if value.ndim == 2:
        np.testing.assert_array_equal(value[:, 1], -INF if name.startswith("log") else 0.0)
        value = value[:, FINITE]
    np.testing.assert_allclose(value, alone[ENTRY], rtol=1e-15)
    wanted = reference[ENTRY][..., ENTRY, :]
    assert np.all(np.isfinite(wanted))
    for jacobian in jacobians:
        of_rows = jacobian[ENTRY][..., ENTRY, :]
        assert not np.any(of_rows[..., 1])
        if value.ndim == 2:
            assert not np.any(of_rows[:, 1])
            of_rows = of_rows[:, FINITE]
        np.testing.assert_allclose(of_rows[..., FINITE], wanted, rtol=1e-14, atol=1e-16)


@SLOW_AND_JIT
def test_nothing_under_a_false_mask_has_influence(name, jit):
    for one, other in zip(found(name, jit, "hidden"), found(name, jit, "seen"), strict=True):
        np.testing.assert_array_equal(one[:-1], other[:-1])
        assert one.ndim < 3 or np.all(np.isfinite(one))


def test_nothing_under_a_false_mask_has_influence_at_order_two(name):
    fun = of_logits(name)
    program = jax.jit(jax.hessian(lambda x: fun(x, where=MASK)))
    hidden, seen = program(HIDDEN), program(SEEN)
    np.testing.assert_array_equal(hidden, seen)
    assert np.all(np.isfinite(hidden))


@EAGER_AND_JIT
def test_a_bad_entry_spoils_its_row_alone(name, jit):
    results, expected = found(name, jit, "edges"), found(name, jit, "harmless")
    infinite, bad, first = (results[0][NAMES.index(n)] for n in ("+inf", "nan", "nan first"))
    assert np.all(np.isnan([bad, first]))
    if name.startswith("logsumexp"):
        np.testing.assert_array_equal(infinite, INF)  # as jax.nn.logsumexp
    elif name != "cross_entropy, options":  # a cap makes +inf finite
        assert np.all(np.isnan(infinite))
    np.testing.assert_array_equal(results[0][USUAL], expected[0][USUAL])
    for jacobian, other in zip(results[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(jacobian[USUAL][..., USUAL, :], other[USUAL][..., USUAL, :])


@EAGER_AND_JIT
def test_a_bad_row_has_a_nan_derivative(name, jit):
    _, _, jacobian = found(name, jit, "edges")
    for row in NAMES.index("nan"), NAMES.index("nan first"):
        assert np.all(np.isnan(jacobian[row][..., row, :]))


@SLOW_AND_JIT
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_one_class(dtype, jit):
    x = jnp.array([[3.0], [-2.0]], dtype)
    ones = {"softmax": 1.0, "log_softmax": 0.0, "entropy": 0.0, "cross_entropy": 0.0}
    labels = np.zeros(2, int)
    funs = {name: lambda x, f=OF_LOGITS[name].fun: f({"x": x, "labels": labels}) for name in ones}
    every = lambda x: {name: with_jacobians(fun)(x) for name, fun in funs.items()}
    for name, (value, *jacobians) in (jax.jit(every) if jit else every)(x).items():
        np.testing.assert_array_equal(np.asarray(value, float), np.full(value.shape, ones[name]))
        assert not any(np.any(np.asarray(jacobian, float)) for jacobian in jacobians), name
    np.testing.assert_array_equal(jaxsoft.logsumexp(x, -1), x[:, 0])


def test_no_class():
    x = jnp.zeros((3, 0))
    for fun in (jaxsoft.softmax, jaxsoft.log_softmax):
        value, *jacobians = with_jacobians(fun)(x)
        assert value.shape == (3, 0)
        assert all(jacobian.shape == (3, 0, 3, 0) for jacobian in jacobians)
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


@jax.jit
def by_logits_and_temperature(x, temperature):
    return jax.jacrev(lambda x, t: jaxsoft.softmax(x, temperature=t), (0, 1))(x, temperature)


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
    derivatives = by_logits_and_temperature(x, jnp.float32(temperature))
    if temperature >= 0.3:  # 1 / T² is beyond float32 below
        assert all(np.all(np.isfinite(d)) for d in derivatives)


def of_temperature_and_sink(x, temperature, sink):
    return jaxsoft.softmax(x, temperature=temperature, sink=sink)


by_all_three = jax.jacrev(of_temperature_and_sink, (0, 1, 2))


@pytest.mark.parametrize("sink", [-3e38, 0.0, 3e38])
@pytest.mark.parametrize("temperature", [1e-30, 1.0])
def test_a_sink_beside_logits_of_any_size(temperature, sink):
    x = jnp.array([3e38, -3e38, 1.0], jnp.float32)
    fun = of_temperature_and_sink
    args = x, jnp.float32(temperature), jnp.float32(sink)
    half = 0.5 if sink == 3e38 and temperature == 1 else 1
    np.testing.assert_array_equal(fun(*args), [half, 0, 0])
    assert all(np.all(np.isfinite(d)) for d in jitted(by_all_three)(*args))


LOSS_WITH_JACOBIANS = with_jacobians(jaxsoft.cross_entropy)


@pytest.mark.parametrize("label", [-1, -3, 3, 100, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("jit", [False, True])
def test_a_label_out_of_range_is_nan_in_its_row(label, jit):
    x = jnp.array([[1.0, 2.0, 0.5], [0.1, 0.2, 0.3]])
    labels = jnp.array([label, 1])
    run = jitted if jit else lambda fun: fun
    value, *jacobians = run(LOSS_WITH_JACOBIANS)(x, labels)
    assert np.isnan(value[0])
    np.testing.assert_array_equal(value[1], run(jaxsoft.cross_entropy)(x[1], 1))
    for jacobian in jacobians:
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
    everything = jnp.full(3, ignore_index)
    ignored = lambda x: jaxsoft.cross_entropy(x, everything, ignore_index=ignore_index).sum()
    of_all = lambda x: (*with_jacobians(fun)(x), jax.value_and_grad(ignored)(x))
    value, *jacobians, (loss, gradient) = jax.tree.map(np.asarray, jax.jit(of_all)(x))
    np.testing.assert_array_equal(value[[0, 2]], 0)
    np.testing.assert_array_equal(value, fun(x))
    assert value[1] > 0
    for jacobian in jacobians:
        assert not np.any(jacobian[[0, 2]])
        assert np.all(np.isfinite(jacobian))
    assert loss == 0
    assert not np.any(gradient)


def test_a_target_of_zero_on_minus_infinity_contributes_nothing():
    x = jnp.array([[0.5, -INF, 1.0]])
    target = jnp.array([[0.25, 0.0, 0.75]])
    fun, finite = jaxsoft.cross_entropy, np.array([0, 2])
    derivatives = [of(fun, (0, 1)) for of in (jax.jacfwd, jax.jacrev)]
    program = jax.jit(lambda *args: (fun(*args), [of(*args) for of in derivatives]))
    loss, blocks = program(x, target)
    alone, expected = program(x[:, finite], target[:, finite])
    np.testing.assert_array_equal(loss, alone)
    for block, wanted in zip(jax.tree.leaves(blocks), jax.tree.leaves(expected), strict=True):
        assert not np.any(block[..., 1])
        np.testing.assert_allclose(block[..., finite], wanted, rtol=1e-14)


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
