"""logsumexp with factors against 50 digits, of complex numbers, and what it takes and returns."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.special
from mpmath import mp, mpf

import jaxsoft
from jaxsoft._core import double_word
from tests.exact import DTYPES, EPS

INF, NAN = np.inf, np.nan
WIDE = ("float32", "float64")
N = 6
# What users met, with the right value to seven digits.
MET = [
    ([0, 0], [1e-8, 1e-8], -17.7275336),
    ([0, 1], [1e-6, 2e-6], -11.9535160),
    ([0, 100], [1, 1e-37], 14.8043525),
    ([0, 0], [3e38, 3e38], 89.2899864),
    ([85.2, 0], [1e-37, 0], 0.0043485),
    ([-85.2, 0], [1e37, 0], -0.0043485),
    ([1e30, 1e30], [1e-30, 1e30], 1e30),
]


def table(dtype):
    """Exponents and positive factors of the dtype, several rows of each kind."""
    info = np.finfo(dtype)
    low, high = info.minexp - info.nmant, info.maxexp - 1e-3
    rng = np.random.default_rng(7)
    normal = lambda scale: scale * rng.normal(size=N)
    any_size = lambda: np.exp2(rng.uniform(low, high, N))
    kinds = {
        "random": lambda: (normal(3), rng.uniform(0.1, 2, N)),
        "factors of any size": lambda: (normal(3), any_size()),
        "exponents cancel factors": lambda: (normal(1) - np.log(b := any_size()), b),
        "terms of one size": lambda: (-np.log(b := any_size()) - np.log(N), b),
        "out near 0": lambda: (-np.log(b := any_size()) - np.arange(N) * rng.uniform(0, 5), b),
        "one term dominates, near 0": lambda: (
            -np.log(b := any_size()) - np.where(np.arange(N) == 2, 0, rng.uniform(10, 40, N)),
            b,
        ),
        "offset": lambda: (rng.choice([-1e6, 1e6]) + normal(1), any_size()),
        "far offset": lambda: (np.full(N, 1e30), any_size()),
        "probabilities": lambda: (a := normal(2), np.exp(-a) * rng.dirichlet(np.ones(N))),
        "wide": lambda: (normal(100), any_size()),
        "zeros": lambda: (normal(3), rng.uniform(0.1, 2, N) * (np.arange(N) % 3 > 0)),
        "the largest": lambda: (normal(1), np.full(N, info.max)),
        "the smallest": lambda: (normal(1), info.smallest_subnormal * rng.integers(1, 9, N)),
        "the largest exponents": lambda: (rng.choice([-1, 1], N) * float(info.max), any_size()),
    }
    return [(name, *map(dtype, kind())) for name, kind in kinds.items() for _ in range(8)]


def exact(a, b):
    """The value, Σ|p| |a + log|b||, Σ|p|, and the derivatives by a and b, of one row."""
    counts = [j for j in range(a.size) if b[j] != 0 and a[j] > -INF]
    a, b = ([mpf(float(x)) for x in row] for row in (a, b))
    # From the largest exponent on: beside 1e300 even 90 digits hold no logarithm.
    start = max(a[j] for j in counts)
    gaps = [x - start for x in a]
    sizes = {j: gaps[j] + mp.log(abs(b[j])) for j in counts}
    top = max(sizes.values())
    terms = {j: mp.sign(b[j]) * mp.exp(sizes[j] - top) for j in counts}
    total = mp.fsum(terms.values())
    p = [terms.get(j, mpf(0)) / total if total else mpf(0) for j in range(len(a))]
    return SimpleNamespace(
        out=start + (top + mp.log(abs(total))),
        sign=mp.sign(total),
        logs=mp.fsum(abs(p[j] * (start + sizes[j])) for j in counts),
        sizes=mp.fsum(map(abs, p)),
        by_a=p,
        by_b=[mp.exp(x - top) / total if abs(x - top) < 1e5 else mpf(0) for x in gaps],
    )


def value(a, b):
    return jaxsoft.logsumexp(a, -1, b, return_sign=True)


def value_and_derivatives(a, b):
    (out, sign), pullback = jax.vjp(value, a, b)
    tangents = jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), jnp.zeros_like(b)
    return (
        out,
        sign,
        *pullback((jnp.ones_like(out), jnp.zeros_like(sign))),
        jax.jvp(value, (a, b), tangents)[1][0],
    )


@pytest.mark.parametrize("signs", ["positive", "negative", "both"])
@pytest.mark.parametrize("dtype", WIDE)
def test_the_contract(dtype, signs):
    names, a, b = map(np.array, zip(*table(DTYPES[dtype]), strict=True))
    flip = np.random.default_rng(1).random(b.shape) < 0.5
    b = {"positive": b, "negative": -b, "both": np.where(flip, -b, b)}[signs]
    exacts = list(map(exact, a, b))
    eps, info = EPS[dtype], np.finfo(DTYPES[dtype])
    jitted = jax.jit(value_and_derivatives)(a, b)
    for out, sign, *derivatives in ((*value(a, b),), jitted):
        for i, (name, of) in enumerate(zip(names, exacts, strict=True)):
            if 100 * eps * of.sizes > 1:  # nothing is left of such a sum
                continue
            own = 0 if signs != "both" else of.sizes
            scale = max(abs(of.out), of.logs + own)
            error = abs(mpf(float(out[i])) - of.out) / (eps * scale) if scale else 0
            assert error <= 3, f"{name}: {float(error):.3g} eps, {a[i]}, {b[i]}"
            assert float(sign[i]) == float(of.sign), name
            if not derivatives:
                continue
            by_a, by_b, along = derivatives
            for found, wanted in zip((*by_a[i], *by_b[i]), (*of.by_a, *of.by_b), strict=True):
                if float(of.sizes) * 8 * info.tiny < abs(wanted) < info.max / 8:
                    error = abs(mpf(float(found)) - wanted) / (eps * of.sizes * abs(wanted))
                    assert error <= 4, f"{name}: derivative, {float(error):.3g} eps"
            tangent = np.cos(np.arange(a.size, dtype=a.dtype)).reshape(a.shape)[i]
            error = abs(float(along[i]) - float(mp.fdot(of.by_a, map(float, tangent))))
            assert error <= 8 * eps * float(of.sizes) ** 2, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_rounded_once(dtype):
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=(40, N)).astype(DTYPES[dtype]) for _ in range(2))
    found, sign = value(a, b)
    assert found.dtype == sign.dtype == dtype
    for out, one, other in zip(found, a, b, strict=True):
        of = exact(one, other)
        # Half an eps of the result, and what float32 makes of terms that cancel.
        limit = 0.5 * EPS[dtype] * abs(of.out) + 3 * EPS["float32"] * (of.sizes + of.logs)
        assert abs(mpf(float(out)) - of.out) <= limit


@pytest.mark.parametrize(("a", "b", "wanted"), MET)
def test_what_users_met(a, b, wanted):
    a, b = np.array([[*a, -INF], [0, 0, 0]], np.float32), np.array([[*b, 1], [1, 1, 1]], np.float32)
    for out in (value(a, b), jax.jit(value)(a, b)):
        np.testing.assert_allclose(out[0][0], wanted, rtol=2e-5 if abs(wanted) < 1 else 2e-7)


@pytest.mark.parametrize("dtype", WIDE)
def test_a_double_word_holds_a_logarithm_to_twice_the_precision(dtype):
    info, rng = np.finfo(dtype), np.random.default_rng(3)
    b = np.exp2(rng.uniform(info.minexp - info.nmant, info.maxexp - 1e-3, 200))
    b = np.array([*b, *rng.uniform(0.5, 2, 200), info.max, info.tiny, -3, 1, 0.5], dtype)
    a, b = -np.log(np.abs(b)), jnp.asarray(b)
    logarithms = [mp.log(abs(mpf(float(x)))) for x in b]
    for wrap in (lambda f: f, jax.jit):
        parts = wrap(double_word.parts)(b)
        np.testing.assert_array_equal(
            np.ldexp(np.asarray(parts.fraction), np.asarray(parts.exponent).astype(int)), b
        )
        assert np.all(np.abs(np.abs(np.asarray(parts.fraction)) - 1.06) < 0.36)
        pairs = wrap(double_word.plus_logarithm)(jnp.asarray(a), parts)
        for one, *pair, logarithm in zip(a, *map(np.asarray, pairs), logarithms, strict=True):
            error = mp.fsum(map(float, pair)) - (float(one) + logarithm)
            assert abs(error) <= 3 * EPS[dtype] ** 2 * abs(logarithm)


# --------------------------------------------------------------------------------- edges


def quiet_scipy(a, b):
    with np.errstate(all="ignore"):
        return scipy.special.logsumexp(a, b=b, axis=-1, return_sign=True)


def test_infinities_are_those_of_scipy():
    entries = [-INF, -1.0, 2.0, INF]
    factors = [-INF, -2.0, 3.0, INF]
    pairs = [np.array(list(itertools.product(x, x))) for x in (entries, factors)]
    a, b = (x.reshape(-1, 2) for x in np.broadcast_arrays(pairs[0][:, None], pairs[1][None]))
    for out, sign in (value(a, b), jax.jit(value)(a, b)):
        wanted, wanted_sign = quiet_scipy(a, b)
        np.testing.assert_allclose(out, wanted, rtol=1e-14)
        np.testing.assert_array_equal(sign, wanted_sign)


@pytest.mark.parametrize("b", [None, 1.0, 0.5])
def test_the_sign_of_infinity_is_one(b):
    x = jnp.array([[INF, 0.0], [INF, INF], [-INF, 0.0], [-INF, -INF]])
    for fun in (jaxsoft.logsumexp, jax.jit(jaxsoft.logsumexp, static_argnums=(1, 3, 4))):
        out, sign = fun(x, -1, b, False, True)
        np.testing.assert_array_equal(np.sign(out[:2]), 1)
        np.testing.assert_array_equal(sign, [1, 1, 1, 0])


@pytest.mark.parametrize("off", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_nan_within(off):
    x = jnp.array([[INF, 0.0, 1.0], [-INF, -INF, -INF], [1.0, 2.0, 0.5]])
    mask, b = jnp.array([[True, True, False]] * 3), jnp.array([[1.0, -0.1, 0.0]] * 3)
    finite = jnp.array([[1.0, 2.0, 0.5], [-INF, -INF, -INF], [1.0, 2.0, 0.5]])
    positive = jnp.array([[1.0, 0.1, 0.0]])
    jax.clear_caches()
    with jax.debug_nans(True), jax.disable_jit(off):
        for options in ({}, {"where": mask}, {"b": b}, {"b": positive, "where": mask}):
            jaxsoft.logsumexp(x, -1, return_sign=True, **options)
            jaxsoft.logsumexp(x, -1, **options)
        # By all that is finite, an empty row included.
        by = jax.grad(lambda *x: value(*x)[0][2], (0, 1))(finite, b)
        assert np.all(np.isfinite(by[0]))


def test_a_negative_sum_is_nan_without_its_sign():
    a, b = jnp.zeros((3, 2)), jnp.array([[1.0, -2.0], [1.0, -1.0], [2.0, -1.0]])
    np.testing.assert_array_equal(jaxsoft.logsumexp(a, -1, b), [NAN, -INF, 0])
    np.testing.assert_array_equal(value(a, b)[1], [-1, 0, 1])
    jacobians = jax.jit(jax.jacrev(lambda *x: value(*x)[0], (0, 1)))(a, b)
    assert np.all(np.isfinite(jacobians))


@jax.jit
def value_and_gradients(a, b, where=None):
    fun = lambda a, b: jaxsoft.logsumexp(a, -1, b, return_sign=True, where=where)[0][0]
    return jax.value_and_grad(fun, (0, 1))(a, b)


@pytest.mark.parametrize("hidden", [INF, -INF, NAN, 1e300])
def test_nothing_under_a_false_mask_or_a_factor_0_has_influence(hidden):
    a, b = np.array([[0.3, 5.0, 1.0]]), np.array([[2.0, -0.5, 1e-300]])
    mask = np.array([[True, True, False]])
    spoilt = np.where(mask, a, hidden), np.where(mask, b, hidden)
    wanted, by = value_and_gradients(a[:, :2], b[:, :2])
    found, (by_a, by_b) = value_and_gradients(*spoilt, mask)
    assert found == wanted
    np.testing.assert_array_equal(by_a, [[*by[0][0], 0]])
    np.testing.assert_array_equal(by_b, [[*by[1][0], 0]])
    found, (by_a, _) = value_and_gradients(spoilt[0], np.where(mask, b, 0))
    assert found == wanted
    np.testing.assert_array_equal(by_a, [[*by[0][0], 0]])


# ------------------------------------------------------------------------ shapes and dtypes


class Parameter:
    """As `flax.nnx.Param`: an object that JAX takes for an array."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return jnp.asarray(self.value)


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        ((3,), (2, 3), None),
        ((2, 1), (2, 3), None),
        ((2, 3), (3,), None),
        ((1, 3), (2, 1), (3,)),
        ((3,), None, (2, 3)),
        ((1,), (2, 3), (2, 1)),
        ((), (3,), None),
        ((), (), ()),
    ],
)
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("keepdims", [False, True])
def test_all_are_broadcast_together(a, b, where, axis, keepdims):
    rng = np.random.default_rng(4)
    a, b = (None if x is None else rng.normal(size=x) for x in (a, b))
    where = None if where is None else rng.random(where) < 0.7
    shape = np.broadcast_shapes(*(x.shape for x in (a, b, where) if x is not None))
    if axis is not None and not shape:
        return
    full = np.broadcast_to(a, shape), np.broadcast_to(1.0 if b is None else b, shape)
    full = full[0], np.where(True if where is None else where, full[1], 0)
    with np.errstate(all="ignore"):  # SciPy 1.11 takes no numbers
        table, factors = map(np.atleast_1d, full)
        wanted = scipy.special.logsumexp(table, axis, factors, keepdims, return_sign=True)
    for wrap in (lambda x: x, lambda x: None if x is None else Parameter(x)):
        # The type checks of these tests, not those of the package, ask for arrays themselves.
        jaxtyping.config.update("jaxtyping_disable", wrap(a) is not a)
        found = jaxsoft.logsumexp(wrap(a), axis, wrap(b), keepdims, True, wrap(where))
        jaxtyping.config.update("jaxtyping_disable", False)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == full[1].sum(axis, keepdims=keepdims).shape
            np.testing.assert_allclose(one, np.reshape(other, one.shape), rtol=1e-12)


