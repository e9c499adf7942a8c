"""What runs elsewhere than on a CPU, run on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.primitives import Linear
from jaxsoft._rows import cpu, gpu, jacobian_product, statistics
from jaxsoft._rows.jacobian_product import Probabilities, Vector
from jaxsoft._rows.logits import Logits
from jaxsoft._rows.statistics import united
from jaxsoft.testing import error_in_eps
from tests.exact import Exact, rows

pytestmark = pytest.mark.optimised

INF, NAN = np.inf, np.nan
TABLE = {
    (dtype, name): row
    for dtype in ("float32", "float64")
    for name, row in rows(dtype).items()
    if row.size <= 1000
} | {
    # A sum that is scaled anew with every entry.
    ("float32", "ascending slowly"): np.linspace(0, 1e-3, 1000, dtype=np.float32),
    ("float32", "ascending"): np.linspace(0, 30, 1000, dtype=np.float32),
    ("float32", "descending"): np.linspace(30, 0, 1000, dtype=np.float32),
}

# ---------------------------------------------------------------------------------- statistics


@jax.jit
def folded_statistics(z):
    """The statistics as a GPU takes them: 16 entries one after another, and the sums by pairs."""
    columns = -(-z.size // 16)
    z = jnp.pad(z, (0, 16 * columns - z.size), constant_values=-jnp.inf).reshape(16, columns)
    parts = in_one_pass(z)
    while parts.top.size > 1:
        half = parts.top.size // 2
        left, right, odd = (
            jax.tree.map(lambda a, i=i: a[i], parts)
            for i in (np.s_[:half], np.s_[half : 2 * half], np.s_[2 * half :])
        )
        parts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), united(left, right), odd)
    return [a[0] for a in parts]


def in_one_pass(z, sink=None):
    """The statistics of columns."""
    top = jnp.max(z, 0)
    return gpu.row_statistics(Logits(z, top, sink, None), axis=ClassAxis(0))


@jax.jit
def portable_statistics(z):
    row = Logits(z, jnp.maximum(jnp.max(z), jnp.finfo(z.dtype).min), None, None)
    return statistics.portable(row, axis=ClassAxis(0))


@pytest.mark.parametrize("form", [folded_statistics, portable_statistics])
@pytest.mark.parametrize(("dtype", "name"), TABLE)
def test_statistics(form, dtype, name):
    exact = Exact(TABLE[dtype, name])
    top, rest = form(exact.row)
    assert float(top) == float(exact.top)
    others = exact.total - 1
    if others == 0:
        assert rest == 0
    else:
        assert error_in_eps(rest, others) <= 4 + exact.gaps.max() / 2


# 4,099 is a prime: 64 chunks of 64, and 3 entries over. The places are the first one, the last one
# of the chunks, and one that is left over.
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_statistics_of_long_rows(axis, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_SMALL", 0)
    n, places = 4099, [(0,), (4095,), (4097,), (70, 4095), (4000, 4098), (100, 101)]
    table = np.full((len(places) + 4, n), -40, np.float32)
    for row, at in zip(table, places, strict=False):
        row[list(at)] = 0
    table[-4, 3000], table[-3, 2], table[-2] = NAN, INF, -INF
    table[-1] = -np.arange(n) / 4096
    x = jnp.asarray(table if axis else table.T, dtype)
    z = x.astype(jnp.float32)
    top = jnp.maximum(jnp.max(z, axis), jnp.finfo(z.dtype).min)
    logits = Logits(z, top, narrow=None if dtype == "float32" else x)
    row = jax.jit(functools.partial(cpu.row_statistics, axis=ClassAxis(axis)))(logits)
    small = [(n - len(at)) * np.exp(-40.0) + (len(at) - 1) for at in places]
    even = np.sum(np.exp(np.asarray(z if axis else z.T, np.float64)[-1])) - 1
    np.testing.assert_allclose(row.rest, [*small, NAN, NAN, -1, even], rtol=1e-6)


@pytest.mark.parametrize(
    ("row", "top", "rest"),
    [
        ([-INF, -INF, -INF], np.finfo(np.float32).min, -1),
        ([-INF, 2, -INF], 2, 0),
        ([3, -INF, 3], 3, 1),
        ([INF, 0, 1], INF, NAN),
        ([INF, INF, -INF], INF, NAN),
        ([0, NAN, -INF], NAN, NAN),
        ([INF, NAN, 1], NAN, NAN),
    ],
)
def test_statistics_of_rows_at_the_edges(row, top, rest):
    for order in (row, row[::-1]):
        found = in_one_pass(jnp.asarray(order, jnp.float32))
        np.testing.assert_array_equal(found.top, np.float32(top))
        np.testing.assert_array_equal(found.rest, np.float32(rest))


@pytest.mark.parametrize("sink", [-INF, -40.0, 0.0, 2.0, 40.0])
@pytest.mark.parametrize("row", [[1.0, 2.0, -1.0], [-INF, -INF, -INF], [20.0, -INF, 0.0]])
def test_a_sink_is_one_more_entry(row, sink):
    row, sink = jnp.asarray(row, jnp.float32), jnp.asarray(sink, jnp.float32)
    with_sink, longer = in_one_pass(row, sink), in_one_pass(jnp.append(row, sink))
    np.testing.assert_array_equal(with_sink, longer)


def reductions(platform, function, *args):
    """How many reductions the program for a platform has."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("stablehlo.reduce(")


def test_other_platforms_read_the_logits_once():
    x, labels = jnp.zeros((3, 20_000), jnp.float32), jnp.zeros(3, jnp.int32)
    for function, args in ((jaxsoft.cross_entropy, (x, labels)), (jaxsoft.softmax, (x,))):
        assert reductions("cpu", function, *args) >= 2
        # The maximum is made ready with the logits, and not used.
        assert reductions("cuda", function, *args) == 2


# ------------------------------------------------------------------------ products with Jacobians


# A form of J v, and the longest row for which it is meant.
FORMS = {"portable": 16_384, "gpu": 16_384, "cpu": 16}


@functools.cache
def products(form):
    """J v as a platform computes it, and as it is transposed, in one program for a length."""
    lowered = {"portable": jacobian_product.portable, "gpu": gpu.product, "cpu": cpu.product}[form]
    linear = Linear(f"product_for_{form}", lowered, lambda _, v: v)
    linear.transpose_to(linear)

    def product(row, v):
        p = jaxsoft.softmax(row)
        # A CPU has a form of its own for large arrays.
        rows = 2**16 // row.size + 1
        p, v = (jnp.broadcast_to(a, (rows, *a.shape)) for a in (p, v))
        of_rows = Probabilities(p, None, jacobian_product.flatness(jnp.max(p, 1)))
        return linear(of_rows, Vector(v, None), axis=ClassAxis(1)).classes[0]

    def transposed(row, v):
        return jax.linear_transpose(functools.partial(product, row), v)(v)[0]

    return jax.jit(lambda row, v: (product(row, v), transposed(row, v)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for dtype, name in TABLE if dtype == "float32"])
def test_product_with_the_jacobian(form, name):
    dtype, row = "float32", TABLE["float32", name]
    exact = Exact(row[:: -(-row.size // 128)])
    if exact.row.size > FORMS[form]:
        pytest.skip(f"{exact.row.size} classes: not the form for them")
    noise = np.random.default_rng(1).normal(size=exact.row.size).astype(dtype)
    hot = np.eye(1, exact.row.size, int(np.argmax(exact.row)))[0].astype(dtype)
    smallest = float(np.finfo(dtype).tiny / np.finfo(dtype).eps)
    for v in (noise, hot, noise + np.asarray(1000, dtype)):
        product, spread = exact.jacobian_product(v)
        expected, scale = exact.rounded(product), np.maximum(spread, smallest)
        for result in products(form)(exact.row, v):
            assert np.max(error_in_eps(result, expected, scale=scale)) <= 8 + exact.gaps.max()
