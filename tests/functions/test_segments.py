"""softmax, log_softmax and logsumexp of segments, against those of rows."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsoft
from jaxsoft.testing import MODES, assert_derivatives, error_in_eps
from tests.exact import EPS, Exact

INF, NAN = np.inf, np.nan
RNG = np.random.default_rng(0)
ENTRIES, COUNT = 23, 6
# Segment 4 is empty, segment 5 has one entry, and some entries are of no segment.
IDS = np.array([0, 1, 1, 2, 3, 3, 3, 2, 0, 1, 5, 2, 2, 3, 0, 3, -1, 1, 6, 0, 2**31 - 1, 3, -9])
X = RNG.normal(size=(ENTRIES, 2))
T = RNG.uniform(0.5, 2, size=(COUNT, 2))
MEMBERS = np.arange(COUNT)[:, None] == IDS[None]
FUNCTIONS = {
    "softmax": jaxsoft.segment_softmax,
    "log_softmax": jaxsoft.segment_log_softmax,
    "logsumexp": jaxsoft.segment_logsumexp,
}


def plain(name, x, temperature):
    """By rows of all entries, with a mask of those that are of the segment: [segments, entries]."""
    z = x[None] / temperature[:, None]
    members = MEMBERS[..., None]
    exponentials = jnp.where(members, jnp.exp(z), 0)
    total = exponentials.sum(1)
    log_total = jnp.log(jnp.where(total == 0, 1, total))
    if name == "logsumexp":
        return log_total
    log_p = jnp.where(members, z - log_total[:, None], 0)
    if name == "log_softmax":
        return log_p.sum(0)
    return jnp.where(members, jnp.exp(log_p), 0).sum(0)


def finite(name):
    """The function with 0 in place of -inf."""

    def call(x, temperature):
        out = FUNCTIONS[name](x, IDS, COUNT, temperature=temperature)
        return jnp.where(out == -INF, 0, out)

    return call


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_mode(name):
    modes = MODES if name == "softmax" else ["jit(jvp)", "jit(vjp)", "jacfwd(jacrev)"]
    assert_derivatives(
        finite(name),
        jnp.asarray(X),
        jnp.asarray(T),
        reference=functools.partial(plain, name),
        modes=modes,
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sorted_numbers_and_a_number_for_the_temperature(name):
    order = np.argsort(IDS, kind="stable")
    call = functools.partial(FUNCTIONS[name], num_segments=COUNT, temperature=0.7)
    with_gradient = jax.jit(
        lambda x, ids, is_sorted: jax.vjp(lambda x: call(x, ids, indices_are_sorted=is_sorted), x)[
            0
        ],
        static_argnums=2,
    )
    unsorted, ascending = with_gradient(X, IDS, False), with_gradient(X[order], IDS[order], True)
    wanted = unsorted if name == "logsumexp" else unsorted[order]
    np.testing.assert_allclose(ascending, wanted, rtol=1e-14)
    full = call(X, IDS, temperature=np.full((COUNT, 2), 0.7))
    np.testing.assert_allclose(full, unsorted, rtol=1e-14)


def test_trailing_axes_vmap_and_the_default_number():
    ids, x = np.abs(IDS) % COUNT, RNG.normal(size=(ENTRIES, 2, 3))
    for call in FUNCTIONS.values():
        whole = call(x, ids)
        np.testing.assert_array_equal(whole[:, 1, 2], call(x[:, 1, 2], ids, ids.max() + 1))
        mapped = jax.vmap(lambda x, call=call: call(x, ids, COUNT), 2, 2)(x)
        np.testing.assert_array_equal(mapped, whole)


# ------------------------------------------------------------------------------------- edges


def test_what_belongs_to_no_segment_has_no_influence():
    outside = (IDS < 0) | (IDS >= COUNT)
    for name, call in FUNCTIONS.items():
        results = []
        for bad in (0.0, NAN, INF, -INF):
            x = np.where(outside[:, None], bad, X)
            out, pullback = jax.vjp(lambda x, call=call: call(x, IDS, COUNT, temperature=T), x)
            results.append((out, pullback(jnp.cos(jnp.maximum(out, -99)))[0]))
            if name != "logsumexp":
                assert np.all(out[outside] == (-INF if name == "log_softmax" else 0))
            assert not np.any(results[-1][1][outside])
        for result in results[1:]:
            jax.tree.map(np.testing.assert_array_equal, results[0], result)


# Of -inf alone; one of -inf among others; of NaN; of +inf; empty; of one entry.
ROWS = np.array([-INF, -INF, -INF, 1.0, 0.5, NAN, 1.0, INF, 2.0, 3.0])
OF_ROWS = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 5])


@pytest.mark.parametrize("jit", [False, True])
def test_rows_that_have_an_infinity(jit):
    wrap = jax.jit if jit else lambda fun: fun
    expected = {
        "softmax": [0, 0, 0, *np.exp([1, 0.5]) / np.exp([1, 0.5]).sum(), NAN, NAN, NAN, NAN, 1],
        "logsumexp": [-INF, np.log(np.exp([1, 0.5]).sum()), NAN, INF, -INF, 3],
    }
    expected["log_softmax"] = jnp.log(jnp.array(expected["softmax"]))
    for name, call in FUNCTIONS.items():
        fun = wrap(lambda x, call=call: call(x, OF_ROWS, 6))
        np.testing.assert_allclose(fun(ROWS), expected[name], rtol=1e-14)
        for derive in (jax.jacfwd, jax.jacrev):
            block = np.asarray(wrap(derive(fun))(ROWS))
            sound = [0, 1, 2, 3, 4, 9]
            rows = [0, 1, 4, 5] if name == "logsumexp" else sound
            of_sound = block[np.ix_(rows, sound)]
            assert np.all(np.isfinite(of_sound))
            assert not np.any(of_sound[:, :3])  # an entry of -inf is a constant
            wanted = jax.jacrev(lambda x: call(x, np.array([1, 1]), 6))(ROWS[3:5])  # noqa: B023
            wanted = wanted[1:2] if name == "logsumexp" else wanted
            of_pair = block[1:2, 3:5] if name == "logsumexp" else block[3:5, 3:5]
            np.testing.assert_allclose(of_pair, wanted, rtol=1e-14)


def test_nothing_in_and_no_segment():
    x, ids = np.zeros((0, 2)), np.zeros(0, int)
    for name, call in FUNCTIONS.items():
        out = call(x, ids, 3)
        assert out.shape == ((3, 2) if name == "logsumexp" else (0, 2))
        assert call(x, ids).shape == (0, 2)
        out = call(X, IDS, 0)
        assert out.shape == ((0, 2) if name == "logsumexp" else X.shape)
        assert np.all(out == (0 if name == "softmax" else -INF))


# ------------------------------------------------------------------------------------- digits


@pytest.mark.optimised
@pytest.mark.parametrize("gap", [0, 17, 20, 40])
def test_digits_of_a_segment_of_which_one_entry_is_ahead(gap):
    row = np.array([gap, 0.3, -0.2, 0.7], np.float32)
    other = np.float32(1e4) + np.array([0.5, gap, 0.1], np.float32)
    x, ids = np.array([row[0], other[0], *row[1:], *other[1:]]), np.array([0, 1, 0, 0, 0, 1, 1])
    places = [0, 2, 3, 4], [1, 5, 6]
    p, log_p, total = (
        jax.jit(functools.partial(call, num_segments=2))(x, ids) for call in FUNCTIONS.values()
    )
    v = np.linspace(-1, 2, 7, dtype=np.float32)
    products = [
        jax.jit(lambda v: jax.vjp(lambda x: jaxsoft.segment_softmax(x, ids, 2), x)[1](v)[0])(v),
        jax.jit(lambda v: jax.jvp(lambda x: jaxsoft.segment_softmax(x, ids, 2), (x,), (v,))[1])(v),
    ]
    by_log = jax.jit(jax.jacrev(lambda x: jaxsoft.segment_log_softmax(x, ids, 2)[0]))(x)
    for s, place in enumerate(places):
        exact = Exact(x[place])
        half = exact.gaps.max() / 2
        assert np.max(error_in_eps(p[np.array(place)], exact.p)) <= 6 + half
        assert np.max(error_in_eps(log_p[np.array(place)], exact.log_p)) <= 6 + half
        size = max(abs(float(exact.logsumexp)), float(abs(exact.top)))
        assert error_in_eps(total[s], exact.logsumexp, scale=size) <= 3
        wanted, scale = exact.jacobian_product(v[place])
        for product in products:
            assert np.max(error_in_eps(product[np.array(place)], wanted, scale=scale)) <= 8 + half
    exact = Exact(x[places[0]])
    wanted = [-a for a in exact.p]
    wanted[0] = sum(exact.p[1:])
    assert np.max(error_in_eps(by_log[np.array(places[0])], wanted)) <= 8 + gap / 2
    assert not np.any(by_log[np.array(places[1])])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_computed_in_float32(dtype):
    x = jnp.asarray(X, dtype)
    for name, call in FUNCTIONS.items():
        out = call(x, IDS, COUNT)
        assert out.dtype == dtype
        wide = call(x.astype(float), IDS, COUNT)
        shown = np.asarray(wide) != -INF
        error = error_in_eps(np.asarray(out)[shown], np.asarray(wide)[shown])
        assert np.max(error) <= 0.6, name


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (X, IDS[:3], COUNT),
            ValueError,
            "segment_ids must have shape (23,) (one for each entry of the first axis of x), "
            "got (3,)",
        ),
        ((X, IDS * 1.0, COUNT), TypeError, "segment_ids must be integers"),
        ((X, IDS, -1), ValueError, "num_segments must be 0 or more, got -1"),
        ((X, IDS, 2.5), TypeError, "num_segments must be an integer, got float"),
        ((1.0, 0, 1), ValueError, "x must have an axis of entries, got shape ()"),
        ((X + 0j, IDS, 1), TypeError, "x must be real, got dtype complex128"),
    ],
)
def test_errors(args, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error) as raised:
        jaxsoft.segment_softmax(*args)
    assert str(raised.value).startswith(f"segment_softmax: {message}")


def test_the_number_of_segments_must_be_known_under_jit():
    with pytest.raises(ValueError, match="segment_logsumexp: num_segments must be given where"):
        jax.jit(jaxsoft.segment_logsumexp)(X, IDS)
    with pytest.raises(ValueError, match=r"temperature must broadcast to \(6, 2\)"):
        jaxsoft.segment_softmax(X, IDS, COUNT, temperature=np.ones(23))


@functools.partial(jax.jit, static_argnames=("count", "is_sorted"))
def computed(x, ids, temperature, cotangent, *, count, is_sorted):
    """The three functions, and the derivative of the first along a cotangent."""
    options = {"indices_are_sorted": is_sorted, "temperature": temperature}
    values = [fun(x, ids, count, **options) for fun in FUNCTIONS.values()]
    softmax = lambda x: jaxsoft.segment_softmax(x, ids, count, **options)
    return *values, jax.vjp(softmax, x)[1](cotangent)[0]


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0, None))
def computed_of_rows(x, members, temperature, cotangent):
    """The same of rows of all entries, those of other segments being -inf."""
    row = jnp.where(members, x, -INF)
    p, pullback = jax.vjp(lambda row: jaxsoft.softmax(row, temperature=temperature), row)
    return p, jaxsoft.log_softmax(row, temperature=temperature), pullback(cotangent)[0]


@settings(max_examples=400)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["float32", "float64", "bfloat16"]),
    st.sampled_from([(1, 1), (9, 3), (40, 5)]),
    st.booleans(),
    st.lists(st.sampled_from([INF, -INF, NAN, 1e37, -1e37, 0.0]), max_size=4),
)
def test_any_segments(seed, dtype, sizes, is_sorted, extremes):
    rng, (n, count) = np.random.default_rng(seed), sizes
    x = rng.choice([0.1, 2.0, 30.0]) * rng.normal(size=n) + rng.choice([0.0, 100.0])
    x[rng.integers(n, size=len(extremes))] = extremes
    ids = rng.integers(-1, count + 1, size=n)
    ids = np.sort(ids) if is_sorted else ids
    x, cotangent = (jnp.asarray(a, dtype) for a in (x, rng.normal(size=n)))
    temperature = jnp.asarray(rng.uniform(0.5, 2, size=count), dtype)
    members = ids == np.arange(count)[:, None]
    given = x, ids, temperature, cotangent
    found = [np.asarray(a, float) for a in computed(*given, count=count, is_sorted=is_sorted)]
    rows = computed_of_rows(x, members, temperature, cotangent)
    p, log_p, back = (np.asarray(a, float) for a in rows)
    quotients = (
        np.where(members, np.asarray(x, float), -INF) / np.asarray(temperature, float)[:, None]
    )
    wanted = [
        np.where(members, p, 0).sum(0),
        np.where(members.any(0), np.where(members, log_p, 0).sum(0), -INF),
        jaxsoft.logsumexp(quotients, -1),
        np.where(members, back, 0).sum(0),
    ]
    eps = 8 * max(EPS[dtype], EPS["float32"] if dtype == "bfloat16" else 0)
    units = 1, 1, 1, float(jnp.abs(cotangent).max())
    for a, b, unit in zip(found, wanted, units, strict=True):
        np.testing.assert_allclose(a, b, rtol=8 * eps, atol=eps * unit)
