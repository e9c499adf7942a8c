"""The loss of an example, put together from its parts, and what the examples make of it."""

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsoft._rows.logits import nan_unless

Reduction = Literal["mean", "sum", "none"]


def check_reduction(function: str, reduction: Any) -> None:
    """Raises `ValueError` for an unknown reduction."""
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"{function}: reduction must be one of {', '.join(get_args(Reduction))}, "
            f"got {reduction!r}"
        )


def spoiled(
    statistic: Float[Array, "..."],
    valid: Bool[Array, "..."],
    ignored: Bool[Array, "..."] | None,
) -> Float[Array, "..."]:
    """A statistic, but NaN for a label that does not exist: then so are its loss and gradient."""
    return nan_unless(valid if ignored is None else valid | ignored, statistic)


def examples(
    weights: Float[Array, "..."],
    valid: Bool[Array, "..."],
    ignored: Bool[Array, "..."] | None,
    finite: Bool[Array, "..."] | None,
) -> tuple[Float[Array, "..."], Bool[Array, "..."] | None]:
    """The weights of examples, 0 for those that are ignored, and which these are.

    Ignored is as well what has no weight and cannot be computed either. Of what can, the derivative
    by the weight counts.

    Args:
        weights: 0 or more.
        valid: whether the label exists.
        ignored: where the label is the one to ignore, or None.
        finite: whether what the example holds has a loss; None if no weight is 0.
    """
    if finite is not None:
        absent = (weights == 0) & ~(valid & finite)
        ignored = absent if ignored is None else ignored | absent
    weights = weights if ignored is None else jnp.where(ignored, 0, weights)
    return weights, ignored


class Smoothing(NamedTuple):
    """The part of the target that is spread over the classes.

    Attributes:
        alpha: α.
        classes: n, how many classes there are.
        losses: Σ_j w_j l_j over them.
    """

    alpha: Float[Array, ""]
    classes: Float[Array, "..."] | int
    losses: Float[Array, "..."]


# loss = (1 - α) w_y l_y + (α/n) Σ_j w_j l_j + ζ (log Z + m)² with l_j = log Z + m - z_j.
def token_loss(
    label_loss: Float[Array, "..."],
    class_weight: Float[Array, "..."] | None,
    smoothing: Smoothing | None,
    z_loss: Float[Array, ""] | None,
    log_partition: Float[Array, "..."] | None,
    ignored: Bool[Array, "..."] | None,
) -> Float[Array, "..."]:
    """The loss of each example.

    Args:
        label_loss: l_y, or Σ_j q_j l_j for target probabilities q.
        class_weight: w_y, None for 1.
        smoothing: None for α = 0.
        z_loss: ζ, None for 0.
        log_partition: log Z + m, with z_loss.
        ignored: where the loss is 0 whatever the rest is; None for nowhere.
    """
    out, weight = label_loss, class_weight
    if smoothing is not None:
        alpha = nan_unless((smoothing.alpha >= 0) & (smoothing.alpha <= 1), smoothing.alpha)
        weight = 1 - alpha if weight is None else (1 - alpha) * weight
        spread = weighted(alpha / smoothing.classes, smoothing.losses)
        out = weighted(weight, out) + spread
    elif weight is not None:
        out = weighted(weight, out)
    if z_loss is not None and log_partition is not None:
        out += z_loss * log_partition**2
    return out if ignored is None else jnp.where(ignored, 0, out)


def weighted(weight: Float[Array, "..."], loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product, with 0 · inf = 0: what has no weight has no loss."""
    return weight * jnp.where((weight == 0) & (loss == jnp.inf), 0, loss)


def reduced(losses: Array, weights: Array, reduction: Reduction) -> Array:
    """Weighted losses, their sum, or their mean over the total of the weights."""
    if reduction == "none":
        return losses
    total = jnp.sum(losses)
    return total if reduction == "sum" else over(total, jnp.sum(weights))


def over(total: Array, weight: Array) -> Array:
    """The mean; 0 where nothing has a weight."""
    return jnp.where(weight == 0, 0, total / jnp.where(weight == 0, 1, weight))
