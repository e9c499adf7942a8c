"""Logits made ready for an exponential: widened, masked, capped, scaled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, Int, Shaped

from jaxsoft._core import devices
from jaxsoft._core.autodiff import jvp_from_vjp
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.sizes import known

_LONG = 4096  # rows with more entries than this are long
_PIECE = 64  # so many entries of a row are looked through one by one
_SATURATED = 1e4  # a number whose tanh is 1 in every type


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for the 16-bit types and below, else the type itself."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def product_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for products of matrices of a type with probabilities and derivatives.

    The type itself, or float32 where it has fewer exponents than that (float16): there they would
    vanish for a confident example, before a loss scale meets them.
    """
    dtype = jnp.dtype(dtype)
    return dtype if float(jnp.finfo(dtype).tiny) < 2.0**-100 else compute_dtype(dtype)


def rounded(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """x in the given type; of one without infinities its lowest number is -inf."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize < 2 and not np.isinf(np.asarray(-np.inf, dtype)):
        x = jnp.maximum(x, float(jnp.finfo(dtype).min))
    return x.astype(dtype)


class Logits(NamedTuple):
    """Rows of logits, ready for an exponential.

    Attributes:
        z: the logits, in float32 or wider; -inf where they are masked.
        top: the maximum m of each row and its sink, or any finite number for a row of -inf alone:
            a constant, without the axis. Of a row on several devices, that of its part here, and
            without the sink.
        sink: the extra logit of each row, moved by the same shift as z, without the axis.
        shift: what was subtracted from the scaled logits, without the axis; None for nothing.
        narrow: 16-bit numbers of which z is nothing but a wider copy, if there are such.
        label: a class of each row that `other_exponentials` leaves out of it, or None. Then the
            two may share their exponentials, and Z - 1 is exact to the rounding of Z where the
            maximum is not of this class.
    """

    z: Float[Array, "..."]
    top: Float[Array, "..."]
    sink: Float[Array, "..."] | None = None
    shift: Float[Array, "..."] | None = None
    narrow: Float[Array, "..."] | None = None
    label: Int[Array, "..."] | None = None


def prepare(
    x: Float[Array, "..."],
    axis: ClassAxis,
    where: Bool[Array, "..."] | None = None,
    temperature: Float[Array, "..."] | None = None,
    sink: Float[Array, "..."] | None = None,
) -> Logits:
    """Widens, masks and scales logits: differentiable in x, the temperature and the sink.

    With a temperature T the logits are centred before they are divided, z = (x - m) / T, so that
    no overflow and no rounding of x / T comes between a row and its maximum. The derivative takes
    m for a constant: what is shift-invariant does not see it, and the rest adds the shift m / T.

    Args:
        x: logits.
        axis: the axis of the classes.
        where: mask of the shape of x.
        temperature: with the axis of size 1.
        sink: with the axis of size 1.
    """
    dtype = compute_dtype(x.dtype)
    if x.dtype.itemsize < 2:  # such a type may have no infinity for a masked class
        x = x.astype(dtype)
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    z = x.astype(dtype)
    # Of the 16-bit numbers: XLA:CPU (jax 0.10) then fuses all of softmax into one loop.
    top = maximum(lax.stop_gradient(x), axis.position).astype(dtype)
    sink = None if sink is None else sink.astype(dtype).squeeze(axis.position)
    shift = None
    if temperature is not None:
        temperature = positive(temperature, dtype)
        # Finite for a row of -inf alone too, and so is the sink when this is subtracted from it.
        of_row, centre = temperature.squeeze(axis.position), devices.largest(top, axis.mesh)
        shift = scaled(centre, of_row)
        z = centred(z, axis.expand(centre), devices.copied(temperature, z, axis.mesh))
        sink = None if sink is None else sink - shift
        # It is 0, but not of a part that does not have the maximum.
        of_row = lax.stop_gradient(of_row)
        top = centred(top, centre, of_row) if axis.mesh else jnp.zeros_like(top)
    if sink is not None and not axis.mesh:
        top = jnp.maximum(top, lax.stop_gradient(sink))
    narrow = x if temperature is None and x.dtype.itemsize == 2 else None
    return Logits(z, top, sink, shift, narrow)


def scaled(
    top: Float[Array, "..."], temperature: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """m / T, kept finite; m is a constant. Without a temperature m."""
    if temperature is None:
        return top
    return -jnp.sign(top) * _scaled(jnp.zeros_like(top), jnp.abs(top), temperature)


def centred(
    z: Float[Array, "..."], top: Float[Array, "..."], temperature: Float[Array, "..."]
) -> Float[Array, "..."]:
    """(z - m) / T, to be broadcast; m is a constant, and so is an entry of -inf."""
    absent = z == -jnp.inf
    return jnp.where(absent, -jnp.inf, _scaled(jnp.where(absent, top, z), top, temperature))


def gap(
    z: Float[Array, "..."], top: Float[Array, "..."], temperature: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """(z - m) / T, without a temperature z - m."""
    return z - top if temperature is None else centred(z, top, temperature)


def gaps_of_rows(
    u: Float[Array, "t n"], top: Float[Array, " t"], temperature: Float[Array, " t"] | None
) -> Float[Array, "t n"]:
    """(u - m) / T of all classes of each row."""
    return gap(u, top[:, None], None if temperature is None else temperature[:, None])


# z = (x - m) / T has dz = (dx - z dT) / T. Division before multiplication: where z overflows, a
# zero cotangent stays zero. With T > 1 all is taken in eighths: those of two numbers of any size
# have a finite difference, and that of T has a reciprocal that does not underflow. With T ≤ 1 a
# difference that overflows does so after the division as well, and an eighth of T might underflow.
@jax.custom_vjp
def _scaled_rule(x: Array, top: Array, temperature: Array) -> Array:
    unit = jnp.where(temperature > 1, 0.125, 1).astype(x.dtype)
    z = (x * unit - top * unit) / (temperature * unit)
    return jnp.maximum(z, jnp.finfo(z.dtype).min)


_scaled = jvp_from_vjp(_scaled_rule)


def _scaled_fwd(x: Array, top: Array, temperature: Array) -> tuple[Array, tuple[Array, Array]]:
    z = _scaled(x, top, temperature)
    return z, (z, temperature)


def _scaled_bwd(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, Array]:
    z, temperature = residuals
    x_bar = divided(cotangent, temperature)
    # An entry so far below the maximum that its derivative by T overflows is a constant.
    z = jnp.where(jnp.isinf(z / temperature), 0, z)
    axes = [a for a in range(z.ndim) if temperature.shape[a] == 1]
    return x_bar, None, -jnp.sum(x_bar * z, axes, keepdims=True)


_scaled_rule.defvjp(_scaled_fwd, _scaled_bwd)


# JAX's derivative of a quotient has 1 / y² in it: infinite for y = 1e-20, and 0 for y = 1e20. In
# units of a power of two near y it is about 1.
def divided(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / y for y > 0, with derivatives that have the range of the type."""
    finfo = jnp.finfo(y.dtype)
    power = lax.reduce_precision(lax.stop_gradient(y), finfo.nexp, 0)
    tiny = float(finfo.tiny)
    scale = 1 / jnp.clip(power, tiny, 1 / tiny)
    return (x * scale) / (y * scale)


def divisor(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, and 1 where it is 0."""
    return jnp.where(x == 0, 1, x)


def positive(option: Shaped[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """An option that must be positive, of the given type and no subnormal number; else NaN."""
    return nan_unless(option > 0, jnp.maximum(option.astype(dtype), jnp.finfo(dtype).tiny))


def nan_unless(valid: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, and NaN where it is not valid."""
    # By a root of -1: where all is valid no NaN is in the program, at which `jax_debug_nans` would
    # stop. (XLA takes 0 / 0 of such numbers for 0.)
    return x + jnp.sqrt(jnp.where(valid, 0, -1).astype(x.dtype))


def maximum(z: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The maximum of each row; the lowest finite number for a row of -inf alone."""
    lowest = jnp.asarray(jnp.finfo(z.dtype).min, z.dtype)
    if known(lambda: z.shape[axis] <= _LONG, True):
        return jnp.maximum(jnp.max(z, axis), lowest)
    # XLA:CPU (jax 0.10) fuses the maximum of a long row with its exponentials if nothing stands
    # between the two. Short ones do not start from a finite number: in a reduction over one entry,
    # which XLA makes of columns stacked to a row, it forgets where it starts.
    return lax.reduce(z, lowest, lax.max, (axis,))


# XLA:CPU (jax 0.10) takes ten times as long for argmax as for max. The maxima of pieces tell in
# which piece the largest entry is, and argmax where it is there. No entry is compared with the
# maximum for equality: it may be computed twice, with other roundings.
def place_of_maximum(u: Float[Array, "t n"]) -> Int[Array, " t"]:
    """The place of the largest entry of each row, the first of several; of NaN, if there is one."""
    t, n = u.shape
    if known(lambda: n < 2 * _PIECE, True):
        return jnp.argmax(u, 1)
    whole = n - n % _PIECE
    pieces = u[:, :whole].reshape(t, -1, _PIECE)
    best = jnp.argmax(jnp.max(pieces, 2), 1)
    few = jnp.take_along_axis(pieces, best[:, None, None], 1)[:, 0]
    place = jnp.argmax(jnp.concatenate([few, u[:, whole:]], 1), 1)
    return jnp.where(place < _PIECE, best * _PIECE + place, whole - _PIECE + place)


def cap(x: Float[Array, "..."], softcap: Shaped[ArrayLike, ""]) -> Float[Array, "..."]:
    """c tanh(x / c), in the compute type; an infinite logit stays, be it a mask or an error."""
    x = x.astype(compute_dtype(x.dtype))
    c = jnp.minimum(positive(jnp.asarray(softcap), x.dtype), jnp.finfo(x.dtype).max)
    infinite = jnp.isinf(x)
    return jnp.where(infinite, x, _capped(jnp.where(infinite, 0, x), c))


# y = c tanh r with r = x / c has dy = sech² r dx + (tanh r - r sech² r) dc, in which nothing is
# divided by c. Where r is too small for a normal number y is x to the last bit.
@jax.custom_jvp
def _capped(x: Array, c: Array) -> Array:
    ratio = _ratio(x, c)
    return jnp.where(jnp.abs(ratio) < jnp.finfo(x.dtype).tiny, x, c * jnp.tanh(ratio))


@_capped.defjvp
def _capped_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, c), (x_dot, c_dot) = primals, tangents
    ratio = _ratio(x, c)
    t = jnp.tanh(ratio)
    slope = (1 - t) * (1 + t)
    return _capped(x, c), slope * x_dot + (t - ratio * slope) * c_dot


def _ratio(x: Array, c: Array) -> Array:
    """x / c, kept where tanh is 1 but the ratio finite."""
    return jnp.clip(divided(x, c), -_SATURATED, _SATURATED)


def keep_inputs(fun: Callable[[], Any], *, prevent_cse: bool = False) -> Any:
    """Calls `fun` so that reverse mode keeps what it closes over, and nothing that it computes.

    What `prepare` makes of the logits is an array of their size: it is made again instead.
    """
    return jax.checkpoint(fun, prevent_cse=prevent_cse)()
