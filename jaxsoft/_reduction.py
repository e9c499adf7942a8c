"""How the losses of examples become one number, or stay."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array

Reduction = Literal["mean", "sum", "none"]


def check(function: str, reduction: Any) -> None:
    """Raises `ValueError` for an unknown reduction."""
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"{function}: reduction must be one of {', '.join(get_args(Reduction))}, "
            f"got {reduction!r}"
        )


def weighted(weight: Array, loss: Array) -> Array:
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
