"""The loss of an example, combined from its parts, and the sum or mean over the examples."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft._core import devices
from jaxsoft._core.devices import Mesh
from jaxsoft._rows.logits import divisor, nan_unless

Reduction = Literal["mean", "sum", "none"]


def check_reduction(function: str, reduction: Any) -> None:
    """Raises `ValueError` for an unknown reduction."""
    names = get_args(Reduction)
    if reduction not in names:
        wanted = ", ".join(names)
        raise ValueError(f"{function}: reduction must be one of {wanted}, got {reduction!r}")


def labelled(
    labels: Int[Array, "..."], n: int, ignore_index: int | None, mesh: Mesh | None
) -> tuple[Bool[Array, "..."], Bool[Array, "..."] | None]:
    """Whether a label is one of n classes, and whether it is the one to ignore, if there is one.

    A label that is not the same on all devices is neither.
    """
    alike = devices.agree(labels, mesh)
    valid = (labels >= 0) & (labels < n) & alike
    return valid, None if ignore_index is None else (labels == ignore_index) & alike


def examples(
    weights: Float[Array, "..."],
    valid: Bool[Array, "..."],
    ignored: Bool[Array, "..."] | None,
    finite: Bool[Array, "..."] | None,
) -> tuple[Float[Array, "..."], Bool[Array, "..."], Bool[Array, "..."] | None]:
    """The weights of examples, 0 for the ignored ones; which have a loss; which are ignored.

    An example of weight 0 is ignored too if its loss cannot be computed. If it can, the example is
    not ignored, for the loss is the derivative by the weight.

    Args:
        weights: 0 or more.
        valid: whether the label exists.
        ignored: where the label is the one to ignore, or None.
        finite: whether the logits or features of the example have a loss; None without weights.
    """
    if finite is not None:
        absent = (weights == 0) & ~(valid & finite)
        ignored = absent if ignored is None else ignored | absent
    if ignored is None:
        return weights, valid, None
    return jnp.where(ignored, 0, weights), valid | ignored, ignored


# loss = (1 - α) w_y l_y + (α/n) Σ_j w_j l_j + ζ (log Z + m)² with l_j = log Z + m - z_j.
def combined(
    label_loss: Float[Array, "..."],
    class_weight: Float[Array, "..."] | None,
    label_smoothing: Float[Array, ""] | None,
    classes: Float[Array, "..."] | int | None,
    spread: Float[Array, "..."] | None,
    z_loss: Float[Array, ""] | None,
    log_partition: Float[Array, "..."] | None,
) -> Float[Array, "..."]:
    """The loss of each example from its parts.

    Args:
        label_loss: l_y, or Σ_j q_j l_j for target probabilities q.
        class_weight: w_y, None for 1.
        label_smoothing: α, None for 0.
        classes: n, how many classes the target is spread over, with label_smoothing.
        spread: Σ_j w_j l_j over these classes, with label_smoothing.
        z_loss: ζ, None for 0.
        log_partition: log Z + m, with z_loss.
    """
    out, weight, alpha = label_loss, class_weight, label_smoothing
    if alpha is not None:
        alpha = nan_unless((alpha >= 0) & (alpha <= 1), alpha)
        weight = 1 - alpha if weight is None else (1 - alpha) * weight
    if weight is not None:
        out = weighted(weight, out)
    if alpha is not None and classes is not None and spread is not None:
        out += weighted(alpha / classes, spread)
    if z_loss is not None and log_partition is not None:
        out += z_loss * log_partition**2
    return out


def weighted(weight: Float[Array, "..."], loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product, with 0 · inf = 0: an infinite loss of weight 0 does not count."""
    return weight * jnp.where((weight == 0) & (loss == jnp.inf), 0, loss)


def reduced(losses: Array, weights: Array, reduction: Reduction) -> Array:
    """Weighted losses, their sum, or their mean over the total of the weights, 0 if that is 0.

    For a sum or a mean the losses may be added up already.
    """
    if reduction == "none":
        return losses
    loss, weight = jnp.sum(losses), jnp.sum(weights)
    if reduction == "sum":
        return loss
    return jnp.where(weight == 0, 0, loss / divisor(weight))
