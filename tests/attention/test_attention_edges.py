"""Attention at its edges: nothing to see, what is not finite, sizes of 0 and 1, and errors."""

import contextlib
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests.attention.plain import attention
from tests.devices import collectives, mesh_of

NAN, INF = np.nan, np.inf
T, S, N, H = 6, 5, 2, 3
RNG = np.random.default_rng(0)
Q, K, V = (RNG.normal(size=(1, n, N, H)) for n in (T, S, S))
C = RNG.normal(size=(1, T, N, H))
explicit_axes = pytest.mark.skipif(
    not hasattr(jax.sharding, "auto_axes"), reason="jax before 0.7 has no explicit axes"
)
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
CHUNKED = functools.partial(jaxsoft.dot_product_attention, query_chunk=4, key_chunk=2)


@functools.partial(jax.jit, static_argnames=("names", "window"))
def everything(names, arrays, options, directions, window):
    """The output, the logsumexp, the gradients by the arrays of these names, and the jvp."""
    options = options | {"local_window_size": window}
    residual = lambda live: CHUNKED(**(arrays | live), **options, return_residual=True)
    live = {name: arrays[name] for name in names}
    out, pullback = jax.vjp(residual, live)
    bars = pullback((C, jnp.where(jnp.isfinite(out[1]), 1.0, 0.0)))[0]
    return *out, bars, jax.jvp(residual, (live,), (directions,))[1]


def of(q=Q, k=K, v=V, names=("query", "key", "value"), window=None, **options):
    arrays = {"query": q, "key": k, "value": v}
    arrays |= {name: options.pop(name) for name in ("bias", "sink") if name in options}
    directions = {name: np.ones_like(arrays[name]) for name in names}
    return everything(names, arrays, options, directions, window)


def finite(*trees):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(trees))


MASK = np.ones((1, 1, T, S), bool)
MASK[..., 2, :] = False
NOTHING = {
    "masked": {"mask": MASK},
    "the length of the queries": {"query_seq_lengths": np.array([2])},
    "a bias of -inf": {"bias": np.where(MASK, 0.0, -INF)},
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_query_that_sees_no_key(name):
    row = slice(2, 3)
    out, lse, bars, (out_dot, lse_dot) = of(**NOTHING[name])
    assert not np.any(out[:, row])
    assert np.all(lse[:, row] == -INF)
    assert finite(bars, out_dot, lse_dot)
    assert not np.any(bars["query"][:, row])
    assert not np.any(out_dot[:, row])
    assert not np.any(lse_dot[:, row])
    np.testing.assert_allclose(out[:, :2], CHUNKED(Q, K, V)[:, :2], rtol=1e-13)


def test_the_sink_of_a_query_that_sees_no_key():
    names = ("query", "sink")
    out, lse, bars, (out_dot, _) = of(mask=MASK, sink=np.array([1.0, -2.0]), names=names)
    assert not np.any(out[:, 2])
    np.testing.assert_array_equal(lse[0, 2], [1.0, -2.0])
    assert finite(bars, out_dot)
    assert not np.any(out_dot[:, 2])
    # An absent sink is none.
    absent, none = (CHUNKED(Q, K, V, mask=MASK, sink=sink) for sink in (-INF, None))
    np.testing.assert_array_equal(absent, none)


def test_no_key_at_all():
    for options in (
        {"key_value_seq_lengths": np.array([0])},
        {"mask": np.zeros((1, 1, 1, S), bool)},
    ):
        out, lse, bars, dots = of(**options)
        assert not np.any(out)
        assert np.all(lse == -INF)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves((bars, dots)))
    empty = K[:, :0]
    out, lse, bars, _ = of(k=empty, v=empty, sink=np.zeros(N), names=("query", "key", "sink"))
    assert not np.any(out)
    assert not np.any(lse)
    np.testing.assert_allclose(bars["sink"], np.full(N, T))  # of the logsumexp
    assert bars["key"].shape == empty.shape


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("argument", ["key", "value"])
def test_what_is_not_finite_reaches_the_queries_that_see_it(argument, value):
    see = np.ones((1, 1, T, S), bool)
    see[..., :3, 1] = False  # in a chunk with queries that see it, and keys that all see
    bad = {"k": K.copy(), "v": V.copy()}
    bad[argument[0]][0, 1, 0, 0] = value
    clean = {"k": K.copy(), "v": V.copy()}
    clean[argument[0]][0, 1, 0] = 0
    out, lse, bars, (out_dot, lse_dot) = of(mask=see, **bad)
    wanted = of(mask=see, **clean)
    # Of the other head nothing changes, and of this head nothing for queries that do not see it.
    unaffected = np.ones((1, T, N), bool)
    unaffected[:, 3:, 0] = False
    for found, right in zip((out, lse, out_dot, lse_dot), (*wanted[:2], *wanted[3]), strict=True):
        np.testing.assert_allclose(found[unaffected], right[unaffected], rtol=1e-12, atol=1e-14)
        assert np.all(np.isnan(found[~unaffected]))
    np.testing.assert_allclose(
        bars["query"][unaffected], wanted[2]["query"][unaffected], atol=1e-14
    )
    for name in ("key", "value"):
        np.testing.assert_allclose(bars[name][:, :, 1], wanted[2][name][:, :, 1], atol=1e-14)


