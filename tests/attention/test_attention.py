"""dot_product_attention against the plain formula in float64, for all options and modes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.analysis import attention_statistics
from tests.attention.plain import attention, visible

B, T, S, N, H = 2, 7, 11, 4, 3
RNG = np.random.default_rng(0)
LENGTHS = {"queries": np.array([7, 4]), "keys": np.array([5, 9])}
MASK = RNG.uniform(size=(B, N, T, S)) < 0.7
MASK[..., 0] = True


def arrays(heads=N, **options):
    normal = lambda *shape: RNG.normal(size=shape)
    given = {
        "query": 2 * normal(B, T, N, H),
        "key": 2 * normal(B, S, heads, H),
        "value": normal(B, S, heads, H) + 3,
    }
    return given | {name: np.asarray(value, float) for name, value in options.items()}


# The arrays by which it is differentiated, what hides scores, and the sizes of chunks: some that
# do not divide, ones, and more than there is.
CASES = {
    "plain": (arrays(), {}, (3, 4)),
    "grouped heads": (arrays(2), {}, (3, 4)),
    "one head of keys": (arrays(1), {}, (100, 100)),
    "bias of a pair": (arrays(bias=RNG.normal(size=(1, 1, T, S))), {}, (3, 4)),
    "bias of a head and a key": (arrays(2, bias=RNG.normal(size=(N, 1, S))), {}, (3, 4)),
    "bias of a query": (arrays(bias=RNG.normal(size=(B, N, T, 1))), {}, (4, 11)),
    "bias of all": (arrays(2, bias=RNG.normal(size=(B, N, T, S))), {}, (1, 1)),
    "mask": (arrays(2), {"mask": MASK}, (3, 4)),
    "mask of a pair": (arrays(), {"mask": MASK[0, 0]}, (7, 4)),
    "causal": (arrays(), {"is_causal": True}, (2, 2)),
    "window": (arrays(), {"window": (1, 2)}, (2, 3)),
    "causal window": (arrays(2), {"window": 2, "is_causal": True}, (2, 2)),
    "lengths": (arrays(), LENGTHS, (3, 4)),
    "scale, softcap, sink": (arrays(scale=0.7, softcap=2.0, sink=RNG.normal(size=N)), {}, (3, 4)),
    "a number for a sink": (arrays(sink=-1.0), {}, (3, 4)),
    "everything": (
        arrays(2, bias=RNG.normal(size=(1, N, T, S)), scale=0.7, softcap=3.0, sink=np.ones(N)),
        {"mask": MASK, "is_causal": True, "window": (5, 1), **LENGTHS},
        (3, 4),
    ),
}
COTANGENTS = RNG.normal(size=(B, T, N, H)), RNG.normal(size=(B, T, N))


def functions(name):
    """Ours and the plain one, of the arrays; queries that see no key are 0 in both."""
    given, hidden, (queries, keys) = CASES[name]
    mask = hidden.get("mask")
    hidden = {name: value for name, value in hidden.items() if name != "mask"}
    see = np.broadcast_to(visible(T, S, **hidden) & (True if mask is None else mask), (B, N, T, S))
    some = np.swapaxes(see.any(-1), 1, 2)

    def ours(given):
        options = {
            "mask": mask,
            "is_causal": hidden.get("is_causal", False),
            "local_window_size": hidden.get("window"),
            "query_seq_lengths": hidden.get("queries"),
            "key_value_seq_lengths": hidden.get("keys"),
        }
        chunks = {"query_chunk": queries, "key_chunk": keys}
        out, lse = jaxsoft.dot_product_attention(**given, **options, **chunks, return_residual=True)
        return out, jnp.where(some, lse, 0)

    def plain(given):
        safe = see | ~some.swapaxes(1, 2)[..., None]
        out, lse = attention(**given, mask=safe)
        return jnp.where(some[..., None], out, 0), jnp.where(some, lse, 0)

    return given, ours, plain


def total(fun, given):
    """A number of all the outputs, so that every derivative of it is one of a vector."""
    out, lse = fun(given)
    return jnp.sum(COTANGENTS[0] * out) + jnp.sum(COTANGENTS[1] * lse) + jnp.sum(jnp.sin(out))


def derivatives(fun, given, directions):
    gradient = jax.grad(functools.partial(total, fun))
    along = lambda given: sum(
        jnp.vdot(g, d)
        for g, d in zip(*map(jax.tree.leaves, (gradient(given), directions)), strict=True)
    )
    return {
        "value": fun(given),
        "gradient": gradient(given),
        "jvp": jax.jvp(fun, (given,), (directions,))[1],
        "forward over reverse": jax.jvp(gradient, (given,), (directions,))[1],
        "reverse over reverse": jax.grad(along)(given),
    }


# "everything" has all options together.
AT_LEAST = ("plain", "grouped heads", "bias of all", "causal", "everything")
SELDOM = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in AT_LEAST]


@pytest.mark.parametrize("name", [*AT_LEAST, *SELDOM])
def test_every_option_in_every_mode(name):
    given, ours, plain = functions(name)
    directions = {name: RNG.normal(size=x.shape) for name, x in given.items()}
    both = jax.jit(lambda *args: [derivatives(fun, *args) for fun in (ours, plain)])
    found, wanted = both(given, directions)
    for mode in found:
        check = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12, err_msg=mode)
        jax.tree.map(check, found[mode], wanted[mode])


@pytest.mark.parametrize(
    "name", ["causal", pytest.param("scale, softcap, sink", marks=pytest.mark.slow)]
)
def test_derivatives_of_order_three_and_the_dense_hessian(name):
    given, ours, plain = functions(name)
    live = lambda fun: lambda query: total(fun, given | {"query": query})
    query = jnp.asarray(given["query"])
    along = lambda f: lambda x: jax.jvp(f, (x,), (query,))[1]
    exact = jax.jacfwd(jax.jacfwd(live(plain)))

    @jax.jit
    def everything(query):
        fun = live(ours)
        hessians = [f(g(fun)) for f, g in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd))]
        thirds = [along(jax.grad(along(fun))), jax.grad(along(along(fun)))]
        exact_third = jax.grad(along(along(live(plain))))
        found = [hessian(query) for hessian in hessians], [third(query) for third in thirds]
        return *found, exact(query), exact_third(query)

    hessians, thirds, hessian, third = everything(query)
    for found in hessians:
        np.testing.assert_allclose(found, hessian, atol=1e-12)
    for found in thirds:
        np.testing.assert_allclose(found, third, rtol=1e-11, atol=1e-11)


def test_under_vmap_scan_and_checkpoint():
    given, ours, _ = functions("scale, softcap, sink")
    one = lambda query: total(ours, given | {"query": query})
    rows = np.stack([given["query"], -given["query"]])
    step = lambda sum_, row: (sum_ + one(row), None)
    looped = lambda rows: jax.lax.scan(jax.checkpoint(step), 0.0, rows)[0]
    by_heads = lambda query: jnp.sum(jax.vmap(jax.vmap(single))(*map(heads, (query, *fixed))))
    heads = lambda x: jnp.swapaxes(jnp.asarray(x), 1, 2)[:, :, :, None]
    single = jaxsoft.dot_product_attention
    fixed = given["key"], given["value"]

    @jax.jit
    def everything(rows):
        mapped = jax.vmap(jax.grad(one))(rows)
        alone = jnp.stack([jax.grad(one)(row) for row in rows])
        # All of the arguments are mapped over, or the queries alone.
        together = lambda query: jnp.sum(single(query, *fixed))
        each = [jax.grad(f)(rows[0]) for f in (by_heads, together)]
        return mapped, alone, jax.grad(looped)(rows), jax.hessian(looped)(rows), each

    mapped, alone, by_scan, hessian, (headwise, whole) = everything(rows)
    np.testing.assert_allclose(mapped, alone, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(by_scan, alone, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(headwise, whole, rtol=1e-13, atol=1e-13)
    assert np.all(np.isfinite(hessian))


def test_three_axes_are_one_sequence():
    given, hidden, _ = CASES["mask of a pair"]
    one = {name: x[0] for name, x in given.items()}
    found = jaxsoft.dot_product_attention(
        **one, **hidden, key_value_seq_lengths=9, return_residual=True
    )
    whole = jaxsoft.dot_product_attention(
        **{name: x[:1] for name, x in given.items()},
        **hidden,
        key_value_seq_lengths=np.array([9]),
        return_residual=True,
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), found, whole)


def test_it_takes_the_place_of_that_of_jax():
    ours = inspect.signature(jaxsoft.dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert [name for name in theirs if name != "implementation"] == list(ours)[: len(theirs) - 1]
    assert all(ours[name].default == x.default for name, x in theirs.items() if name in ours)


# The function of JAX computes in float32 whatever the arrays are.
@pytest.mark.parametrize("name", ["plain", "grouped heads", "bias of a query", "causal window"])
def test_equal_to_that_of_jax(name):
    given, hidden, _ = CASES[name]
    hidden = dict(hidden)
    options = {"local_window_size": hidden.pop("window", None), **hidden}
    both = jaxsoft.dot_product_attention, jax.nn.dot_product_attention
    gradient = lambda f: jax.grad(lambda given: jnp.sum(jnp.sin(f(**given, **options))))
    with jax.numpy_dtype_promotion("standard"):
        outputs = lambda given: [(f(**given, **options), gradient(f)(given)) for f in both]
        found, wanted = jax.jit(outputs)(jax.tree.map(jnp.asarray, given))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types(dtype):
    given = {name: x.astype(dtype) for name, x in CASES["everything"][0].items()}
    fun = functools.partial(jaxsoft.dot_product_attention, is_causal=True, return_residual=True)
    shapes = jax.eval_shape(fun, given.pop("query"), given.pop("key"), given.pop("value"), **given)
    assert [x.dtype for x in shapes] == [dtype, "float32"]
    gradient = jax.grad(lambda q: jnp.sum(fun(q, q, q)[0].astype("float32")))
    assert jax.eval_shape(gradient, jnp.ones((1, 5, 2, 3), dtype)).dtype == dtype


def test_what_is_hidden_throughout_is_not_computed():
    x = jnp.zeros((64, 1, 2))
    count = lambda **options: str(
        jax.make_jaxpr(
            lambda q: jaxsoft.dot_product_attention(q, q, q, query_chunk=8, key_chunk=8, **options)
        )(x)
    )
    # A loop over the pairs of chunks: of 8 × 8, the lower triangle, and three diagonals.
    for options, pairs in ({}, 64), ({"is_causal": True}, 36), ({"local_window_size": 8}, 22):
        assert f"length={pairs}" in count(**options)


# ------------------------------------------------------------------- attention_statistics


@pytest.mark.parametrize("name", ["plain", "everything", "a number for a sink"])
def test_statistics(name):
    given, hidden, (queries, keys) = CASES[name]
    given = {name: x for name, x in given.items() if name != "value"}
    mask, options = hidden.get("mask", True), {k: v for k, v in hidden.items() if k != "mask"}
    see = np.broadcast_to(visible(T, S, **options) & mask, (B, N, T, S))
    found = attention_statistics(**given, mask=see, query_chunk=queries, key_chunk=keys)
    k = np.repeat(given["key"], N // given["key"].shape[2], 2)
    s = np.einsum("btnh,bsnh->bnts", given["query"], k) * given.get("scale", H**-0.5)
    cap = given.get("softcap")
    s = s if cap is None else cap * np.tanh(s / cap)
    s = np.where(see, s + given.get("bias", 0), -np.inf)
    if "sink" in given:
        sink = np.broadcast_to(given["sink"], N)[None, :, None, None]
        s = np.concatenate([s, np.broadcast_to(sink, (B, N, T, 1))], -1)
    top = s.max(-1)
    with np.errstate(invalid="ignore"):
        p = np.nan_to_num(np.exp(s - np.logaddexp.reduce(s, -1, keepdims=True)))
    entropy = -np.sum(p * np.log(np.where(p == 0, 1, p)), -1)
    for x, wanted in zip(found, (entropy, top, p.max(-1)), strict=True):
        np.testing.assert_allclose(x, np.swapaxes(wanted, 1, 2), rtol=1e-12, atol=1e-13)


def test_the_entropy_keeps_its_digits():
    q, k = np.ones((1, 1, 1), "float32"), np.array([20, 0], "float32").reshape(2, 1, 1)
    entropy, score, weight = attention_statistics(q, k)
    np.testing.assert_allclose(entropy, np.log1p(np.exp(-20)) + 20 / (1 + np.exp(20)), rtol=1e-6)
    assert (score, weight) == (20, 1)


def test_the_entropy_of_a_chunk_masked_by_the_lowest_number():
    lowest = np.finfo("float32").min
    q, k = np.zeros((1, 1, 1), "float32"), np.zeros((4, 1, 1), "float32")
    bias = np.array([[lowest, lowest, 0, 0]], "float32")
    for chunk in (1, 2, 4):
        entropy = attention_statistics(q, k, bias, key_chunk=chunk).entropy
        np.testing.assert_allclose(entropy, np.log(2), rtol=1e-6)


def test_statistics_of_a_query_without_a_key():
    q = np.ones((3, 1, 2))
    found = attention_statistics(q, q, mask=np.zeros((3, 3), bool))
    assert [x.tolist() for x in found] == [[[x]] * 3 for x in (0.0, -np.inf, 0.0)]
    message = "attention_statistics: key must have shape"
    with pytest.raises(ValueError, match=message):
        attention_statistics(q, q[0])
