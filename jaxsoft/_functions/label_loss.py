"""The loss of a row against its label or its target, from the statistics, with the rules."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._core import devices
from jaxsoft._core.autodiff import analytic
from jaxsoft._core.axes import ClassAxis
from jaxsoft._functions.log_softmax import log_probabilities
from jaxsoft._functions.softmax import probabilities
from jaxsoft._rows import statistics
from jaxsoft._rows.jacobian_product import Vector, jacobian_product
from jaxsoft._rows.statistics import Row


# loss = (m - z_y) + log Z, both terms non-negative; z̄ = loss-bar · (p - e_y).
def _label_loss(z: Array, label: Array, row: Row, axis: ClassAxis) -> Array:
    loss = (row.top - axis.take(z, label)) + row.log_normalizer
    return devices.copied(loss, z, axis.mesh)


def _label_loss_pullback(z: Array, label: Array, row: Row, axis: ClassAxis, loss_bar: Array) -> Any:
    return axis.expand(loss_bar) * gradient(z, label, row, axis), None, None


label_loss = analytic(_label_loss, _label_loss_pullback, static=(3,))


# p - e_y, with expm1(-loss) = -(1 - p_y) at the label; its derivative is J, as that of p. An entry
# of -inf is a constant, also at the label.
def _gradient(z: Array, label: Array, row: Row, axis: ClassAxis) -> Array:
    others = statistics.other_exponentials(z, row, label, axis)
    others /= axis.expand(row.normalizer.divisor)
    z_label = axis.take(z, label)
    loss = (row.top - z_label) + row.log_normalizer
    at_label = jnp.where(z_label == -jnp.inf, 0, jnp.expm1(-loss))
    return jnp.where(axis.one_hot(label, z), axis.expand(at_label), others)


def _gradient_pullback(z: Array, label: Array, row: Row, axis: ClassAxis, cotangent: Array) -> Any:
    p = probabilities(z, None, row.normalizer, axis, z.dtype)
    return jacobian_product(p, Vector(cotangent, None), axis).classes, None, None


gradient = analytic(_gradient, _gradient_pullback, static=(3,))


# loss = Σ_j q_j ((m - z_j) + log Z), every term non-negative; with Q = Σ_j q_j,
# z̄_j = loss-bar · (Q p_j - q_j) and q̄_j = -loss-bar · log p_j. The entries of z̄ sum to 0: that of a
# class above 1/2 is minus the sum of the others, which is exact for a confident row. Products with
# 0 and 1 stand in place of a selection, with which this takes two to three times as long.
def _target_loss(z: Array, q: Array, row: Row, axis: ClassAxis) -> Array:
    losses = (axis.expand(row.top) - z) + axis.expand(row.log_normalizer)
    return devices.copied(axis.sum(jnp.where(q == 0, 0, q * losses)), z, axis.mesh)


def _target_loss_pullback(z: Array, q: Array, row: Row, axis: ClassAxis, loss_bar: Array) -> Any:
    p = probabilities(z, None, row.normalizer, axis, z.dtype).classes
    is_top, loss_bar = jnp.round(p), axis.expand(loss_bar)
    slope = axis.expand(axis.sum(q)) * p - q
    of_others = slope * (1 - is_top)
    slope = of_others - is_top * axis.expand(axis.sum(of_others))
    absent = (z == -jnp.inf) & (q == 0)
    q_bar = -loss_bar * jnp.where(absent, 0, log_probabilities(z, None, row, axis))
    return jnp.where(z == -jnp.inf, 0, loss_bar * slope), q_bar, None


target_loss = analytic(_target_loss, _target_loss_pullback, static=(3,))
