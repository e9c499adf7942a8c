"""softmax, its rule, and the products with its Jacobian."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Shaped

from jaxsoft import _axes, _checks, _logits, _mesh, _rows, _sharding
from jaxsoft._autodiff import jvp_from_vjp, linear_pair, self_adjoint
from jaxsoft._axes import ClassAxis
from jaxsoft._mesh import Mesh
from jaxsoft._pairs import are_few, is_small, lead_over_others
from jaxsoft._sizes import is_empty, known

_FEW_ON_CPU = 16  # classes of float32: pairs take 0.6 of the time of sums, in bfloat16 1.4


def softmax(
    x: Shaped[ArrayLike, "..."],
    axis: _checks.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
    sink: Shaped[ArrayLike, "..."] | None = None,
    axis_name: _checks.AxisName = None,
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
    args, along = _checks.rows("softmax", x, axis, where, temperature, sink, axis_name)
    return args[0] if is_empty(args[0]) else _softmax(*args, **along)


@_sharding.program(static=("axes", "mesh"), places=_sharding.as_given)
def _softmax(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    sink: Array | None,
    *,
    axes: tuple[int, ...],
    mesh: Mesh | None,
) -> Array:
    shape, axis = x.shape, ClassAxis(_axes.merged_axis(x.ndim, axes), mesh)
    args = _mesh.aligned(x, where, temperature, sink, mesh=mesh)
    x, *options = (_axes.merge_axes(arg, axes) for arg in args)
    p, _ = of_rows(x, axis, *options, dtype=x.dtype)
    return _axes.unmerge_axes(p, axes, shape)


def of_rows(
    x: Array,
    axis: ClassAxis,
    where: Array | None,
    temperature: Array | None,
    sink: Array | None,
    *,
    dtype: DTypeLike,
) -> tuple[Array, Array | None]:
    """The probabilities along one axis, and that of the sink, which is without the axis."""
    logits = _logits.keep_inputs(lambda: _logits.prepare(x, axis, where, temperature, sink))
    top, total = _rows.top_and_normalizer(logits, axis)
    sink = _mesh.copied(logits.sink, logits.z, axis.mesh)
    p, p_sink = probabilities(logits.z, sink, top, total, axis, dtype)
    if where is not None:  # 0 already, but now whatever the cotangent is there
        p = _logits.keep_inputs(lambda: jnp.where(where, p, 0))
    return p, None if p_sink is None else _mesh.joined(p_sink, axis.mesh)


# The rule of softmax, p = exp(z - m) / Z. Given statistics m and Z of the very logits z, the
# derivative is the total one, with respect to z alone: z̄ = J p̄ (J is symmetric), and the sink is
# one more class whose logit is an argument of its own. Whatever needs p again in a backward pass
# calls this with the statistics it has kept, and stays analytic at every order.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _probabilities(
    z: Array, sink: Array | None, top: Array, total: Array, axis: ClassAxis, dtype: DTypeLike
) -> tuple[Array, Array | None]:
    p = _rows.probabilities(z, top, total, axis).astype(dtype)
    if sink is None:
        return p, None
    return p, _rows.sink_probability(sink, top, total).astype(dtype)


probabilities = jvp_from_vjp(_probabilities)


def _probabilities_fwd(
    z: Array, sink: Array | None, top: Array, total: Array, axis: ClassAxis, dtype: DTypeLike
) -> tuple[Any, Any]:
    p, p_sink = probabilities(z, sink, top, total, axis, dtype)
    # The largest probability is 1 / Z, rounded just as p itself is.
    spread = undominated((1 / _rows.at_least_one(total)).astype(dtype))
    # Its derivative is total only where the copies of it are joined.
    kept = None if p_sink is None else _mesh.joined(p_sink, axis.mesh)
    return (p, p_sink), (p, kept, spread)


def _probabilities_bwd(axis: ClassAxis, dtype: DTypeLike, residuals: Any, cotangents: Any) -> Any:
    p, p_sink, spread = residuals
    z_bar, sink_bar = jacobian_product(p, cotangents[0], axis, spread, p_sink, cotangents[1])
    return z_bar, sink_bar, None, None


_probabilities.defvjp(_probabilities_fwd, _probabilities_bwd)


# J v = p ∘ (v - ⟨p, v⟩). J is blind to a constant, so one is subtracted first: u = v - c. With
# c = v_k where one p_k exceeds 1/2, the entry of that class is the sum of the others,
# -p_k Σ_{j≠k} p_j u_j, and nothing is subtracted from 1; elsewhere c = ⟨p, v⟩, which also takes a
# common offset out of v before it can round, and mends a Σp that is not quite 1.
#
# This is J P with P = 1 - 1 wᵀ, and its transpose Pᵀ J begins with the uncentred product. But J is
# symmetric, and J = Pᵀ J P: the entries of J v sum to 0, where Pᵀ y = y - w Σy is the identity but
# for rounding. So we declare (P, 1) and (1, P) to be transposes, and the transpose of the program
# is the program. By p it is differentiated with c as it is. A class of probability 0 has no part
# in it, whatever v holds there, NaN included.
def jacobian_product(
    p: Array,
    v: Array,
    axis: ClassAxis,
    spread: Array,
    p_sink: Array | None = None,
    v_sink: Array | None = None,
    *,
    free: bool = False,
) -> tuple[Array, Array | None]:
    """J v for probabilities p along the axis, and its entry for the sink.

    Args:
        p: probabilities that sum to 1 together with `p_sink`.
        v: a tangent or a cotangent.
        axis: the axis of the classes. Of classes on several devices the entry for the sink is
            an equal share of it.
        spread: for each row `undominated` of its largest probability.
        p_sink: the probability of the sink, if there is one.
        v_sink: the entry of v for the sink.
        free: whether p, without a sink, is differentiated also in directions that change its sum.
    """
    dtype = _logits.compute_dtype(p.dtype)
    if p_sink is not None and v_sink is not None:
        return _product_with_sink(p, v, axis, spread, p_sink, v_sink)

    # Of several devices: what a linear function closes over is to differ as its argument does.
    wide, spread = p.astype(dtype), axis.expand(_mesh.copied(spread, p, axis.mesh))
    minus_weights = _minus_anchor(wide, spread)

    # Signs are taken on the weights: a sum that is negated falls out of XLA's loop on a CPU.
    def centred(v: Array) -> Array:
        return v + _sum(minus_weights * v, axis)

    def by_sums(
        v: Array, begin: Callable[[Array], Array] = centred, end: Callable[[Array], Array] = _same
    ) -> Array:
        v = _ignoring_absent(p, v)
        u = begin(v)
        minus_mean = _sum(-wide * u, axis)
        if free:
            total = _sum(wide, axis)
            minus_mean += (total - lax.stop_gradient(total)) * _sum(minus_weights * v, axis)
        return _ignoring_absent(p, end(wide * (u + minus_mean)))

    def by_pairs(v: Array) -> Array:
        constant = lax.stop_gradient(wide)
        return constant * lead_over_others(constant, _ignoring_absent(constant, v), axis)

    v = v.astype(dtype)
    if not is_small(p):
        if are_few(p, axis):
            return self_adjoint(by_sums, by_pairs)(v), None
        if are_few(p, axis, limit=_FEW_ON_CPU) and p.dtype.itemsize >= 4:
            forms = functools.partial(lax.platform_dependent, cpu=by_pairs, default=by_sums)
            return self_adjoint(by_sums, forms)(v), None
    if free:  # J 1 = 0, and with it the pair, holds for a sum of 1 alone
        return by_sums(v), None
    return by_sums(v, *linear_pair(centred)), None


def _same(v: Array) -> Array:
    return v


def _product_with_sink(
    p: Array, v: Array, axis: ClassAxis, spread: Array, p_sink: Array, v_sink: Array
) -> tuple[Array, Array]:
    """J v among the classes and the sink, which is one more class."""
    dtype = _logits.compute_dtype(p.dtype)

    def across(of_row: Array) -> Array:
        return axis.expand(of_row.astype(dtype))

    def over_all(of_classes: Array, of_sink: Array) -> Array:
        return axis.expand(axis.sum(of_classes)) + of_sink

    ps = [p.astype(dtype), across(p_sink)]
    minus_weights = [_minus_anchor(p, across(spread)) for p in ps]
    vs = list(map(of_present, ps, [v.astype(dtype), across(v_sink)]))
    minus_centre = over_all(*map(jnp.multiply, minus_weights, vs))
    us = [v + minus_centre for v in vs]
    mean = over_all(*map(jnp.multiply, ps, us))
    ys = [p * (u - mean) for p, u in zip(ps, us, strict=True)]
    # The entries sum to 0 but for rounding. This makes the transpose the same program again.
    excess = over_all(*ys)
    product, of_sink = (
        of_present(p, y + w * excess) for p, y, w in zip(ps, ys, minus_weights, strict=True)
    )
    return product, _mesh.shares(of_sink.squeeze(axis.position), p, axis.mesh)


def of_present(p: Array, v: Array) -> Array:
    """v, and 0 for a class of probability 0."""
    return jnp.where(p == 0, 0, v)


# On a CPU XLA does not fuse the selection into sums: 1.1 to 2.7 times the time of large arrays.
def _ignoring_absent(p: Array, v: Array) -> Array:
    """v, and 0 for a class of probability 0 where that takes no time that counts."""
    if is_small(p):
        return of_present(p, v)
    return lax.platform_dependent(p, v, cpu=lambda p, v: v, default=of_present)


def _sum(terms: Array, axis: ClassAxis) -> Array:
    """The sum over the classes, for each of them."""
    plain = functools.partial(_sum_for_each, axis=axis)
    last = axis == ClassAxis(terms.ndim - 1)  # on one device
    if not last or not known(lambda: terms.shape[-1] <= _rows.ONE_KERNEL, False):
        return plain(terms)
    in_one_kernel = functools.partial(_sum_in_one_kernel, axis=axis)
    return lax.platform_dependent(terms, cuda=in_one_kernel, default=plain)


def _sum_for_each(terms: Array, axis: ClassAxis) -> Array:
    return jnp.broadcast_to(axis.expand(axis.sum(terms)), terms.shape)


# On a GPU XLA makes a single kernel of a row that fits into one, three passes over memory in all,
# but only where every sum meets the very array that is summed.
def _sum_in_one_kernel(terms: Array, axis: ClassAxis) -> Array:
    return 0 * terms + _sum_for_each(terms, axis)


def _minus_anchor(p: Array, spread: Array) -> Array:
    """-w: -1 for a class above 1/2, and -p in a row without one (where spread is 1)."""
    return jnp.minimum(minus_top(p), lax.stop_gradient(-p * spread))


def minus_top(p: Array) -> Array:
    """-1 for a class above 1/2, else 0."""
    return lax.stop_gradient(jnp.floor(0.5 - p))


def undominated(largest: Array) -> Array:
    """1 in a row whose largest probability is at most 1/2, else 0."""
    return 1 - jnp.ceil(largest.astype(_logits.compute_dtype(largest.dtype)) - 0.5)
