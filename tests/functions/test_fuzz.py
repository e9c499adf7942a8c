"""Random rows of every kind against longer arithmetic: `make fuzz` runs many more of them."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsoft
from jaxsoft.testing import error_in_eps
from jaxsoft.testing._precision import enable_x64
from tests.exact import DTYPES, EPS

# The number of cases of the normal run; `make fuzz` chooses a profile with more.
CASES = max(2000, settings.default.max_examples)
MANY = settings.default.max_examples > 2000

# Few shapes, for each one is compiled, with the axis of the classes.
SHAPES = [((1,), 0), ((4, 3), -1), ((7, 4), 0), ((4, 5, 3), 1), ((2, 4, 3), (0, 2)), ((6, 40), -1)]
EXTREMES = (np.inf, -np.inf, np.nan, "largest", "-largest", "tiny", 0.0, 1e4, -1e4)


class Case(NamedTuple):
    x: np.ndarray
    where: np.ndarray
    temperature: np.ndarray | None
    sink: np.ndarray | None
    cotangent: np.ndarray
    axis: int | tuple[int, ...]


@st.composite
def cases(draw):
    shape, axis = kind = draw(st.sampled_from(SHAPES))
    dtype = DTYPES[name := draw(st.sampled_from(sorted(DTYPES)))]
    # Of shape, dtype and options each pair occurs in the normal run, and every triple among many.
    options = draw(st.integers(0, 3)) if MANY else SHAPES.index(kind) + sorted(DTYPES).index(name)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    axes = axis if isinstance(axis, tuple) else (axis % len(shape),)
    row = tuple(1 if a in axes else size for a, size in enumerate(shape))
    x = rng.choice([0.1, 2.0, 30.0], row) * rng.normal(size=shape)
    x += rng.choice([0.0, 0.0, 100.0], row)
    x = np.where(rng.uniform(size=row) < 0.5, np.round(x), x)  # ties
    info = jnp.finfo(dtype)
    numbers = {"largest": float(info.max), "-largest": float(info.min), "tiny": float(info.tiny)}
    for extreme in draw(st.lists(st.sampled_from(EXTREMES), max_size=6)):
        x[tuple(rng.integers(shape))] = numbers.get(extreme, extreme)
    where = rng.uniform(size=shape) < rng.choice([0.0, 0.5, 0.9, 1.0, 1.0, 1.0], row)
    temperature = sink = None
    if options & 1:
        temperature = 10 ** rng.uniform(-2, 2, size=row).astype(dtype)
    if options & 2:
        sink = np.where(rng.uniform(size=row) < 0.2, -np.inf, 3 * rng.normal(size=row))
        sink = sink.astype(dtype)
    with np.errstate(over="ignore"):
        return Case(
            x.astype(dtype), where, temperature, sink, rng.normal(size=shape).astype(dtype), axis
        )


@functools.partial(jax.jit, static_argnames="axis")
def computed(x, where, temperature, sink, cotangent, *, axis):
    """Softmax, its derivative along two cotangents, and log_softmax."""
    options = {"where": where, "sink": sink}
    if temperature is not None:
        options["temperature"] = temperature
    p, pullback = jax.vjp(lambda x: jaxsoft.softmax(x, axis, **options), x)
    along, constant = pullback(cotangent)[0], pullback(jnp.ones_like(x))[0]
    _, pushed = jax.jvp(lambda x: jaxsoft.softmax(x, axis, **options), (x,), (cotangent,))
    return p, along, pushed, constant, jaxsoft.log_softmax(x, axis, **options)


class Exact(NamedTuple):
    p: np.ndarray
    product: np.ndarray
    spread: np.ndarray
    log_p: np.ndarray
    gaps: np.ndarray
    widest: np.ndarray
    bad: np.ndarray
    empty: np.ndarray


def exact(case):
    """The same in longer arithmetic; the temperature that is used is the one given."""
    dtype = np.longdouble if case.x.dtype == np.float64 else np.float64
    keep = {"axis": case.axis, "keepdims": True}
    x = np.where(case.where, case.x.astype(dtype), -np.inf)
    temperature = dtype(1) if case.temperature is None else case.temperature.astype(dtype)
    sink = np.full(1, -np.inf, dtype) if case.sink is None else case.sink.astype(dtype)
    bad = np.any(np.isnan(x) | (x == np.inf), **keep)
    x = np.where(bad, 0, x)
    z = x / temperature
    top = np.maximum(np.max(z, **keep), sink)
    empty = np.broadcast_to(np.all(x == -np.inf, **keep), x.shape)
    top = np.where(top == -np.inf, 0, top)
    e = np.exp(z - top)
    of_sink = np.exp(sink - top)
    # Without the maximum, so that log Z keeps its digits where Z rounds to 1.
    ones = (e == 1).sum(**keep) + (of_sink == 1)
    rest = np.where(e == 1, 0, e).sum(**keep) + np.where(of_sink == 1, 0, of_sink)
    rest = np.where(ones == 0, 0, rest + np.maximum(ones - 1, 0))
    p = e / (1 + rest)
    v = case.cotangent.astype(dtype)
    product = p * (v - (p * v).sum(**keep)) / temperature
    distance = p * np.abs(v) + p * (p * np.abs(v)).sum(**keep)
    with np.errstate(invalid="ignore"):
        log_p = np.where(z == -np.inf, -np.inf, (z - top) - np.log1p(rest))
    gaps, sink_gap = (np.where(a == -np.inf, 0, top - a) for a in (z, sink))
    widest = np.maximum(np.max(gaps * (p > 0), **keep), sink_gap)
    return Exact(
        p,
        product,
        distance / temperature,
        log_p,
        gaps,
        widest,
        np.broadcast_to(bad, x.shape),
        empty,
    )


def limits(case, gaps):
    """The contract, and twice the gap where a division by the temperature rounds z as well."""
    if case.x.dtype.itemsize < 4:
        return 0.6
    return 6 + gaps * (0.5 if case.temperature is None and case.sink is None else 2)


@settings(max_examples=CASES if MANY else CASES // 2)
@given(cases())
def test_any_row(case):
    tiny = float(jnp.finfo(case.x.dtype).tiny)
    got = computed(*case[:5], axis=case.axis)
    p, along, pushed, constant, log_p = (np.asarray(a) for a in got)
    wanted = exact(case)
    bad = wanted.bad & case.where

    # No NaN but in a row with NaN or +inf.
    for array in (p, log_p):
        assert np.all(np.isnan(array[bad]))
    for array in (p, along, pushed, constant, log_p):
        assert not np.any(np.isnan(array[~wanted.bad]))
    assert np.all(p[wanted.empty & ~wanted.bad] == 0)

    def close(array, expected, limit, scale=None, among=True):
        chosen = ~wanted.bad & among
        scale = None if scale is None else scale[chosen]
        error = error_in_eps(array[chosen], expected[chosen], scale=scale)
        # Hardware may replace numbers below the smallest normal one by 0.
        limit = np.where(np.abs(expected) < tiny, np.maximum(limit, 1), limit)
        excess = error - np.broadcast_to(limit, array.shape)[chosen]
        assert np.all(excess <= 0), f"{error.max():.3g} eps, {excess.max():.3g} over the bound"

    close(p, wanted.p, limits(case, wanted.gaps))
    # Beyond the largest number log_p is -inf or the largest negative one.
    beyond = np.abs(wanted.log_p) > float(jnp.finfo(case.x.dtype).max) / 2
    # So are terms of Σ exp: as many as a row has.
    axes = case.axis if isinstance(case.axis, tuple) else (case.axis,)
    n = math.prod(case.x.shape[axis] for axis in axes)
    scale = np.maximum(np.abs(wanted.log_p), n * tiny / EPS[case.x.dtype.name])
    close(log_p, wanted.log_p, limits(case, wanted.widest) + 4, scale, among=~beyond)
    # Numbers that underflow before they are divided by the temperature are lost.
    unit = 1 if case.temperature is None else 1 / case.temperature.astype(np.float64)
    lost = tiny / EPS[case.x.dtype.name] * np.maximum(unit, 1)
    scale = np.maximum(wanted.spread, lost * max(1, np.abs(case.cotangent).max()))
    allowed = 2.5 if case.x.dtype.itemsize < 4 else 8 + 2 * limits(case, wanted.widest)
    close(along, wanted.product, allowed, scale)
    close(pushed, wanted.product, allowed, scale)
    if case.sink is None:  # J·1 = 0
        close(constant, np.zeros_like(wanted.p), 2.5, np.maximum(wanted.p * unit, lost))


@settings(max_examples=CASES // 4)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "float64"]))
def test_the_jacobian_is_symmetric_and_blind_to_a_shift(seed, dtype):
    rng = np.random.default_rng(seed)
    # Multiples of 1/8 and a shift by such a number: their sums are exact.
    x = jnp.asarray(np.round(8 * rng.uniform(0.1, 5) * rng.normal(size=6)) / 8, dtype)
    jacobian = JACOBIAN(x)
    shifted = JACOBIAN(x + jnp.asarray(np.round(rng.uniform(-64, 64)), dtype))
    np.testing.assert_array_equal(jacobian, shifted)
    gap = float(x.max() - x.min())
    scale = np.maximum(np.abs(jacobian), np.finfo(dtype).tiny)
    errors = error_in_eps(jacobian, np.asarray(jacobian).T.astype(np.longdouble), scale=scale)
    assert errors.max() <= 16 + gap


JACOBIAN = jax.jit(jax.jacrev(jaxsoft.softmax))


# ------------------------------------------------------------------------------- the options

# More functions, each with few programs: dtype and shape of the rows, the classes last.
PROGRAMS = [("float32", (3, 5)), ("float64", (2, 20))]
if MANY:
    PROGRAMS += [("float64", (3, 5)), ("float32", (2, 20)), ("bfloat16", (3, 5))]
WIDE = [program for program in PROGRAMS if program[0] != "bfloat16"]
programs, seeds = st.sampled_from(PROGRAMS), st.integers(0, 2**32 - 1)


class Rows(NamedTuple):
    """Softmax in longer arithmetic.

    Attributes:
        z: (x - m) / T.
        p: the probabilities.
        log_p: their logarithms.
        reach: the largest gap to the maximum among the classes with some probability.
    """

    z: np.ndarray
    p: np.ndarray
    log_p: np.ndarray
    reach: np.ndarray


def long_rows(x, where, temperature):
    lowest = np.log(float(jnp.finfo(x.dtype).tiny))
    z = np.where(where, x.astype(np.longdouble), -np.inf)
    top = z.max(-1, keepdims=True)
    z = (z - np.where(top == -np.inf, 0, top)) / temperature.astype(np.longdouble)
    # Without the maximum, so that log Z keeps its digits where Z rounds to 1.
    log_z = np.log1p(np.sort(np.exp(z), -1)[..., :-1].sum(-1, keepdims=True))
    log_p = z - log_z
    reach = np.max(np.where(z > lowest, -z, 0), -1, keepdims=True)
    return Rows(z, np.exp(log_p), log_p, reach)


def within(array, expected, scale, lost=0.0):
    """No NaN; an error of at most one eps of the scale, or one of 16 bits rounded at the end.

    Numbers near the largest one and beyond may be infinite.
    """
    array = np.asarray(array)
    info = jnp.finfo(array.dtype)
    assert not np.any(np.isnan(array))
    unit = np.longdouble(info.eps if array.dtype.itemsize >= 4 else jnp.finfo("float32").eps)
    allowed = unit * scale + 4 * float(info.tiny) + lost
    if array.dtype.itemsize < 4:
        allowed = allowed + 0.51 * float(info.eps) * np.abs(expected)
    finite = np.abs(expected) + allowed < float(info.max) / 8
    with np.errstate(invalid="ignore"):
        error = np.abs(np.where(finite, array.astype(np.longdouble) - expected, 0))
        excess = np.where(finite, error / allowed, 0)
    assert np.all(error <= np.where(finite, allowed, 0)), f"{excess.max():.3g} of the bound"


def some_temperatures(rng, dtype, shape):
    """Of any size, down to the smallest normal number, and ordinary ones."""
    low = np.log2(float(jnp.finfo(dtype).tiny))
    powers = np.where(
        rng.uniform(size=shape) < 0.5, rng.uniform(low, 7, shape), 2 * rng.normal(size=shape)
    )
    return np.exp2(np.maximum(powers, low)).astype(dtype)


def some_logits(rng, dtype, shape, temperature):
    """Rows of ordinary size or of the size of their temperature, with ties and an offset."""
    info = jnp.finfo(dtype)
    small = (rng.uniform(size=temperature.shape) < 0.5) & (
        temperature > float(info.tiny / info.eps)
    )
    x = 3 * rng.normal(size=shape)
    x = np.where(rng.uniform(size=temperature.shape) < 0.3, np.round(x), x)
    x = np.where(small, x * temperature.astype(np.float64), x)
    return (x + rng.choice([0, 0, 100])).astype(dtype)


def masked(rng, x, share, kind):
    """Some entries are masked in one of the ways in which models do it."""
    absent = rng.uniform(size=x.shape) < share
    lowest = jnp.finfo(x.dtype).min
    with np.errstate(over="ignore"):
        return {
            "-inf": np.where(absent, -np.inf, x),
            "finfo.min": np.where(absent, lowest, x),  # Flax
            "+ finfo.min": x + absent * lowest,  # Hugging Face
            "+ finfo.min, twice": x
            + absent * lowest
            + (rng.uniform(size=x.shape) < share) * lowest,
        }[kind].astype(x.dtype)


MASKS = ["-inf", "finfo.min", "+ finfo.min", "+ finfo.min, twice"]
shares = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@jax.jit
def at_temperature(x, where, temperature, label, v):
    """Values, pullbacks by x, and tangents by the temperature."""

    def of(fun):
        at = lambda x, t: fun(x, axis=-1, where=where, temperature=t)
        value, pullback = jax.vjp(lambda x: at(x, temperature), x)
        cotangent = v.astype(value.dtype) if value.ndim == 2 else jnp.ones_like(value)
        _, pushed = jax.jvp(lambda t: at(x, t), (temperature,), (jnp.ones_like(temperature),))
        return value, pullback(cotangent)[0], pushed

    loss = functools.partial(jaxsoft.cross_entropy, labels=label)
    return list(map(of, (jaxsoft.softmax, jaxsoft.log_softmax, jaxsoft.entropy, loss)))


@settings(max_examples=CASES // 8)
@given(programs, seeds, st.sampled_from(MASKS), shares)
def test_any_temperature(program, seed, kind, share):
    (name, shape), rng = program, np.random.default_rng(seed)
    dtype, info = DTYPES[name], jnp.finfo(name)
    t = some_temperatures(rng, dtype, (shape[0], 1))
    x = masked(rng, some_logits(rng, dtype, shape, t), share, kind)
    where = rng.uniform(size=shape) < rng.choice([0.7, 1, 1])
    label, v = rng.integers(shape[1], size=shape[0]), rng.normal(size=shape).astype(dtype)
    probabilities, logarithms, entropies, losses = at_temperature(x, where, t, label, v)

    of, t = long_rows(x, where, t), t.astype(np.longdouble)
    p, v = of.p, v.astype(np.longdouble)
    z = np.where(of.z == -np.inf, 0, of.z)
    gaps = np.where(p > 0, -z, 0)
    weight = 16 + 4 * of.reach
    mean, lost = (p * z).sum(-1, keepdims=True), 64 * float(info.tiny) * np.maximum(1 / t, 1)
    # A probability that underflows is lost, and its gap with it.
    far = 1 - np.log(float(info.tiny))
    # Where a derivative of z by T is beyond the largest number there is only no NaN.
    held = of.reach / t < float(info.max) / 8
    empty = ~np.any(of.z > -np.inf, -1, keepdims=True)
    full = lambda a: np.where(empty, 0, np.broadcast_to(a, shape))
    row = lambda a: np.where(empty, 0, a)[:, 0]

    value, pulled, pushed = probabilities
    within(value, full(p), (8 + 2 * gaps) * p)
    product = p * (v - (p * v).sum(-1, keepdims=True))
    spread = p * (np.abs(v) + (p * np.abs(v)).sum(-1, keepdims=True)) / t
    coarse = 2.5 * float(info.eps) if name == "bfloat16" else 0  # of which p is kept
    within(
        pulled,
        full(product / t),
        weight * spread,
        lost + coarse * spread,
    )
    spread = p * (gaps - mean) / t
    within(
        *(np.where(held, a, 0) for a in (pushed, full(-p * (z - mean) / t))),
        np.where(held, weight * spread, 0),
        np.where(held, (lost + coarse * spread) * far, 0),
    )
    assert not np.any(np.isnan(pushed))

    value, pulled, pushed = logarithms
    present = of.z > -np.inf
    assert np.all(np.asarray(value)[~present] == -np.inf)
    within(
        *(np.where(present, a, 0) for a in (value, of.log_p)),
        weight * np.abs(np.where(present, of.log_p, 0)),
    )
    total = np.where(present, v, 0).sum(-1, keepdims=True)
    size = np.where(present, np.abs(v), 0)
    within(
        pulled,
        np.where(present, v - p * total, 0) / t,
        weight * (size + p * size.sum(-1, keepdims=True)) / t,
        lost,
    )
    wanted = np.where(present & held, -(z - mean) / t, 0)
    within(
        np.where(present & held, pushed, 0),
        wanted,
        weight * np.where(present, -z - mean, 0) / t,
        lost * far,
    )
    assert np.all(np.isfinite(pushed))

    value, pulled, pushed = entropies
    log_z = -np.max(np.where(present, of.log_p, -np.inf), -1, keepdims=True)
    log_z = np.where(empty, 0, log_z)
    entropy = log_z - mean
    within(value, row(entropy), row(weight * entropy), 4 * far * float(info.tiny))
    within(pulled, full(-p * (z - mean) / t), weight * p * (gaps - mean) / t, lost * far)
    variance = (p * (z - mean) ** 2).sum(-1, keepdims=True) / t
    scale = (p * (gaps - mean) ** 2).sum(-1, keepdims=True) / t
    within(
        *(np.where(held[:, 0], a, 0) for a in (pushed, row(variance))),
        row(weight * scale),
        row(lost * far**2),
    )
    assert not np.any(np.isnan(pushed))

    value, pulled, pushed = losses
    at = np.arange(shape[1]) == label[:, None]
    has = np.any(at & present, -1, keepdims=True)
    loss = -(np.where(at & present, of.log_p, 0)).sum(-1, keepdims=True)
    assert np.all(np.asarray(value)[~has[:, 0]] == np.inf)
    within(*(np.where(has[:, 0], a, 0) for a in (value, loss[:, 0])), (weight * loss)[:, 0])
    others = np.where(at, 0, p).sum(-1, keepdims=True)
    slope = np.where(at, np.where(present, -others, 0), p) / t
    within(pulled, full(slope), weight * np.abs(slope), lost)
    along = (np.where(at & present, z, 0).sum(-1, keepdims=True) - mean) / t
    fine = (held & has)[:, 0]
    scale = (np.abs(np.where(at & present, z, 0)).sum(-1, keepdims=True) - mean) / t
    within(
        *(np.where(fine, a, 0) for a in (pushed, row(along))),
        row(weight * scale),
        row(lost * far),
    )
    assert not np.any(np.isnan(np.asarray(pushed)[has[:, 0]]))


@jax.jit
def divergence(x, y, where, temperature):
    options = {} if temperature is None else {"temperature": temperature}
    fun = lambda x, y: jaxsoft.kl_divergence(x, y, -1, where, **options)
    value, pullback = jax.vjp(fun, x, y)
    return value, *pullback(jnp.ones_like(value))


@settings(max_examples=CASES // 8)
@given(
    programs,
    seeds,
    st.tuples(*2 * [st.sampled_from(MASKS)]),
    st.tuples(shares, shares),
    st.booleans(),
)
def test_a_teacher_and_a_student_with_masks(program, seed, kinds, both_shares, scaled):
    (name, shape), rng = program, np.random.default_rng(seed)
    dtype, info = DTYPES[name], jnp.finfo(name)
    t = some_temperatures(rng, dtype, (shape[0], 1)) if scaled else np.ones((shape[0], 1), dtype)
    x = some_logits(rng, dtype, shape, t)
    y = x + (
        rng.choice([0, 1e-3, 1, 10])
        * rng.normal(size=shape)
        * np.std(x.astype(float), -1, keepdims=True)
    ).astype(dtype)
    alike = rng.uniform() < 0.3  # the teacher's mask, on the student as well
    x = masked(rng, x, both_shares[0], kinds[0])
    y = np.where(x == -np.inf, x, y) if alike else masked(rng, y, both_shares[1], kinds[1])
    where = rng.uniform(size=shape) < rng.choice([0.7, 1, 1])
    value, by_x, by_y = map(np.asarray, divergence(x, y, where, t if scaled else None))

    of_x, of_y, t = long_rows(x, where, t), long_rows(y, where, t), t.astype(np.longdouble)
    keep = {"axis": -1, "keepdims": True}
    tiny, biggest = float(jnp.finfo(value.dtype).tiny), float(info.max)
    p, q = of_x.p, of_y.p
    empty = ~np.any(p > 0, **keep)
    seen = of_x.log_p > np.log(tiny) - 1  # with some probability in the dtype
    infinite = np.any(seen & (of_y.z == -np.inf), **keep)
    # Logits that are beyond the largest number once they are divided are not those that were given.
    unclear = np.any((of_x.z > -200) & (of_y.z < -biggest / 8) & (of_y.z > -np.inf), **keep)
    unclear |= np.any((of_x.z > -800) & ~seen & (of_y.z == -np.inf), **keep)
    unclear |= np.any((of_x.z > -800) & ~seen & (of_y.z < -biggest / 1e8), **keep)
    given = ~(empty | infinite | unclear)
    assert np.all(value[(infinite & ~empty)[:, 0]] == np.inf)
    for array in (value[:, None], by_x, by_y):
        assert not np.any(array[empty[:, 0]])
        assert not np.any(np.isnan(array[~(infinite | empty)[:, 0]]))

    d = np.where(seen & given, of_y.log_p - np.where(seen, of_x.log_p, 0), 0)
    terms = np.where(seen, p * (np.expm1(d) - d), q)
    kl = terms.sum(**keep)
    top = [np.max(np.where(where, a.astype(np.longdouble), -np.inf), **keep) / t for a in (y, x)]
    shift = 0 if scaled else np.abs(np.where(given, top[0] - np.where(given, top[1], 0), 0))
    z, w = (np.where(seen & given, a.z, 0) for a in (of_x, of_y))
    size = np.abs(z) + np.abs(w) + np.abs(d) + 2 * shift  # of what is rounded in d
    gap = 16 + 4 * np.maximum(
        np.where(of_x.z > -800, -of_x.z, 0), np.where(of_y.z > -800, -of_y.z, 0)
    )
    gap = np.where(given, gap, 16)
    lost = tiny * (64 + np.abs(d) + size)

    def close(array, wanted, scale, lost):
        within(
            *(np.where(given[: len(wanted)], a, 0) for a in (array, wanted)),
            np.where(given, scale, 0),
            np.where(given, lost, 0),
        )

    differing = np.abs(q - p)
    eps = float(jnp.finfo(value.dtype).eps)
    scale = (gap * terms + differing * (16 + 4 * size)).sum(**keep) + 256 * eps
    close(value[:, None], kl, scale, lost.sum(**keep))
    mean = (p * d).sum(**keep)
    around = p * (size + (p * size).sum(**keep))
    close(
        by_x,
        -p * (d - mean) / t,
        (gap * p * (np.abs(d) + (p * np.abs(d)).sum(**keep)) + 4 * around + p * eps) / t,
        lost / np.minimum(t, 1),
    )
    close(
        by_y,
        (q - p) / t,
        (gap * differing + 4 * np.maximum(p, q) * (8 * (d != 0) + size)) / t,
        lost / np.minimum(t, 1),
    )


@jax.jit
def factored(a, b):
    fun = lambda a, b: jaxsoft.logsumexp(a, -1, b, return_sign=True)
    (out, sign), pullback = jax.vjp(fun, a, b)
    return out, sign, *pullback((jnp.ones_like(out), jnp.zeros_like(sign)))


@settings(max_examples=CASES // 8)
@given(st.sampled_from(WIDE), seeds, st.sampled_from([1, -1, 0]), st.booleans())
def test_logsumexp_with_any_factors(program, seed, sign, ties):
    (name, shape), rng = program, np.random.default_rng(seed)
    dtype, info = DTYPES[name], np.finfo(name)
    b = np.exp2(rng.uniform(info.minexp - info.nmant, info.maxexp - 1e-3, shape))
    b = np.where(rng.uniform(size=shape) < rng.choice([0, 0.5, 1]), rng.uniform(0.1, 2, shape), b)
    b = (np.exp2(np.floor(np.log2(b))) if ties else b).astype(dtype)
    noise = rng.choice([0, 1e-3, 1, 30]) * rng.normal(size=shape)
    a = np.where(
        rng.uniform(size=(shape[0], 1)) < 0.5, noise, noise - np.log(b.astype(np.longdouble))
    )
    a = (a + rng.choice([0, 0, 1e4, -1e4])).astype(dtype)
    for extreme in rng.choice([-np.inf, info.max, info.min, info.tiny, 0], rng.integers(3)):
        a[tuple(rng.integers(shape))] = extreme
    b = (b * (sign or rng.choice([-1, 1], shape))).astype(dtype)
    b = np.where(rng.uniform(size=shape) < rng.choice([0, 0.3]), 0, b).astype(dtype)
    out, found_sign, by_a, by_b = map(np.asarray, factored(a, b))

    keep = {"axis": -1, "keepdims": True}
    a, b = (x.astype(np.longdouble) for x in (a, b))
    counts = (b != 0) & (a > -np.inf)
    empty = ~np.any(counts, **keep)
    for array, wanted in ((out, -np.inf), (found_sign, 0), (by_a, 0), (by_b, 0)):
        assert np.all(array[empty[:, 0]] == wanted)
    # From the largest exponent on: beside it a logarithm would be rounded off.
    start = np.where(empty, 0, np.max(np.where(counts, a, -np.inf), **keep))
    logs = np.log(np.where(counts, np.abs(b), 1))
    sizes = np.where(counts, (a - start) + logs, -np.inf)
    top = np.where(empty, 0, sizes.max(**keep))
    terms = np.sign(b) * np.exp(sizes - top)
    total = terms.sum(**keep)
    total = np.where(empty, 1, total)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        p = terms / total
        much = np.abs(p).sum(**keep)
        wanted = start + (top + np.log(np.abs(total)))
        slope = np.exp(a - start - top) / total
    # Nothing is left of a sum of terms that cancel to the last digits.
    left = ~empty & (100 * info.eps * much < 1)
    p, slope, much = (np.where(left, x, 0) for x in (p, slope, much))
    each = np.abs(np.where(counts, start + sizes, 0)) * np.abs(p)
    mass = each.sum(**keep) + (much if sign == 0 else 0)
    # What the longer arithmetic itself leaves, after numbers of this size.
    magnitude = np.where(counts & (p != 0), np.abs(a) + np.abs(logs), 0)
    own = 8 * float(np.finfo(np.longdouble).eps) * magnitude.max(**keep) * much
    scale = 3 * np.maximum(np.abs(np.where(left, wanted, 0)), mass)
    within(*(np.where(left[:, 0], x, 0) for x in (out, wanted[:, 0])), scale[:, 0], own[:, 0])
    np.testing.assert_array_equal(found_sign[left[:, 0]], np.sign(total)[left])
    lost = 8 * info.tiny * much
    within(np.where(left, by_a, 0), p, 4 * much * np.abs(p), lost + own * np.abs(p))
    fine = left & (np.abs(slope) < info.max / 64)  # a larger one may be clipped
    slope = np.where(fine, slope, 0)
    within(np.where(fine, by_b, 0), slope, 4 * much * np.abs(slope), lost + own * np.abs(slope))


@jax.jit
def in_eight_bits(x, where, temperature):
    options = where, temperature
    return [
        f(x, -1, options[0], temperature=options[1]) for f in (jaxsoft.softmax, jaxsoft.log_softmax)
    ]


@pytest.mark.skipif(
    jax.__version_info__ < (0, 7), reason="jax 0.6 rounds float32 to 8 bits by way of 16"
)
@settings(max_examples=CASES // 8)
@given(st.sampled_from(["float8_e4m3fn", "float8_e5m2"]), seeds, st.sampled_from([0.0, 0.3, 0.7]))
def test_eight_bits_are_rounded_once(name, seed, share):
    rng, dtype = np.random.default_rng(seed), jnp.dtype(name)
    x = (rng.choice([0.1, 2, 30]) * rng.normal(size=(3, 5))).astype(dtype)
    x = np.where(rng.uniform(size=x.shape) < rng.choice([0, 0.3]), jnp.finfo(dtype).min, x)
    where = rng.uniform(size=x.shape) >= share
    t = np.exp2(rng.choice([0, 1]) * rng.normal(size=(3, 1))).astype(np.float32)
    p, log_p = in_eight_bits(x, where, t)
    assert p.dtype == log_p.dtype == dtype
    of = long_rows(x.astype(np.float32), where, t)
    largest = float(jnp.finfo(dtype).max)

    def between(array, wanted, slack):
        low, high = ((wanted * (1 + d)).astype(np.float64).astype(dtype) for d in (-slack, slack))
        low, array, high = (np.asarray(a).astype(np.float64) for a in (low, array, high))
        assert np.all((np.minimum(low, high) <= array) & (array <= np.maximum(low, high)))

    slack = EPS["float32"] * (8 + 2 * np.where(of.z > -200, -of.z, 0))
    between(p, np.where(of.p < float(jnp.finfo("float32").tiny), 0, of.p), slack)
    # A type without infinity holds no log 0.
    held = (of.log_p > -largest) & (of.z > -np.inf)
    between(
        np.where(held, log_p, np.zeros((), dtype)),
        np.where(held, of.log_p, 0),
        EPS["float32"] * (16 + 2 * of.reach),
    )


# Around the class ids, and around the powers of two at which narrower types begin again.
EDGES = [
    0,
    2**7,
    2**8,
    2**15,
    2**16,
    2**31,
    2**32,
    2**63,
    2**64,
    -(2**7),
    -(2**31),
    -(2**32),
    -(2**63),
]


@settings(max_examples=CASES // 16)
@given(seeds, st.sampled_from(["int64", "uint64", "object"]), st.booleans(), st.data())
def test_labels_of_64_bits_without_them(seed, dtype, linear, data):
    rng, n = np.random.default_rng(seed), 5
    limits = np.iinfo("int64" if dtype == "object" else dtype)
    any_id = st.one_of(
        st.integers(0, n - 1),
        st.builds(int.__add__, st.sampled_from(EDGES), st.integers(-n - 1, n + 1)),
        st.integers(-(2**64), 2**65),
    )
    held = any_id.map(lambda i: min(max(i, int(limits.min)), int(limits.max)))
    ids = data.draw(st.lists(held, min_size=8, max_size=8))
    ignored = data.draw(st.one_of(st.none(), st.sampled_from(ids), any_id))
    ignored = None if ignored is None else min(max(ignored, -(2**63)), 2**64 - 1)
    labels = np.array(ids, dtype)
    x = rng.normal(size=(8, n)).astype(np.float32)
    eye = np.eye(n, dtype=np.float32)
    if linear:
        fun = lambda x: jaxsoft.linear_cross_entropy(
            x, eye, labels, ignore_index=ignored, reduction="none"
        )
    else:
        fun = lambda x: jaxsoft.cross_entropy(x, labels, ignore_index=ignored)
    exists = np.array([0 <= i < n for i in ids])
    absent = np.array([i == ignored for i in ids])
    with enable_x64(False):
        value, pullback = jax.vjp(fun, x)
        (slope,) = pullback(jnp.ones_like(value))
        safe = np.array([i if 0 <= i < n else 0 for i in ids], np.int32)
        if linear:
            wanted, pullback = jax.vjp(
                lambda x: jaxsoft.linear_cross_entropy(x, eye, safe, reduction="none"), x
            )
        else:
            wanted, pullback = jax.vjp(lambda x: jaxsoft.cross_entropy(x, safe), x)
        (wanted_slope,) = pullback(jnp.ones_like(wanted))
    pairs = (value[:, None], wanted[:, None]), (slope, wanted_slope)
    for found, of in (map(np.asarray, pair) for pair in pairs):
        assert not np.any(found[absent])
        assert np.all(np.isnan(found[~exists & ~absent]))
        np.testing.assert_allclose(
            found[exists & ~absent], of[exists & ~absent], rtol=4 * EPS["float32"]
        )


@functools.partial(jax.jit, static_argnums=3)
def reduced(x, labels, weights, reduction):
    fun = lambda x, weights: jaxsoft.cross_entropy(
        x,
        labels,
        weights=weights,
        ignore_index=-1 if labels.ndim == 1 else None,
        reduction=reduction,
    )
    value, pullback = jax.vjp(fun, x, weights)
    return value, *pullback(jnp.ones_like(value))


# Dtype, shape, kind of labels, reduction.
REDUCTIONS = [
    ("float32", (3, 5), "ids", "mean"),
    ("float64", (2, 20), "probabilities", "mean"),
    ("float32", (3, 5), "probabilities", "sum"),
    ("float64", (2, 20), "ids", "sum"),
    ("float64", (2, 20), "ids", "none"),
]
if MANY:
    REDUCTIONS += [
        ("float64", (2, 20), "ids", "mean"),
        ("float32", (3, 5), "probabilities", "mean"),
        ("bfloat16", (3, 5), "ids", "mean"),
        ("float32", (3, 5), "probabilities", "none"),
    ]


@settings(max_examples=CASES // 8)
@given(st.sampled_from(REDUCTIONS), seeds, st.booleans())
def test_weights_and_reductions(program, seed, bad):
    (name, shape, kind, reduction), rng = program, np.random.default_rng(seed)
    dtype = DTYPES[name]
    x = (rng.choice([0.1, 3, 30]) * rng.normal(size=shape)).astype(dtype)
    weights = np.exp2(rng.choice([0, 1, 20]) * rng.normal(size=shape[0])).astype(dtype)
    weights = np.where(rng.uniform(size=shape[0]) < rng.choice([0, 0.3, 1]), 0, weights).astype(
        dtype
    )
    if kind == "ids":
        labels = rng.integers(-1, shape[1], shape[0])
        ignored = labels == -1
        y = np.eye(shape[1], dtype=np.longdouble)[labels] * ~ignored[:, None]
    else:
        y = rng.dirichlet(np.ones(shape[1]), shape[0]) * rng.choice([1, 1, 0.5])
        labels = np.where(rng.uniform(size=shape) < 0.3, 0, y).astype(dtype)
        y, ignored = labels.astype(np.longdouble), np.zeros(shape[0], bool)
    w = np.where(ignored, 0, weights.astype(np.longdouble))
    of = long_rows(x, np.ones(shape, bool), np.ones((shape[0], 1), dtype))
    losses, total = -(y * of.log_p).sum(-1), w.sum()
    if bad:  # what has no weight may hold anything
        x[w == 0] = rng.choice([np.nan, np.inf, -np.inf])
        if kind == "ids":
            labels[weights == 0] = rng.choice([-1, shape[1], -7])
        else:
            labels[w == 0] = np.nan
    value, by_x, by_w = map(np.asarray, reduced(x, labels, weights, reduction))

    if reduction == "mean":
        factor = np.where(total == 0, 0, w / np.where(total == 0, 1, total))
    else:
        factor = w
    weighted = factor * losses
    limit = 16 + of.reach[:, 0] + 2 * shape[0]
    if reduction == "none":
        within(value, weighted, limit * weighted)
    else:
        within(value, weighted.sum(), (limit * weighted).sum())
    mass, others = (
        y.sum(-1, keepdims=True),
        [np.delete(of.p, j, -1).sum(-1) for j in range(shape[1])],
    )
    parts = of.p * (mass - y), y * np.stack(others, -1)
    slope, scale = parts[0] - parts[1], parts[0] + parts[1]
    factor = factor[:, None]
    lost = factor * float(jnp.finfo(name).tiny)  # a probability below the smallest normal number
    within(by_x, factor * slope, limit[:, None] * factor * scale, lost)
    # By the weight of an example: its loss, and in the mean what is left of it above the mean.
    counts = ~ignored & (~(bad & (w == 0)))
    mean = weighted.sum() if reduction == "mean" else 0
    share = 0 if reduction == "mean" and total == 0 else 1 / (total if reduction == "mean" else 1)
    wanted = np.where(counts, losses - mean, 0) * share
    within(by_w[counts], wanted[counts], (limit * (losses + mean) * share)[counts])
    assert np.all(np.isfinite(by_w))
