"""The derivatives of attention in eps against 50 digits, where one key dominates above all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests.attention.plain import Query, error
from tests.exact import DTYPES, EPS

KEYS, FEATURES = 6, 4
GAPS = (0, 5, 17, 20, 40)


def arrays(dtype, gap, offset):
    """Scores, one of them `gap` ahead, values with an offset, and a cotangent."""
    rng = np.random.default_rng(gap)
    s = rng.normal(size=KEYS)
    s[2] = np.max(s) + gap
    v = rng.normal(size=(KEYS, FEATURES)) + offset
    return (x.astype(DTYPES[dtype]) for x in (s, v, rng.normal(size=FEATURES)))


def number(s, v, c, sink):
    """c · O of one query whose scores are the bias, in two chunks of keys."""
    q, k = jnp.zeros((1, 1, FEATURES), v.dtype), jnp.zeros((KEYS, 1, FEATURES), v.dtype)
    bias = s[None, None].astype("float32") if v.dtype.itemsize == 2 else s[None, None]
    out = jaxsoft.dot_product_attention(q, k, v[:, None], bias, sink=sink, key_chunk=4)
    return jnp.sum((out[0, 0] * c).astype(bias.dtype))


@jax.jit
def gradient(s, v, c, sink):
    return jax.grad(number)(s, v, c, sink)


@jax.jit
def order_two(s, v, c, sink):
    hessian = jax.hessian(number), jax.jacrev(jax.jacrev(number)), jax.jacfwd(jax.jacfwd(number))
    # By the values in the direction of the first feature: the Jacobian of softmax.
    one = jnp.eye(FEATURES, dtype=s.dtype)[0]
    mixed = [outer(jax.grad(number, 1))(s, v, one, sink) for outer in (jax.jacfwd, jax.jacrev)]
    return [f(s, v, c, sink) for f in hessian], [m[:, 0] for m in mixed]


def limit(query, dtype):
    """8 and half of the widest gap, as of J v; twice that gap has a product of probabilities."""
    gap = float(max(query.s) - min(query.s)) / 2
    return 8 + (gap if dtype in ("float32", "float64") else 0), gap


@pytest.mark.optimised
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_a_key_or_the_sink_dominates(dtype, offset):
    for gap in GAPS:
        for sink in (None, 0.0, gap + 15.0):
            s, v, c = arrays(dtype, gap, offset)
            query = Query(s, v, c, sink)
            of_sink = None if sink is None else s.dtype.type(sink)
            bound, half = limit(query, dtype)
            # Beside a product of two probabilities that is no normal number of the type.
            tiny = np.finfo(s.dtype).tiny / EPS[dtype]
            exact, scale = query.gradient()
            assert error(gradient(s, v, c, of_sink), exact, scale, EPS[dtype]) <= bound
            hessians, mixed = order_two(s, v, c, of_sink)
            for found in hessians:
                exact, scale = query.hessian()
                assert error(found, exact, scale + tiny, EPS[dtype]) <= bound + half
            for found in mixed:
                exact, scale = query.mixed()
                assert error(found, exact, scale + tiny, EPS[dtype]) <= bound + half


# Values with an offset of 1000 have no digits left in 16 bits.
@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_where_a_key_or_the_sink_dominates_in_16_bits(dtype):
    for gap in GAPS:
        for sink in (None, 0.0, gap + 15.0):
            s, v, c = arrays(dtype, gap, 0)
            query = Query(s, v, c, sink)
            given = s.astype("float32"), v, c, None if sink is None else np.float32(sink)
            assert error(gradient(*given), *query.gradient(), EPS[dtype]) <= 2


def test_others_lose_it():
    """The gradient of the dominant key by `jax.nn`: 8 % off at a gap of 17, 0 from 20 on."""
    q, v = jnp.ones((1, 1, 1)), jnp.asarray([1.0, 0.0]).reshape(2, 1, 1)

    def by_query(attention, gap, q, v):
        k = jnp.stack([gap, 0 * gap]).reshape(2, 1, 1)
        return jax.grad(lambda q: jnp.sum(attention(q, k, v)))(q)[0, 0, 0]

    for gap, lost in ((17.0, False), (20.0, True)):
        gap32, q32, v32 = (x.astype("float32") for x in (jnp.asarray(gap), q, v))
        exact = gap * np.exp(-gap) / (1 + np.exp(-gap)) ** 2
        ours = by_query(jaxsoft.dot_product_attention, gap32, q32, v32)
        np.testing.assert_allclose(ours, exact, rtol=20 * EPS["float32"])
        with jax.numpy_dtype_promotion("standard"):
            theirs = by_query(jax.nn.dot_product_attention, gap32, q32, v32)
        assert theirs == 0 if lost else abs(float(theirs) / exact - 1) > 0.05


def test_the_logsumexp_keeps_its_digits():
    """Of a key that is 20 ahead: 20 and 2e-9, with the Hessian p (1 - p)."""

    def lse(s):
        q, k = jnp.zeros((1, 1, 1), s.dtype), jnp.zeros((2, 1, 1), s.dtype)
        fun = jaxsoft.dot_product_attention
        return fun(q, k, k, s[None, None], return_residual=True)[1][0, 0]

    s = jnp.asarray([20.0, 0.0], "float32")
    below = np.exp(-20.0)
    p = below / (1 + below)
    found, hessian = jax.jit(lambda s: (jax.grad(lse)(s), jax.hessian(lse)(s)))(s)
    np.testing.assert_allclose(found[1], p, rtol=4 * EPS["float32"])
    wanted = p * (1 - p) * np.array([[1, -1], [-1, 1]])
    np.testing.assert_allclose(hessian, wanted, rtol=20 * EPS["float32"])


# ------------------------------------------------------------------------------- memory


@pytest.mark.optimised
@pytest.mark.slow
def test_memory():
    """What is held at once, beside one array of all weights: 2 GiB."""
    weights = 8 * 8192 * 8192 * 4
    x = jax.ShapeDtypeStruct((1, 8192, 8, 64), "float32")
    total = lambda q, k, v, c: jnp.sum(jaxsoft.dot_product_attention(q, k, v) * c)
    of_all = jax.grad(total, (0, 1, 2))

    def along(q, k, v, c):
        return jax.jvp(jaxsoft.dot_product_attention, (q, k, v), (c, c, c))

    def twice(q, k, v, c):
        return jax.jvp(lambda *args: of_all(*args, c), (q, k, v), (c, c, c))

    def reverse(q, k, v, c):
        return jax.grad(lambda *args: sum(jnp.sum(g * c) for g in of_all(*args, c)), (0, 1, 2))(
            q, k, v
        )

    for fun, part in (of_all, 16), (along, 8), (twice, 8), (reverse, 4):
        compiled = jax.jit(fun).lower(x, x, x, x).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= weights / part


def test_memory_with_a_bias_that_is_held_fixed():
    """The gradient by the bias, as large as all weights, is not made unless it is asked for."""
    x, bias = (
        jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 2048, 8, 64), (1, 8, 2048, 2048))
    )
    fun = lambda q, bias: jnp.sum(jaxsoft.dot_product_attention(q, q, q, bias))
    compiled = jax.jit(jax.grad(fun)).lower(x, bias).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2048 * 2048 * 4 / 2