def test_empty():
    assert value(np.zeros((3, 0)), np.zeros((3, 0)))[0].tolist() == [-INF] * 3
    assert value(np.zeros((0, 3)), np.zeros((0, 3)))[0].shape == (0,)
    assert jaxsoft.logsumexp(np.zeros((3, 0), complex), -1).tolist() == [-INF] * 3
    assert jaxsoft.logsumexp(np.zeros((2, 0, 3)), (0, 1), np.ones(3)).shape == (3,)


def test_several_axes_and_vmap():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 2, 3, 4))
    wanted = scipy.special.logsumexp(a, (0, 2), b, return_sign=True)
    np.testing.assert_allclose(jaxsoft.logsumexp(a, (0, 2), b, False, True), wanted, rtol=1e-12)
    np.testing.assert_allclose(
        jaxsoft.logsumexp(a, (2, 0), b, True, True)[0].ravel(), wanted[0], rtol=1e-12
    )
    mapped = jax.vmap(value)(a, b)
    for one, other in zip(mapped, value(a, b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-14)


TYPES = ["bool", "int8", "int32", "uint8", "bfloat16", "float16", "float32", "complex64"]
TYPES += ["float64", "int64", "complex128"]


def test_dtypes_are_those_of_jax():
    numbers = {"2": 2, "2.0": 2.0, "2j": 2j}
    dtypes = functools.partial(jax.tree.map, lambda x: x.dtype)

    def of(fun, a, b, return_sign):
        return dtypes(jax.eval_shape(lambda: fun(a, b=b, return_sign=return_sign)))

    with jax.numpy_dtype_promotion("standard"):
        arrays = {t: jnp.ones(3, t) for t in TYPES} | numbers
        for (i, a), (j, b) in itertools.product(arrays.items(), (arrays | {"None": None}).items()):
            discrete = all(x is None or jnp.result_type(x).kind in "biu" for x in (a, b))
            for sign in (False, True):
                ours, theirs = (of(f, a, b, sign) for f in (jaxsoft.logsumexp, jax.nn.logsumexp))
                # As everywhere here integers become the default float, for JAX often float32.
                assert ours == theirs or discrete, (i, j)
    # The tests are strict about promotion: integers take part all the same.
    assert jaxsoft.logsumexp(jnp.ones(3, "bfloat16"), b=jnp.arange(3)).dtype == "bfloat16"


# ------------------------------------------------------------------------ complex numbers


def complex_arrays(dtype):
    rng = np.random.default_rng(6)
    return (3 * rng.normal(size=(2, 3, 5, 2)) @ [1, 1j]).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def complex_results(fun, a, b, tangent):
    """By each set of options the value, the size and phase, and the derivatives."""
    mask = np.array([[True, True, False, True, True]])
    results = []
    for options in ({}, {"b": b}, {"b": b.real}, {"b": b, "where": mask}, {"where": mask}):
        of = functools.partial(fun, axis=-1, **options)
        results += [
            {
                "value": of(a),
                "size and phase": of(a, return_sign=True),
                "tangent": jax.jvp(of, (a,), (tangent,))[1],
                "gradient": jax.grad(lambda a: of(a).sum(), holomorphic=True)(a),  # noqa: B023
                "by size": jax.grad(lambda a: of(a, return_sign=True)[0].sum())(a),  # noqa: B023
            }
        ]
    hessian = jax.hessian(lambda a: fun(a, b=b[0]), holomorphic=True)(a[0])
    return [*results, {"Hessian": hessian}]


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_values_and_derivatives(dtype):
    a, b = complex_arrays(dtype)
    tangent = (b * (1 + 1j)).astype(dtype)
    real = "float32" if dtype == "complex64" else "float64"
    tolerance = 40 * EPS[real]
    with jax.numpy_dtype_promotion("standard"):
        ours = complex_results(jaxsoft.logsumexp, a, b, tangent)
        theirs = complex_results(jax.nn.logsumexp, *(x.astype(complex) for x in (a, b, tangent)))
        eager = [jaxsoft.logsumexp(a, -1, **options) for options in ({}, {"b": b}, {"b": b.real})]
        types = jax.eval_shape(functools.partial(complex_results, jax.nn.logsumexp), a, b, tangent)
    for mine, other in zip(eager, theirs, strict=False):
        np.testing.assert_allclose(mine, other["value"], rtol=tolerance, atol=tolerance)
    for i, (mine, other, of) in enumerate(zip(ours, theirs, types, strict=True)):
        if phased := mine.pop("size and phase", None):
            size, phase = map(np.asarray, phased)
            assert size.dtype == real
            wanted = np.exp(other["value"])
            np.testing.assert_allclose(
                phase * np.exp(size), wanted, rtol=tolerance * 10, atol=tolerance
            )
        for name, found in mine.items():
            assert found.dtype == of[name].dtype, name
            np.testing.assert_allclose(
                found, other[name], rtol=tolerance, atol=tolerance, err_msg=f"{name} {i}"
            )


def test_complex_edges():
    a = np.array([[complex(-INF, 3), complex(-INF, INF)], [complex(NAN, NAN), 1 + 1j]])
    mask = np.array([[True, True], [False, True]])
    out, sign = jaxsoft.logsumexp(a, -1, where=mask, return_sign=True)
    np.testing.assert_array_equal(out, [-INF, 1])
    np.testing.assert_allclose(sign, [0, np.exp(1j)], rtol=1e-15)
    by_a = jax.grad(lambda a: jaxsoft.logsumexp(a, where=mask, return_sign=True)[0])(a)
    np.testing.assert_allclose(by_a, [[0, 0], [0, 1]], atol=1e-15)
    # The principal value, on either side of the cut.
    for imag in (3.0, 4.0, -4.0, 10.0):
        out = jaxsoft.logsumexp(np.array([complex(2.0, imag)]))
        np.testing.assert_allclose(out, np.log(np.exp(complex(2.0, imag))), rtol=1e-14)


def test_complex_on_several_devices():
    a, b = complex_arrays("complex128")
    a, b = (np.concatenate([x, x * 0.3j], -1)[:, :8] for x in (a, b))
    parts = [jnp.moveaxis(x.reshape(3, 4, 2), 1, 0) for x in (a, b)]

    part = lambda a, b: jaxsoft.logsumexp(a, -1, b, axis_name="v")
    divided = lambda a, b: jax.vmap(part, axis_name="v")(a, b)[0]
    whole = lambda a, b: jaxsoft.logsumexp(a, -1, b)

    def of(fun):
        gradient = jax.grad(lambda *x: fun(*x).sum(), holomorphic=True)
        return jax.jit(lambda a, b: (fun(a, b), gradient(a, b)))

    (found, by), (wanted, by_whole) = of(divided)(*parts), of(whole)(a, b)
    np.testing.assert_allclose(found, wanted, rtol=1e-13)
    np.testing.assert_allclose(np.moveaxis(by, 0, 1).reshape(3, 8), by_whole, rtol=1e-12)


def test_the_largest_term_lies_on_one_device():
    # Ties on all devices, no term, an infinite one, subnormal factors of both signs.
    a = np.array([[0.0] * 8, [-INF] * 8, [1e3, *range(7)], [INF, *range(7)], [0.0] * 8])
    tiny = np.array([5.0, -1, 2, -1, 1, 1, 1, 1]) * 5e-324
    b = np.array([[2.0] * 8, [1.0] * 8, [1e-300] + [1.0] * 7, [-1.0] * 8, tiny])
    parts = [jnp.moveaxis(x.reshape(5, 4, 2), 1, 0) for x in (a, b)]
    of_part = lambda a, b: jaxsoft.logsumexp(a, -1, b, return_sign=True, axis_name="v")
    for found, wanted in zip(jax.vmap(of_part, axis_name="v")(*parts), value(a, b), strict=True):
        np.testing.assert_allclose(found, np.broadcast_to(wanted, (4, 5)), rtol=1e-15)
