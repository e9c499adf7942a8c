"""The loss of a row against its label or its target, from the statistics, with the rules."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._core import devices
from jaxsoft._core.autodiff import analytic, valued
from jaxsoft._core.axes import ClassAxis
from jaxsoft._functions.log_softmax import log_probabilities
from jaxsoft._functions.softmax import probabilities
from jaxsoft._rows import statistics
from jaxsoft._rows.jacobian_product import Vector, jacobian_product
from jaxsoft._rows.statistics import Row


# loss = (m - z_y) + log Z, both terms non-negative; z̄ = loss-bar · (p - e_y).
def _negative_log_likelihood(z: Array, label: Array, row: Row, axis: ClassAxis) -> Array:
    loss = (row.top - axis.take(z, label)) + row.log_normalizer
    return devices.copied(loss, z, axis.mesh)


def _negative_log_likelihood_pullback(
    z: Array, label: Array, row: Row, axis: ClassAxis, cotangent: Array
) -> Any:
    return axis.expand(cotangent) * hard_residual(z, label, row, axis), None, None


negative_log_likelihood = analytic(
    _negative_log_likelihood, _negative_log_likelihood_pullback, static=(3,)
)


# p - e_y, with expm1(-loss) = -(1 - p_y) at the label; its derivative is J, as that of p. An entry
# of -inf is a constant, also at the label.
def _hard_residual(z: Array, label: Array, row: Row, axis: ClassAxis) -> Array:
    others = statistics.other_exponentials(z, row, label, axis)
    others /= axis.expand(row.normalizer.divisor)
    z_label = axis.take(z, label)
    loss = (row.top - z_label) + row.log_normalizer
    at_label = jnp.where(z_label == -jnp.inf, 0, jnp.expm1(-loss))
    return jnp.where(axis.one_hot(label, z), axis.expand(at_label), others)


def _hard_residual_pullback(
    z: Array, label: Array, row: Row, axis: ClassAxis, cotangent: Array
) -> Any:
    p = probabilities(z, None, row.normalizer, axis, z.dtype)
    return jacobian_product(p, Vector(cotangent, None), axis).classes, None, None


hard_residual = analytic(_hard_residual, _hard_residual_pullback, static=(3,))


def expected(z: Array, target: Array, row: Row, axis: ClassAxis) -> Array:
    """Σ_j q_j l_j, by a target that is broadcast to the classes."""
    target = devices.copied(jnp.broadcast_to(target, z.shape), z, axis.mesh)
    return expected_loss(z, target, row, axis)


# loss = Σ_j q_j ((m - z_j) + log Z), every term non-negative; with Q = Σ_j q_j,
# z̄_j = loss-bar · (Q p_j - q_j) and q̄_j = -loss-bar · log p_j. To keep the former exact for a
# confident row it is put together as p_j (Σ_{i≠j} q_i) - q_j (1 - p_j), both from sums of others.
def _expected_loss(z: Array, target: Array, row: Row, axis: ClassAxis) -> Array:
    losses = (axis.expand(row.top) - z) + axis.expand(row.log_normalizer)
    return devices.copied(axis.sum(jnp.where(target == 0, 0, target * losses)), z, axis.mesh)


def _expected_loss_pullback(
    z: Array, target: Array, row: Row, axis: ClassAxis, cotangent: Array
) -> Any:
    p = probabilities(z, None, row.normalizer, axis, z.dtype).classes
    absent = (z == -jnp.inf) & (target == 0)
    target = jnp.where(absent, 0, target)  # a constant: it contributes 0
    total = axis.expand(axis.sum(target))
    large = 2 * target > total
    small_total = axis.expand(axis.sum(jnp.where(large, 0, target)))
    others = jnp.where(large, small_total, total - target)
    rest = axis.expand(devices.copied(row.rest / row.normalizer.divisor, p, axis.mesh))
    complement = valued(1 - p, jnp.where(p > 0.5, rest, 1 - p))
    cotangent = axis.expand(cotangent)
    z_bar = cotangent * (p * others - target * complement)
    log_p = log_probabilities(z, None, row, axis)
    target_bar = -cotangent * jnp.where(absent, 0, log_p)
    return jnp.where(z == -jnp.inf, 0, z_bar), target_bar, None


expected_loss = analytic(_expected_loss, _expected_loss_pullback, static=(3,))
