"""softmax, log_softmax and logsumexp of segments: rows of any length, one after the other.

The entries of a segment are those with its number. All formulas are those of rows, given what it
means to sum over a segment and to give each entry what its segment has.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import class_ids, options, programs, validation
from jaxsoft._core.autodiff import analytic, jvp_from_vjp
from jaxsoft._core.sizes import is_empty, known
from jaxsoft._rows import statistics
from jaxsoft._rows.jacobian_product import Probabilities, Vector, portable, portable_log_pullback
from jaxsoft._rows.logits import keep_inputs, rounded
from jaxsoft._rows.ragged import Segments, prepared
from jaxsoft._rows.statistics import Normalizer, Row


def segment_softmax(
    x: Shaped[ArrayLike, "..."],
    segment_ids: Shaped[ArrayLike, "..."],
    num_segments: SupportsIndex | None = None,
    *,
    indices_are_sorted: bool = False,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
) -> Float[Array, "..."]:
    r"""Softmax of each segment of the first axis, as attention on graphs and ragged batches need.

        p_i = exp(x_i / T) / Σ_{j: id_j = id_i} exp(x_j / T)

    Differentiable in every mode and to any order; reverse mode keeps p, and with a temperature the
    logits. A segment with one entry far ahead keeps its digits, as in `softmax`.

    Args:
        x: logits, shape [N, ...]; trailing axes are a batch.
        segment_ids: integers of shape [N], the number of the segment of each entry, in any order.
            An entry whose number is outside [0, num_segments), -1 as padding included, belongs to
            no segment.
        num_segments: how many segments there are. Default: one more than the largest number, for
            which the numbers must be known: not under `jax.jit`.
        indices_are_sorted: whether `segment_ids` ascend; may be faster then.
        temperature: T > 0, a number or one for each segment, broadcastable to [num_segments, ...].

    Returns:
        Probabilities, with the shape and dtype of `x`; 0 for an entry of no segment.

    Raises:
        TypeError: `x` is complex or not an array, `segment_ids` are not integers.
        ValueError: `segment_ids` or `temperature` has the wrong shape, `num_segments` is negative,
            or is not given where the numbers are not known.

    Numerics:
        As in `softmax`. A segment of -inf alone is 0 with derivative 0; NaN or +inf in it makes a
        segment NaN, and no other. What belongs to no segment has no influence, NaN included.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> p = jaxsoft.segment_softmax(jnp.array([0.0, 0.0, 3.0, 1.0]), jnp.array([0, 0, 2, -1]))
        >>> print(p)
        [0.5 0.5 1.  0. ]

    Source: Veličković et al. 2018, arXiv 1710.10903, for attention on graphs.
    """
    arrays, static = _arguments(
        "segment_softmax", x, segment_ids, num_segments, indices_are_sorted, temperature
    )
    return _segment_softmax(*arrays, **static)


def segment_log_softmax(
    x: Shaped[ArrayLike, "..."],
    segment_ids: Shaped[ArrayLike, "..."],
    num_segments: SupportsIndex | None = None,
    *,
    indices_are_sorted: bool = False,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
) -> Float[Array, "..."]:
    r"""The logarithm of `segment_softmax`, which keeps its digits near 0 and far from it.

        log p_i = x_i / T - log Σ_{j: id_j = id_i} exp(x_j / T)

    Args:
        x: logits, shape [N, ...].
        segment_ids: integers of shape [N], as in `segment_softmax`.
        num_segments: how many segments there are, as in `segment_softmax`.
        indices_are_sorted: whether `segment_ids` ascend.
        temperature: T > 0, a number or one for each segment, broadcastable to [num_segments, ...].

    Returns:
        Logarithms, with the shape and dtype of `x`; -inf for an entry of no segment, one of -inf,
        and a segment of -inf alone.

    Raises:
        TypeError, ValueError: as `segment_softmax`.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> log_p = jaxsoft.segment_log_softmax(jnp.array([20.0, 0.0, 3.0]), jnp.array([0, 0, 1]))
        >>> print(*(f"{entry:.4g}" for entry in log_p))
        -2.061e-09 -20 0
    """
    arrays, static = _arguments(
        "segment_log_softmax", x, segment_ids, num_segments, indices_are_sorted, temperature
    )
    return _segment_log_softmax(*arrays, **static)


def segment_logsumexp(
    x: Shaped[ArrayLike, "..."],
    segment_ids: Shaped[ArrayLike, "..."],
    num_segments: SupportsIndex | None = None,
    *,
    indices_are_sorted: bool = False,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
) -> Float[Array, "..."]:
    r"""The logarithm of the sum of exponentials of each segment.

        out_s = log Σ_{j: id_j = s} exp(x_j / T)          ∂out_s/∂x_j = p_j / T

    Args:
        x: exponents, shape [N, ...].
        segment_ids: integers of shape [N], as in `segment_softmax`.
        num_segments: how many segments there are, as in `segment_softmax`.
        indices_are_sorted: whether `segment_ids` ascend.
        temperature: T > 0, a number or one for each segment, broadcastable to [num_segments, ...].

    Returns:
        Logarithms, shape [num_segments, ...], of the dtype of `x`; -inf with derivative 0 for a
        segment without an entry or of -inf alone, +inf for one with +inf.

    Raises:
        TypeError, ValueError: as `segment_softmax`.

    Example:
        >>> import jax.numpy as jnp, jaxsoft
        >>> out = jaxsoft.segment_logsumexp(jnp.array([0.0, -20.0, 3.0]), jnp.array([0, 0, 2]))
        >>> print(*(f"{entry:.4g}" for entry in out))
        2.061e-09 -inf 3
    """
    arrays, static = _arguments(
        "segment_logsumexp", x, segment_ids, num_segments, indices_are_sorted, temperature
    )
    return _segment_logsumexp(*arrays, **static)


def _arguments(
    function: str, x: Any, segment_ids: Any, num_segments: Any, is_sorted: Any, temperature: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as arrays, and the static ones by name."""
    x = validation.floating(function, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{function}: x must have an axis of entries, got shape ()")
    ids, count = class_ids.segments(
        function, segment_ids, num_segments, x.shape[0], "one for each entry of the first axis of x"
    )
    of_segments = (count, *x.shape[1:])
    scale = options.temperature(function, temperature, of_segments, ())
    is_sorted = validation.flag(function, "indices_are_sorted", is_sorted)
    return (x, ids, scale), {"count": count, "is_sorted": is_sorted}


def _nothing(x: Array, count: int) -> bool:
    return is_empty(x) or known(lambda: count == 0, False)


# ------------------------------------------------------------------------------------- softmax


@programs.program(static=("count", "is_sorted"), places=programs.as_given)
def _segment_softmax(
    x: Array, ids: Array, temperature: Array | None, *, count: int, is_sorted: bool
) -> Array:
    if _nothing(x, count):
        return jnp.zeros_like(x)
    logits, segments = keep_inputs(lambda: prepared(x, ids, temperature, count, is_sorted)[:2])
    normalizer = statistics.plain_sum(lax.stop_gradient(logits), axis=segments)
    return _probabilities(logits.z, normalizer, segments).classes.astype(x.dtype)


# As `softmax.probabilities`: p from constants, and z̄ = J p̄ from p. Forward mode is the transpose
# of this program, Pᵀ J with P = 1 - 1 wᵀ: as exact where one entry is far ahead, but a common
# offset of the tangents rounds. A third sum would mend that, and take a fifth longer.
@jax.custom_vjp
def _probabilities_rule(z: Array, normalizer: Normalizer, segments: Segments) -> Probabilities:
    p = statistics.probabilities(z, None, normalizer, segments, z.dtype)
    return p._replace(classes=jnp.where(segments.outside(z), 0, p.classes))


_probabilities = jvp_from_vjp(_probabilities_rule)


def _probabilities_fwd(
    z: Array, normalizer: Normalizer, segments: Segments
) -> tuple[Probabilities, tuple[Probabilities, Segments]]:
    p = _probabilities(z, normalizer, segments)
    return p, (p, segments)


def _probabilities_bwd(residuals: Any, cotangent: Probabilities) -> Any:
    p, segments = residuals
    product = portable(p, Vector(cotangent.classes, None), axis=segments)
    return product.classes, None, None


_probabilities_rule.defvjp(_probabilities_fwd, _probabilities_bwd)


# -------------------------------------------------------------------------------- log_softmax


@programs.program(static=("count", "is_sorted"), places=programs.as_given)
def _segment_log_softmax(
    x: Array, ids: Array, temperature: Array | None, *, count: int, is_sorted: bool
) -> Array:
    if _nothing(x, count):
        return jnp.full_like(x, -jnp.inf)
    logits, segments, _ = prepared(x, ids, temperature, count, is_sorted)
    row = statistics.portable(lax.stop_gradient(logits), axis=segments)
    return rounded(_log_probabilities(logits.z, row, segments), x.dtype)


def _log_probabilities_formula(z: Array, row: Row, segments: Segments) -> Array:
    log_p = (z - segments.expand(row.top)) - segments.expand(row.log_normalizer)
    return jnp.where(segments.outside(z), -jnp.inf, log_p)


def _log_probabilities_pullback(z: Array, row: Row, segments: Segments, cotangent: Array) -> Any:
    p = _probabilities(z, row.normalizer, segments)
    y_bar = jnp.where((z == -jnp.inf) | segments.outside(z), 0, cotangent)
    return portable_log_pullback(p, Vector(y_bar, None), axis=segments).classes, None, None


_log_probabilities = analytic(_log_probabilities_formula, _log_probabilities_pullback)


# ---------------------------------------------------------------------------------- logsumexp


def _of_segments(ndim: int, **_: Any) -> programs.Places:
    return (None, *range(1, ndim))


@programs.program(static=("count", "is_sorted"), places=_of_segments)
def _segment_logsumexp(
    x: Array, ids: Array, temperature: Array | None, *, count: int, is_sorted: bool
) -> Array:
    if _nothing(x, count):
        return jnp.full((count, *x.shape[1:]), -jnp.inf, x.dtype)
    logits, segments, shift = prepared(x, ids, temperature, count, is_sorted)
    row = statistics.portable(lax.stop_gradient(logits), axis=segments)
    out = shift + _log_normalizer(logits.z, row, segments)
    out = jnp.where(row.rest == -1, -jnp.inf, out)
    return rounded(jnp.where(shift == jnp.inf, jnp.inf, out)[1:-1], x.dtype)


def _log_normalizer_formula(z: Array, row: Row, segments: Segments) -> Array:
    return row.log_normalizer


def _log_normalizer_pullback(z: Array, row: Row, segments: Segments, cotangent: Array) -> Any:
    p = _probabilities(z, row.normalizer, segments)
    return segments.expand(cotangent) * p.classes, None, None


_log_normalizer = analytic(_log_normalizer_formula, _log_normalizer_pullback)
