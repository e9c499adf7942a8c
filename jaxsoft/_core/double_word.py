"""Numbers taken apart, and logarithms to twice the working precision.

A double word is a sum h + l of two floating-point numbers that is not evaluated: l is at most
about half a unit in the last place of h, so the pair holds twice the digits.

Two liberties of XLA would lose the lower one (seen with 0.10.2 on the CPU; the table of cancelling
terms in the tests then fails under jit). It may contract a product and the sum that it feeds to one
operation, in one use of the product and not in another: so every product here is one of halves,
exact either way, or else too small to matter. And it takes (x + c) - c for x where c is a constant:
so constants come from a selection by a number of which XLA knows nothing.
"""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float

_LN2 = Fraction("0.6931471805599453094172321214581765680755001343602552541206800095")


class Parts(NamedTuple):
    """b = f 2^e.

    Attributes:
        fraction: f, |f| in [√½, √2); b itself where b is 0, infinite or NaN.
        exponent: e, a whole number of the dtype of b.
    """

    fraction: Float[Array, "..."]
    exponent: Float[Array, "..."]


def parts(b: Float[Array, "..."]) -> Parts:
    """Takes float32 or float64 numbers apart.

    By their bits, for in XLA's arithmetic on a CPU subnormal numbers are 0.
    """
    info = np.finfo(b.dtype)
    unsigned = np.dtype(f"uint{info.bits}").type
    bits = functools.partial(lax.bitcast_convert_type, new_dtype=unsigned)
    root, one = (np.array(x, b.dtype).view(unsigned) for x in (np.sqrt(0.5), 1))
    mantissa, magnitude = unsigned((1 << info.nmant) - 1), unsigned((1 << (info.bits - 1)) - 1)

    size = bits(b) & magnitude
    sign = bits(b) ^ size
    subnormal = size <= mantissa  # the whole number that its bits are, times the smallest one
    normal = jnp.where(subnormal, bits(size.astype(b.dtype)), size)
    # Counted from √½ rather than from 1, the exponent changes at √2 rather than at 2.
    shifted = normal + (one - root)
    exponent = lax.shift_right_logical(shifted, unsigned(info.nmant)).astype(b.dtype)
    exponent += jnp.where(subnormal, float(info.minexp - info.nmant), 0) + float(info.minexp - 1)
    fraction = lax.bitcast_convert_type(((shifted & mantissa) + root) | sign, b.dtype)
    is_number = (size != 0) & jnp.isfinite(b)
    return Parts(jnp.where(is_number, fraction, b), jnp.where(is_number, exponent, 0))


@functools.cache
def log_of_two(dtype: DTypeLike) -> tuple[float, float, float]:
    """Log 2 in three parts: a difference of two exponents times one of the first two is exact."""
    info = np.finfo(dtype)
    width = info.nmant - info.iexp
    high = Fraction(int(_LN2 * 2**width), 2**width)
    middle = Fraction(int((_LN2 - high) * 4**width), 4**width)
    return float(high), float(middle), float(_LN2 - high - middle)


# log f = 2 atanh(s) = 2 s (1 + s²/3 + s⁴/5 + …), s = (f - 1) / (f + 1), |s| < 0.172, where f - 1
# is exact. The first terms are summed in double words; of the others the working precision does.
def plus_logarithm(
    a: Float[Array, "..."], b: Parts
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A + log|b| as a double word, for b neither 0 nor infinite: right where the two cancel."""
    dtype = a.dtype
    digits = np.finfo(dtype).nmant + 1
    terms, doubled = 2 * digits // 5, digits // 5 - 1  # of 1, s²/3, …: s² < 2^-5
    fraction = jnp.abs(b.fraction)

    def constant(number: float) -> Array:
        return jnp.where(fraction > 0, jnp.asarray(number, dtype), fraction)

    ratio = _quotient((fraction - 1, jnp.zeros_like(a)), sum_of(fraction, constant(1.0)))
    square = _product(ratio, ratio)
    tail = jnp.zeros_like(a)
    for k in range(terms, doubled, -1):
        tail = tail * square[0] + 1 / (2 * k + 1)
    series = tail, jnp.zeros_like(a)
    for k in range(doubled, -1, -1):
        coefficient = Fraction(1, 2 * k + 1)
        high = float(np.array(float(coefficient), dtype))
        product = _product(square, series)
        total, error = _ordered_sum(constant(high), product[0])
        series = total, error + (product[1] + float(coefficient - Fraction(high)))
    logarithm = _product((2 * ratio[0], 2 * ratio[1]), series)

    first, second, third = log_of_two(dtype)
    total, error = sum_of(a, b.exponent * first)
    for summand in (logarithm[0], b.exponent * second):
        total, rounded = sum_of(total, summand)
        error += rounded
    return _ordered_sum(total, error + (logarithm[1] + b.exponent * third))


def sum_of(a: Float[Array, "..."], b: Float[Array, "..."]) -> tuple[Array, Array]:
    """A + b as a double word, exactly."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _ordered_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The same for |a| ≥ |b|."""
    total = a + b
    return total, b - (total - a)


def product_of(a: Float[Array, "..."], b: Float[Array, "..."]) -> tuple[Array, Array]:
    """A b as a double word."""
    return _product((a, jnp.zeros_like(a)), (b, jnp.zeros_like(b)))


def _halves(a: Array) -> tuple[Array, Array]:
    """Two parts of at most half the digits, so that a product of two such is exact."""
    info = np.finfo(a.dtype)
    high = lax.reduce_precision(a, info.iexp, (info.nmant - 1) // 2)
    return high, a - high


def _product(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    (a_high, a_low), (b_high, b_low) = _halves(a[0]), _halves(b[0])
    total, error = _ordered_sum(a_high * b_high, a_high * b_low)
    total, other = _ordered_sum(total, a_low * b_high)
    error += other + (a_low * b_low + (a[0] * b[1] + a[1] * b[0]))
    return _ordered_sum(total, error)


def _quotient(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    quotient = a[0] / b[0]
    product, error = _product((quotient, jnp.zeros_like(quotient)), b)
    return quotient, ((a[0] - product) + (a[1] - error)) / b[0]
