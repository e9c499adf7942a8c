"""softmax and its rule."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Shaped

from jaxsoft._core import devices, options, programs, validation
from jaxsoft._core.autodiff import jvp_from_vjp
from jaxsoft._core.axes import ClassAxis
from jaxsoft._rows import statistics
from jaxsoft._rows.jacobian_product import Probabilities, Vector, jacobian_product
from jaxsoft._rows.logits import keep_inputs, prepare
from jaxsoft._rows.rowwise import as_given, rowwise
from jaxsoft._rows.statistics import Normalizer


def softmax(
    x: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
    axis_name: validation.AxisName = None,
) -> Float[Array, "..."]:
    r"""Softmax, a drop-in for `jax.nn.softmax` whose derivative is exact to the last bits.

        p_i = exp(x_i / T) / (Σ_j exp(x_j / T) + exp(s))
        ∂p_i/∂x_i = p_i (1 - p_i) / T          ∂p_i/∂x_j = -p_i p_j / T

    Differentiable in every mode and to any order. Reverse mode keeps p and nothing else of its
    size; with a temperature, the logits too.

    Args:
        x: logits, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the classes, a tuple of axes, or None for all of them.
        where: boolean mask, broadcast with `x`; classes where it is False have probability 0, and
            whatever `x` holds there, NaN included, has no influence.
        temperature: T > 0, a number or one value per row (broadcastable to `x` with the reduced
            axes of size 1), from the smallest normal number on. Differentiable.
        sink: s, an extra logit that takes mass but is not returned, shaped like the temperature,
            which does not divide it. `sink=0` is softmax-off-by-one. Differentiable.
        axis_name: a mesh axis, or a tuple of them, over which the axis of the classes goes on:
            within `jax.shard_map` (or `jax.vmap`) each device has its part of the classes, in
            order, and gets the probabilities of these. Options of a row are alike on all devices.
            Not needed where `jax.jit` divides arrays along automatic or explicit axes of a mesh.

    Returns:
        Probabilities, with the shape and dtype of `x`.

    Raises:
        TypeError: `x` is complex or not an array, `where` is not boolean, `axis` is no integer.
        ValueError: `axis` is out of range, an option does not broadcast, a temperature given as
            a number is not positive (given as an array, its rows are NaN), there is no axis of
            the name, an option of a row is not alike on its devices.

    Numerics:
        A row that is masked or -inf throughout is 0, with derivative 0. A row with NaN or +inf is
        NaN; other rows are untouched. 16-bit types are computed in float32 and rounded once.
        Every entry is within 6 + gap/2 eps, the gap being the distance to the maximum.

        A class of probability 0 ignores its cotangent, NaN included. (A CPU would lose a fifth of
        its speed by that: there, in arrays of more than 65,536 entries, only classes masked by
        `where` do.) An entry so far below the maximum that its derivative by T overflows is a
        constant.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsoft
        >>> x = jnp.array([20.0, 0.0, 0.0])
        >>> print(*(f"{d:.4g}" for d in jax.grad(lambda x: jaxsoft.softmax(x)[0])(x)))
        4.122e-09 -2.061e-09 -2.061e-09
        >>> print(*(f"{d:.4g}" for d in jax.grad(lambda x: jax.nn.softmax(x)[0])(x)))
        0 -2.061e-09 -2.061e-09

    Source: Blanchard, Higham & Higham 2021, "Accurately computing the log-sum-exp and softmax
    functions".
    """
    args, along = options.of_softmax("softmax", x, axis, where, temperature, sink, axis_name)
    return _softmax(*args, **along)


@rowwise(places=programs.as_given, empty=as_given)
def _softmax(
    x: Array, where: Array | None, temperature: Array | None, sink: Array | None, axis: ClassAxis
) -> Array:
    return of_rows(x, where, temperature, sink, axis, x.dtype).classes


def of_rows(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    sink: Array | None,
    axis: ClassAxis,
    dtype: DTypeLike,
) -> Probabilities:
    """The probabilities along one axis, and that of the sink."""
    logits = keep_inputs(lambda: prepare(x, axis, where, temperature, sink))
    normalizer = statistics.normalizer(logits, axis)
    sink = devices.copied(logits.sink, logits.z, axis.mesh)
    p = probabilities(logits.z, sink, normalizer, axis, dtype)
    if where is not None:  # 0 already, but now whatever the cotangent is there
        p = p._replace(classes=keep_inputs(lambda: jnp.where(where, p.classes, 0)))
    return p if p.sink is None else p._replace(sink=devices.joined(p.sink, axis.mesh))


# p = exp(z - m) / Z, and z̄ = J p̄: J is symmetric. Given statistics of the very logits z, which are
# constants, this is the total derivative. The sink is one more class whose logit is an argument of
# its own. Any rule that needs p in its backward pass calls this with the statistics it has kept,
# and so is analytic at every order.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _probabilities(
    z: Array, sink: Array | None, normalizer: Normalizer, axis: ClassAxis, dtype: DTypeLike
) -> Probabilities:
    return statistics.probabilities(z, sink, normalizer, axis, dtype)


probabilities = jvp_from_vjp(_probabilities)


def _probabilities_fwd(
    z: Array, sink: Array | None, normalizer: Normalizer, axis: ClassAxis, dtype: DTypeLike
) -> tuple[Probabilities, Probabilities]:
    p = probabilities(z, sink, normalizer, axis, dtype)
    # The derivative of the sink is total only where the copies of it are joined.
    kept = None if p.sink is None else devices.joined(p.sink, axis.mesh)
    return p, p._replace(sink=kept)


def _probabilities_bwd(
    axis: ClassAxis, dtype: DTypeLike, p: Probabilities, cotangent: Probabilities
) -> Any:
    z_bar, sink_bar = jacobian_product(p, Vector(cotangent.classes, cotangent.sink), axis)
    return z_bar, sink_bar, None


_probabilities.defvjp(_probabilities_fwd, _probabilities_bwd)
