"""Random rows of every kind through entmax and its loss, against bisection in longer arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsoft
from tests.exact import EPS
from tests.functions.test_fuzz import CASES, SHAPES, cases

ALPHAS = (1.5, 2.0, "array")


@functools.partial(jax.jit, static_argnames=("axis", "number"))
def computed(x, where, temperature, alpha, cotangent, *, axis, number):
    """Probabilities, their derivatives along a cotangent and along 1, and the loss of p itself."""
    options = {"where": where}
    if temperature is not None:
        options["temperature"] = temperature
    alpha = alpha if number is None else number
    p, pullback = jax.vjp(lambda x: jaxsoft.entmax(x, alpha, axis, **options), x)
    along, constant = pullback(cotangent)[0], pullback(jnp.ones_like(x))[0]
    return p, along, constant, jaxsoft.entmax_loss(x, p, alpha, axis, **options)


def exact(case, alpha):
    """Probabilities by bisection, and which rows are bad or empty."""
    dtype = np.longdouble if case.x.dtype == np.float64 else np.float64
    keep = {"axis": case.axis, "keepdims": True}
    x = np.where(case.where, case.x.astype(dtype), -np.inf)
    bad = np.any(np.isnan(x) | (x == np.inf), **keep)
    x = np.where(bad, 0, x)
    temperature = 1 if case.temperature is None else case.temperature.astype(dtype)
    top = np.max(x, **keep)
    z = (x - np.where(top == -np.inf, 0, top)) / temperature
    a = alpha.astype(dtype) - 1
    power = np.where(a == 0, 1, 1 / np.where(a == 0, 1, a))

    def at(level):
        with np.errstate(invalid="ignore", over="ignore"):
            u = np.maximum(1 + a * (z - level), 0)
            return np.where(a == 0, np.exp(z - level), u**power)

    low = np.zeros(np.broadcast_shapes(a.shape, top.shape), dtype)
    high = low + np.log(dtype(x.size)) + 1
    for _ in range(75):
        middle = (low + high) / 2
        above = at(middle).sum(**keep) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    p = np.where(top == -np.inf, 0, at(low))
    return p, np.broadcast_to(bad, x.shape), np.broadcast_to(top == -np.inf, x.shape)


@settings(max_examples=CASES // 8)
@given(cases(), st.integers(0, 2**32 - 1))
def test_any_row_of_entmax(case, seed):
    # Of each shape and dtype one program.
    kind = [shape for shape, _ in SHAPES].index(case.x.shape)
    alpha = ALPHAS[(2 * kind + sorted(EPS).index(case.x.dtype.name)) % 3]
    axes = case.axis if isinstance(case.axis, tuple) else (case.axis % case.x.ndim,)
    row = tuple(1 if a in axes else size for a, size in enumerate(case.x.shape))
    number = None if alpha == "array" else alpha
    choices = np.random.default_rng(seed).choice([1.0, 1.1, 1.5, 2.0, 2.5], row)
    # Of a 16-bit number less 1 few digits are left, but those are exact.
    alphas = (choices if number is None else np.full(row, alpha)).astype(case.x.dtype)
    given = case.x, case.where, case.temperature, alphas, case.cotangent
    got = [np.asarray(a) for a in computed(*given, axis=case.axis, number=number)]
    p, along, constant, loss = got
    wanted, bad, empty = exact(case, alphas)
    eps = EPS[case.x.dtype.name]

    assert np.all(np.isnan(p[bad & case.where]))
    for array in (p, along, constant):
        assert not np.any(np.isnan(array[~bad]))
    assert np.all(p[empty & ~bad] == 0)
    assert np.all(p[~case.where & ~bad] == 0)
    assert np.all((p[~bad] >= 0) & (p[~bad] <= 1))
    # The rounding of a quotient by the temperature is that of the logits.
    scaled = case.temperature is not None
    allowed = 1 if case.x.dtype.itemsize < 4 else 40 if scaled else 2
    error = np.abs(p.astype(wanted.dtype) - wanted)[~bad]
    # At the edge the slope for α > 2 is infinite: there too the longer arithmetic is too short.
    if number is not None or not (scaled or case.x.dtype.itemsize == 8):
        assert np.all(error <= allowed * eps), f"{error.max() / eps:.3g} eps"
    total = np.sum(p.astype(wanted.dtype), axis=case.axis, keepdims=True)
    n = np.prod([case.x.shape[a] for a in axes])
    sums = np.broadcast_to(total, p.shape)[~bad & ~empty]
    assert np.all(np.abs(sums - 1) <= (n if case.x.dtype.itemsize < 4 else 2) * eps)
    # J·1 = 0, in units of the slopes, which are 1 / T for α ≤ 2.
    unit = 1 if case.temperature is None else 1 / case.temperature.astype(np.float64)
    if number is not None:
        assert np.all((np.abs(constant) <= 8 * eps * unit)[~bad])
    rows_bad = np.any(bad, axis=case.axis)
    assert np.all(loss[~rows_bad] >= 0)