def test_what_no_query_sees():
    hidden = np.ones((1, 1, 1, S), bool)
    hidden[..., 3:] = False
    k, v = K.copy(), V.copy()
    k[:, 3:], v[:, 3:] = NAN, INF
    wanted = of(k=K[:, :3], v=V[:, :3])
    for options in ({"mask": hidden}, {"key_value_seq_lengths": np.array([3])}):
        out, lse, bars, dots = of(k=k, v=v, **options)
        for found, right in zip((out, lse, *dots), (*wanted[:2], *wanted[3]), strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-12, atol=1e-14)
        for name in ("key", "value"):
            np.testing.assert_allclose(bars[name][:, :3], wanted[2][name], atol=1e-14)
            assert not np.any(bars[name][:, 3:])


def test_a_query_that_is_not_finite_reaches_the_keys_that_it_sees():
    q = Q.copy()
    q[0, 1, 0, 2] = NAN
    out, lse, bars, _ = of(q=q, window=(1, 1))
    assert finite(out[:, 2:], lse[:, 2:], out[:, 1, 1])
    assert np.all(np.isnan(out[0, 1, 0]))
    for name in ("key", "value"):
        assert np.all(np.isnan(bars[name][0, :3, 0]))
        assert finite(bars[name][0, 3:], bars[name][0, :, 1])
    assert finite(bars["query"][:, 2:])


def test_values_far_from_zero_in_what_is_hidden():
    """A hidden value has no influence, not even by the rounding of a number taken from all."""
    v = V.astype("float32")
    far = v.copy()
    far[:, 4] = 1e30
    causal = functools.partial(CHUNKED, Q.astype("float32"), K.astype("float32"), is_causal=True)
    np.testing.assert_allclose(causal(far)[:, :4], causal(v)[:, :4], rtol=1e-6)


def test_infinite_scores():
    s = np.zeros((1, 1, T, S))
    s[..., 0, 1], s[..., 1, 2] = INF, -INF
    out, lse, bars, _ = of(bias=s, names=("query", "key", "value", "bias"))
    assert np.all(np.isnan(out[:, 0]))
    assert finite(out[:, 1:], lse[:, 1:], bars["query"][:, 1:], bars["bias"][..., 1:, :])
    assert not np.any(bars["bias"][..., 1, 2])


@pytest.mark.parametrize("shape", [(1, 1), (1, S), (T, 1), (0, S), (T, 0), (0, 0)])
def test_few_queries_and_keys(shape):
    t, s = shape
    q, k, v = Q[:, :t], K[:, :s], V[:, :s]
    for fun in (jaxsoft.dot_product_attention, CHUNKED):
        out = fun(q, k, v)
        assert out.shape == q.shape
        np.testing.assert_allclose(out, attention(q, k, v)[0] if s else 0, rtol=1e-13)


@pytest.mark.parametrize("axis", range(4))
def test_axes_of_size_0(axis):
    if axis == 2:  # there must be a head of keys
        return
    none = np.zeros(tuple(0 if a == axis else n for a, n in enumerate((2, 3, 1, 2))))
    out, pullback = jax.vjp(CHUNKED, none, none, none)
    assert out.shape == none.shape
    assert [x.shape for x in pullback(out)] == [none.shape] * 3


@pytest.mark.parametrize("window", [2**31 - 1, 2**40, (0, 2**31 - 1)])
def test_a_window_wider_than_there_are_keys(window):
    wide = CHUNKED(Q, K, V, local_window_size=window)
    left = 0 if isinstance(window, tuple) else S
    np.testing.assert_array_equal(wide, CHUNKED(Q, K, V, local_window_size=(left, S)))


def test_a_bias_of_16_bits_in_chunks():
    bias = RNG.normal(size=(T, S))
    gradient = jax.grad(lambda bias: jnp.sum(jnp.sin(CHUNKED(Q, K, V, bias))))
    found = gradient(bias.astype("bfloat16"))
    assert found.dtype == "bfloat16"
    np.testing.assert_allclose(found.astype(float), gradient(bias), atol=0.02)


def test_vmap_over_nothing():
    none = np.zeros((0, 4, 1, 2))
    assert jax.vmap(CHUNKED)(none, none, none).shape == none.shape
    narrow = np.zeros((3, 4, 1, 0))
    assert jax.vmap(CHUNKED)(narrow, narrow, narrow).shape == narrow.shape


# ------------------------------------------------------------------------ devices and export


BATCH = [RNG.normal(size=(2, 4, 2, 3)) for _ in range(3)]
SPECS = {
    "batch": ("rows", None, None, None),
    "heads": ("rows", None, "heads", None),
    "queries": (None, "rows", None, None),
}


