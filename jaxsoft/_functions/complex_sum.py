"""log Σ_j b_j exp(a_j) of complex numbers."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._core import devices, programs
from jaxsoft._core.autodiff import analytic
from jaxsoft._core.axes import ClassAxis
from jaxsoft._rows.logits import keep_inputs
from jaxsoft._rows.rowwise import rowwise


def _nothing(a: Array, rows: tuple[int, ...], return_sign: bool) -> tuple[Array, Array]:
    out = jnp.full(rows, -jnp.inf, a.dtype)
    return out.real if return_sign else out, jnp.zeros(rows, a.dtype)


@rowwise(places=programs.rows, empty=_nothing, static=("keepdims", "return_sign"))
def log_and_sign(
    a: Array, b: Array | None, where: Array | None, axis: ClassAxis, return_sign: bool
) -> tuple[Array, Array]:
    """log|S| and S / |S|; log|S| + i arg S in place of the former without `return_sign`."""
    if where is not None:
        a = jnp.where(where, a, -jnp.inf)
        b = None if b is None else jnp.where(where, b, 0)
    if b is not None:
        b = devices.copied(b, a, axis.mesh)
        a = jnp.where(b == 0, -jnp.inf, a)
    top = devices.largest(jnp.max(lax.stop_gradient(a.real), axis.position), axis.mesh)
    top = jnp.where(jnp.isfinite(top), top, 0)

    def parts() -> tuple[Array, Array]:
        terms = _exp(a.real - axis.expand(top), a.imag)
        terms = terms if b is None else terms * b
        return part_sum(terms.real, axis), part_sum(terms.imag, axis)

    real, imag = (devices.joined(part, axis.mesh) for part in keep_inputs(parts))
    infinite = jnp.isinf(real) | jnp.isinf(imag)
    real, imag = (jnp.where(infinite, _direction(part), part) for part in (real, imag))
    nothing = (real == 0) & (imag == 0)
    total = lax.complex(jnp.where(nothing, 1, real), imag)
    logarithm = jnp.log(total)
    size = jnp.where(nothing, -jnp.inf, jnp.where(infinite, jnp.inf, logarithm.real + top))
    out = size if return_sign else lax.complex(size, logarithm.imag)
    modulus = jnp.abs(total)
    sign = jnp.where(nothing, 0, lax.complex(total.real / modulus, total.imag / modulus))
    return out, sign


def _exp(real: Array, imag: Array) -> Array:
    """exp(x + i y) as in C99: 0 for x = -inf whatever y is, and real for y = 0 whatever x is."""
    imag = jnp.where((real == -jnp.inf) & ~jnp.isfinite(imag), 0, imag)
    size, sine = jnp.exp(real), jnp.sin(imag)
    height = jnp.where((size == jnp.inf) & (sine == 0), 1, size)
    return lax.complex(size * jnp.cos(imag), height * sine)


def _direction(part: Array) -> Array:
    """One part of a complex number that is infinite, of a finite one in the same direction."""
    infinite = jnp.isinf(part)
    return jnp.where(infinite, jnp.sign(part), 0 * jnp.where(infinite, 0, part))


# A sum over all devices, with the derivative by the part of one.
def _part_sum(terms: Array, axis: ClassAxis) -> Array:
    return devices.copied(axis.sum(terms), terms, axis.mesh)


def _part_sum_pullback(terms: Array, axis: ClassAxis, cotangent: Array) -> Any:
    return (jnp.broadcast_to(axis.expand(cotangent), terms.shape),)


part_sum = analytic(_part_sum, _part_sum_pullback, static=(1,))
