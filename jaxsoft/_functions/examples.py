"""What all losses of logits and labels do with examples: check, ignore, weigh and reduce them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._core import class_ids, options, validation
from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.sizes import Shape, known
from jaxsoft._functions import token_loss
from jaxsoft._functions.token_loss import Reduction
from jaxsoft._rows.logits import compute_dtype


class Arguments(NamedTuple):
    """The arguments that all such losses have, checked.

    Attributes:
        logits: floating.
        labels: class ids without the axis, or target probabilities of the shape of the logits.
        where: the mask, of that shape too, or None.
        temperature: with the axes of size 1, or None.
        weights: without the axes, or None.
        axes: those of the classes.
        ignore_index: the class id to ignore, or None.
    """

    logits: Any
    labels: Any
    where: Any
    temperature: Any
    weights: Any
    axes: tuple[int, ...]
    ignore_index: int | None

    @property
    def shape(self) -> Shape:
        """Of the logits."""
        return self.logits.shape

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return math.prod(self.shape[a] for a in self.axes)


def arguments(
    name: str,
    logits: Any,
    labels: Any,
    axis: Any,
    where: Any,
    temperature: Any,
    weights: Any,
    ignore_index: Any,
    reduction: Any,
) -> Arguments:
    """Raises `TypeError` or `ValueError`, naming the function and the argument."""
    logits = validation.array(name, "logits", logits)
    swapped = validation.is_discrete(logits)
    logits = validation.floating(name, "logits", logits)
    shape, axes = logits.shape, validation.axes(name, axis, logits.ndim)
    rows = tuple(size for a, size in enumerate(shape) if a not in axes)
    token_loss.check_reduction(name, reduction)
    labels, ignored = class_ids.labels(name, labels, shape, axes, ignore_index, swapped=swapped)
    of_classes = "the shape of the logits; it masks classes, weights or ignore_index examples"
    where = validation.mask(name, where, shape, of_classes)
    if weights is not None:
        weights = options.non_negative(name, "weights", weights, rows, "the shape of the loss")
    scale = options.temperature(name, temperature, shape, axes)
    return Arguments(logits, labels, where, scale, weights, axes, ignored)


# An array with a number in the rows that are ignored: a cotangent of 0 does not silence a NaN.
Silenced = Callable[[Array, int], Array]


def reduced_losses(
    losses: Callable[[Silenced, Array, Array], Array],
    x: Array,
    labels: Array,
    where: Array | None,
    weights: Array | None,
    axis: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
) -> Array:
    """The losses of all examples, or their sum or mean.

    Args:
        losses: those of the rows, given what silences ignored rows, whether the label of a row
            exists, and the place of its class, or the target probabilities.
        x: the logits.
        labels: class ids or target probabilities.
        where: mask of the classes.
        weights: of the examples.
        axis: the axis of the classes.
        ignore_index: the class id to ignore.
        reduction: of the losses.
    """
    dtype, at = compute_dtype(x.dtype), axis.position
    rows = x.shape[:at] + x.shape[at + 1 :]
    valid, ignored, place, finite = jnp.ones(rows, bool), None, None, None
    if validation.is_discrete(labels):
        valid, ignored = token_loss.labelled(labels, axis.count(x), ignore_index, axis.mesh)
        place = axis.places(jnp.where(valid, labels, 0), x)
    elif where is not None:
        labels = jnp.where(where, labels, 0)  # a masked class has no target
    if weights is not None:
        weights = weights.astype(dtype)
        usable = x < jnp.inf if where is None else (x < jnp.inf) | ~where
        usable = usable & jnp.isfinite(labels) if place is None else usable
        finite = axis.sum((~usable).astype(jnp.float32)) == 0
    factors = jnp.ones(rows, dtype) if weights is None else weights
    factors, valid, ignored = token_loss.examples(factors, valid, ignored, finite)

    def silenced(a: Array, value: int) -> Array:
        return a if ignored is None else jnp.where(axis.expand(ignored), value, a)

    label = silenced(labels.astype(dtype), 0) if place is None else place
    out = losses(silenced, valid, label)
    out = out if ignored is None else jnp.where(ignored, 0, out)
    out = out if weights is None else token_loss.weighted(factors, out)
    return token_loss.reduced(out, factors, reduction)


def reduced_nothing(
    logits: Array, rows: tuple[int, ...], *, reduction: Reduction, **_: Any
) -> Array:
    """The losses of examples without a class, which are NaN, or of no example."""
    dtype = compute_dtype(logits.dtype)
    lost = jnp.full(rows, jnp.nan if known(lambda: math.prod(rows) > 0, True) else 0, dtype)
    return token_loss.reduced(lost, jnp.ones(rows, dtype), reduction)