def value_and_gradients(*arrays):
    fun = functools.partial(CHUNKED, is_causal=True)
    number = lambda *arrays: jnp.sum(jnp.sin(fun(*arrays)))
    return fun(*arrays), jax.grad(number, (0, 1, 2))(*arrays)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=explicit_axes)]
)
@pytest.mark.parametrize("name", SPECS)
def test_arrays_divided_among_devices(name, kind):
    mesh, spec = mesh_of(kind, rows=2, heads=2), P(*SPECS[name])
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in BATCH]
    fun = jax.jit(value_and_gradients)
    with set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        compiled = fun.lower(*arrays).compile()
        found = compiled(*arrays)
    wanted = fun(*BATCH)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-14), found, wanted)
    if kind == AxisType.Explicit:
        assert found[0].sharding.spec == spec
    if name != "queries":  # nothing is sent
        assert collectives(compiled.as_text()) == []


def test_within_shard_map():
    specs = {"in_specs": (P("rows"), P(), P()), "out_specs": P("rows")}
    each = jax.shard_map(CHUNKED, mesh=mesh_of(rows=2), **specs)
    q, k, v = BATCH[0], BATCH[1][:1], BATCH[2][:1]  # the same keys for all
    together = lambda q, k, v: CHUNKED(q, *(jnp.concatenate([x, x]) for x in (k, v)))
    gradients = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(q, k, v)
        for f in (each, together)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-14), *gradients)


@pytest.mark.parametrize("names", ["b", "b, t, s"])
def test_export_with_symbolic_sizes(names):
    from jax import export

    sizes = dict(zip(names.split(", "), export.symbolic_shape(names), strict=True))
    b, t, s = (sizes.get(name, size) for name, size in (("b", 2), ("t", 4), ("s", 5)))
    shapes = [jax.ShapeDtypeStruct((b, n, 2, 3), float) for n in (t, s, s)]
    arrays = [RNG.normal(size=(2, n, 2, 3)) for n in (4, 5, 5)]
    number = lambda q, k, v: jnp.sum(jaxsoft.dot_product_attention(q, k, v, key_chunk=4) ** 2)
    fun = jax.jit(jax.value_and_grad(number))
    found = export.export(fun)(*shapes).call(*arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), found, fun(*arrays))


# ------------------------------------------------------------------------------- errors

FUNCTION = inspect.unwrap(jaxsoft.dot_product_attention)
WRONG = {
    "query must have shape [B, T, N, H] or [T, N, H], got (6, 2)": {"query": Q[0, :, 0, :2]},
    "key must have shape [B, S, K, H] (query (1, 6, 2, 3)), got (5, 2, 3)": {"key": K[0]},
    "key must have shape [B, S, K, H] (query (1, 6, 2, 3)), got (1, 5, 2, 2)": {"key": K[..., :2]},
    "key must have shape [B, S, K, H] (query (1, 6, 2, 3)), got (2, 5, 2, 3)": {
        "key": np.concatenate([K, K])
    },
    "value must have shape (1, 5, 2, 3) (that of key), got (1, 4, 2, 3)": {"value": V[:, :4]},
    "key must have a number of heads that divides that of query, 2, got 0": {
        "key": K[:, :, :0],
        "value": V[:, :, :0],
    },
    "bias must broadcast to (1, 2, 6, 5) ([B, N, T, S]), got (6, 6)": {"bias": np.zeros((6, 6))},
    "mask must broadcast to (1, 2, 6, 5) ([B, N, T, S]), got (3, 1, 1)": {
        "mask": np.ones((3, 1, 1), bool)
    },
    "sink must broadcast to (2,) (one for each head of queries), got (3,)": {"sink": np.zeros(3)},
    "scale must be a scalar, got shape (2,)": {"scale": np.ones(2)},
    "softcap must lie in (0, inf), got 0": {"softcap": 0},
    "query_seq_lengths must broadcast to (1,) (one for each sequence), got (2,)": {
        "query_seq_lengths": np.array([1, 2])
    },
    "local_window_size must be 0 or more, got (1, -1)": {"local_window_size": (1, -1)},
    "local_window_size must be an integer or a pair of integers, got 3 of them": {
        "local_window_size": (1, 2, 3)
    },
    "query_chunk must be 1 or more, got 0": {"query_chunk": 0},
}
WRONG_TYPES = {
    "query must be an array or a number, got list (use jnp.asarray)": {"query": [1.0]},
    "value must be real, got dtype complex128": {"value": V.astype(complex)},
    "mask must be boolean, got dtype float64": {"mask": np.ones((T, S))},
    "key_value_seq_lengths must be integers, got dtype float64": {
        "key_value_seq_lengths": np.array([1.0])
    },
    "local_window_size must be an integer or a pair of integers, got float": {
        "local_window_size": 1.5
    },
    "key_chunk must be an integer or None, got float": {"key_chunk": 2.0},
}


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [(ValueError, *row) for row in WRONG.items()]
    + [(TypeError, *row) for row in WRONG_TYPES.items()],
    ids=[*WRONG, *WRONG_TYPES],
)
def test_errors(error, message, wrong):
    with pytest.raises(error, match=f"^{re.escape(f'dot_product_attention: {message}')}$"):
        FUNCTION(**({"query": Q, "key": K, "value": V} | wrong))
