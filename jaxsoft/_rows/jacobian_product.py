"""The derivatives of softmax and log_softmax as products with a vector, from the probabilities."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsoft._core import devices
from jaxsoft._core.axes import ClassAxis, Rows
from jaxsoft._core.primitives import Linear
from jaxsoft._rows.logits import compute_dtype


class Probabilities(NamedTuple):
    """Probabilities of rows, and what J v needs to know of them.

    Attributes:
        classes: p, which sums to 1 together with the sink.
        sink: the probability of the sink, without the axis; None if there is none.
        flat: 1 in a row where none of them exceeds 1/2, else 0; without the axis. A constant.
    """

    classes: Float[Array, "..."]
    sink: Float[Array, "..."] | None
    flat: Float[Array, "..."]


class Vector(NamedTuple):
    """A tangent or a cotangent of rows: entries for the classes, and for the sink if there is one.

    Attributes:
        classes: with the axis.
        sink: without the axis.
    """

    classes: Float[Array, "..."]
    sink: Float[Array, "..."] | None


def flatness(largest: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 in a row whose largest probability is at most 1/2, which rounds to 0; else 0."""
    return 1 - jnp.round(largest.astype(compute_dtype(largest.dtype)))


def jacobian_product(p: Probabilities, v: Vector, axis: ClassAxis, *, free: bool = False) -> Vector:
    """J v in the compute dtype.

    Args:
        p: the probabilities along the axis.
        v: a tangent or a cotangent.
        axis: the axis of the classes. Of classes on several devices the entry for the sink is
            an equal share of it.
        free: whether p is differentiated also in directions that change its sum.
    """
    dtype = compute_dtype(p.classes.dtype)
    v = Vector(v.classes.astype(dtype), None if v.sink is None else v.sink.astype(dtype))
    if axis.mesh is None:
        return (PRODUCT_OF_FREE if free else PRODUCT)(p, v, axis=axis)
    y = symmetric(p._replace(flat=devices.copied(p.flat, p.classes, axis.mesh)), v, axis)
    return y._replace(sink=devices.shares(y.sink, p.classes, axis.mesh))


# J v = p ∘ (v - ⟨p, v⟩), and v - ⟨p, v⟩ is the tangent of log_softmax. A constant in v changes
# nothing, so one is subtracted first: u = v - c, then u - ⟨p, u⟩. With c = v_k where one p_k
# exceeds 1/2, u_k is 0 and the result for that class is -Σ_{j≠k} p_j u_j: nothing is subtracted
# from 1. Elsewhere c = ⟨p, v⟩, which takes a common offset out of v before it can round, and mends
# a Σp that is not quite 1. Either way c = Σ w_j v_j with weights that sum to 1. The sink is one
# more class.
def centred(
    ps: list[Array],
    vs: list[Array],
    flat: Array,
    axis: Rows,
    total: Callable[[list[Array], Rows], Array],
    *,
    free: bool = False,
) -> list[Array]:
    """v - ⟨p, v⟩, of the classes and the sink."""
    c = total(list(map(jnp.multiply, anchor(ps, flat), vs)), axis)
    us = [v - c for v in vs]
    mean = total(list(map(jnp.multiply, ps, us)), axis)
    if free:  # c Σp less its value: for the derivative
        of_p = total(ps, axis)
        mean += (of_p - lax.stop_gradient(of_p)) * c
    return [u - mean for u in us]


def anchor(ps: list[Array], flat: Array) -> list[Array]:
    """w: 1 for a class above 1/2, and p in a row without one. Constants."""
    return [lax.stop_gradient(jnp.maximum(jnp.round(p), p * flat)) for p in ps]


# A class of probability 0 has no part in J v, whatever v holds there, NaN included.
def product(
    p: Probabilities,
    v: Vector,
    axis: Rows,
    *,
    total: Callable[[list[Array], Rows], Array],
    present: Callable[[Array, Array], Array],
    free: bool = False,
) -> Vector:
    """J v, given how to sum over a row and how to leave out classes of probability 0."""
    ps, vs = _entries(p.classes, p.sink, axis), _entries(v.classes, v.sink, axis)
    vs = list(map(present, ps, vs))
    vs = centred(ps, vs, axis.expand(p.flat), axis, total, free=free)
    return _vector([present(p, p * v) for p, v in zip(ps, vs, strict=True)], axis)


def portable(p: Probabilities, v: Vector, *, axis: Rows) -> Vector:
    """J v as every platform can compute it."""
    return product(p, v, axis, total=total, present=of_present)


