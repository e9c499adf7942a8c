"""Random rows of every kind against longer arithmetic: `make fuzz` runs many more of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsoft
from jaxsoft.testing import error_in_eps
from tests.exact import DTYPES, EPS

# The number of cases of the normal run; `make fuzz` chooses a profile with more.
CASES = max(2000, settings.default.max_examples)

# Few shapes, for each one is compiled, with the axis of the classes.
SHAPES = [((1,), 0), ((2, 3), -1), ((7, 2), 0), ((2, 5, 3), 1), ((2, 2, 3), (0, 2)), ((3, 40), -1)]
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
    shape, axis = draw(st.sampled_from(SHAPES))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = draw(st.sampled_from([0.1, 2.0, 30.0])) * rng.normal(size=shape)
    x += draw(st.sampled_from([0.0, 0.0, 100.0]))
    if draw(st.booleans()):  # ties
        x = np.round(x)
    info = jnp.finfo(dtype)
    numbers = {"largest": float(info.max), "-largest": float(info.min), "tiny": float(info.tiny)}
    for extreme in draw(st.lists(st.sampled_from(EXTREMES), max_size=3)):
        x[tuple(rng.integers(shape))] = numbers.get(extreme, extreme)
    where = rng.uniform(size=shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.0, 1.0]))
    axes = axis if isinstance(axis, tuple) else (axis % len(shape),)
    row = tuple(1 if a in axes else size for a, size in enumerate(shape))
    temperature = sink = None
    if draw(st.booleans()):
        temperature = 10 ** rng.uniform(-2, 2, size=row).astype(dtype)
    if draw(st.booleans()):
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


@settings(max_examples=CASES)
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
    close(log_p, wanted.log_p, limits(case, wanted.widest) + 4, among=~beyond)
    # Numbers that underflow before they are divided by the temperature are lost.
    unit = 1 if case.temperature is None else 1 / case.temperature.astype(np.float64)
    lost = tiny / EPS[case.x.dtype.name] * np.maximum(unit, 1)
    scale = np.maximum(wanted.spread, lost)
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