def total(terms: list[Array], axis: Rows) -> Array:
    """The sum over the classes and the sink, for each class."""
    classes, *sink = terms
    return sum(sink, axis.expand(axis.sum(classes)))


def of_present(p: Array, v: Array) -> Array:
    """v, and 0 for a class of probability 0."""
    return jnp.where(p == 0, 0, v)


def _entries(classes: Array, sink: Array | None, axis: Rows) -> list[Array]:
    """The entries of a row in the compute dtype, that of the sink with an axis of size 1."""
    entries = [classes] if sink is None else [classes, axis.expand(sink)]
    return [x.astype(compute_dtype(x.dtype)) for x in entries]


def _vector(entries: list[Array], axis: Rows) -> Vector:
    classes, *sink = entries
    return Vector(classes, sink[0].squeeze(axis.position) if sink else None)


# Forward mode computes the transpose of what reverse mode computes. J is symmetric, and the formula
# is not: it is J P with P = 1 - 1 wᵀ, whose transpose Pᵀ J begins with the product that is not
# centred. So J v is a primitive that is stated to be its own transpose.
def _differentiable(p: Probabilities, v: Vector, *, axis: Rows) -> Vector:
    return product(p, v, axis, total=total, present=of_present, free=True)


def _like_v(_: Probabilities, v: Vector) -> Vector:
    return v


PRODUCT = Linear("softmax_jacobian_product", portable, _like_v)
PRODUCT.transpose_to(PRODUCT)
PRODUCT_OF_FREE = Linear("free_jacobian_product", _differentiable, _like_v, value=portable)
PRODUCT_OF_FREE.transpose_to(PRODUCT_OF_FREE)


# Among several devices JAX transposes the sums that they exchange. The entries of J v sum to 0, so
# that Pᵀ changes nothing but the rounding; but Pᵀ J P is symmetric as a program too.
def symmetric(p: Probabilities, v: Vector, axis: Rows) -> Vector:
    """J v by a program that is symmetric as well."""
    ps = _entries(p.classes, p.sink, axis)
    ys = _entries(*portable(p, v, axis=axis), axis)
    ys = _without_sum(ys, anchor(ps, axis.expand(p.flat)), axis)
    return _vector(list(map(of_present, ps, ys)), axis)


# The transpose of v ↦ v - ⟨p, v⟩ is y ↦ y - p Σy, and that of v ↦ v - ⟨w, v⟩ is y ↦ y - w Σy.
def _without_sum(ys: list[Array], weights: list[Array], axis: Rows) -> list[Array]:
    """y - w Σy: with w = 1 for one class, what it has becomes minus the sum of the others."""
    excess = total(ys, axis)
    return [y - w * excess for y, w in zip(ys, weights, strict=True)]


def log_pullback(p: Probabilities, y: Float[Array, "..."], axis: ClassAxis) -> Vector:
    """The cotangent of the logits of log_softmax: y - p Σy, and -p Σy for the sink.

    Of classes on several devices the entry for the sink is an equal share of it.
    """
    if axis.mesh is None:
        return PULLBACK(p, Vector(y, None), axis=axis)
    z = portable_log_pullback(p, Vector(y, None), axis=axis)
    return z._replace(sink=devices.shares(z.sink, p.classes, axis.mesh))


def portable_log_pullback(p: Probabilities, y: Vector, *, axis: Rows) -> Vector:
    """The same as every platform can compute it."""
    of_y = total([y.classes], axis)
    ps = _entries(p.classes, p.sink, axis)
    zs = [y.classes - ps[0] * of_y, *(-q * of_y for q in ps[1:])]
    # In a row without a class above 1/2 the sum is rounding, and may stay.
    tops = [lax.stop_gradient(jnp.round(q)) for q in ps]
    return _vector(_without_sum(zs, tops, axis), axis)


def portable_log_pushforward(p: Probabilities, v: Vector, *, axis: Rows) -> Vector:
    """v - ⟨p, v⟩ as every platform can compute it."""
    ps, vs = _entries(p.classes, p.sink, axis), _entries(*v, axis)
    return Vector(centred(ps, vs, axis.expand(p.flat), axis, total)[0], None)


PULLBACK = Linear(
    "log_softmax_pullback", portable_log_pullback, lambda p, y: Vector(y.classes, p.sink)
)
PUSHFORWARD = Linear(
    "log_softmax_pushforward", portable_log_pushforward, lambda _, v: Vector(v.classes, None)
)
PULLBACK.transpose_to(PUSHFORWARD)
