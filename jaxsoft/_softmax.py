"""softmax, its rule, and the products with its Jacobian."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Shaped

from jaxsoft import _axes, _checks, _logits, _mesh, _rows, _sharding
from jaxsoft._autodiff import jvp_from_vjp, linear_pair, with_transpose
from jaxsoft._axes import ClassAxis
from jaxsoft._mesh import Mesh

_FEW = 16  # classes


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
        where: boolean mask, broadcastable to `x`; classes where it is False have probability 0,
            and whatever `x` holds there, NaN included, has no influence.
        temperature: T > 0, a number or one value per row (broadcastable to `x` with the reduced
            axes of size 1). Differentiable.
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
    return _softmax(*args, **along) if args[0].size else args[0]


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
# common offset out of v before it can round, and mends a Σp that is not quite 1. This is
# P = 1 - 1 wᵀ with w = one-hot(k) or p, put together by arithmetic rather than by selection, so
# that XLA makes one kernel of it all on the CPU. Signs are taken on the weights: a sum that is
# negated falls out of the kernel.
#
# The forward rule is the transpose of all this, and has to begin with P as well: J = Pᵀ J P, so the
# product would end with Pᵀ. But Pᵀ y = y - w Σy, and the entries of J v sum to 0: there Pᵀ is the
# identity but for rounding. So the end is stated to be the identity with P as its transpose, and
# the identity to be the transpose of P. What JAX transposes is then the same program again.
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
        free: whether p, without a sink, is differentiated as a free argument. With s = Σp any p is
            s times probabilities q, and the product is s² J_q v + (1 - s) p ∘ v. For probabilities
            s is 1 while its derivative is not. With p from logits that is 0 too, for Σ dp = 0.
    """
    if free:
        p = p.astype(_logits.compute_dtype(p.dtype))
        s = 1 - axis.expand(defect(p, axis))
        of_probabilities, _ = jacobian_product(p / s, v, axis, spread)
        return s * s * of_probabilities + (1 - s) * p * v, None
    if p_sink is None and are_few(p, axis):
        return _product_of_pairs(p, v, axis), None
    product = functools.partial(_jacobian_product, axis=axis)
    last = axis == ClassAxis(p.ndim - 1)  # on one device
    if p_sink is not None or not last or p.shape[-1] > _rows.ONE_KERNEL:
        return product(p, v, spread, p_sink, v_sink, sum_of=_sum)

    def with_sum(sum_of: _Sum) -> Callable[[Array, Array, Array], Array]:
        return lambda p, v, spread: product(p, v, spread, None, None, sum_of=sum_of)[0]

    by_cuda, by_default = with_sum(_sum_for_each), with_sum(_sum)
    return lax.platform_dependent(p, v, spread, cuda=by_cuda, default=by_default), None


# Of few classes, p_i Σ_j p_j (v_i - v_j) as it stands. The terms of i and j are antisymmetric, and
# the transpose of all differences would give each twice.
def _product_of_pairs(p: Array, v: Array, axis: ClassAxis) -> Array:
    dtype = _logits.compute_dtype(p.dtype)
    p, v = p.astype(dtype), v.astype(dtype)

    def term(j: int) -> Array:
        begin, end = linear_pair(lambda v: v - _column(v, j, axis), times=2)
        return end(p * (_column(p, j, axis) * begin(v)))

    return functools.reduce(jnp.add, map(term, range(p.shape[axis.position])))


def are_few(p: Array, axis: ClassAxis) -> bool:
    """Whether all classes of a row take part in each entry.

    That is n times as much arithmetic as with a sum, but in one kernel; XLA's kernels for sums are
    made for long rows.
    """
    return axis.mesh is None and p.shape[axis.position] <= _FEW


def sum_of_few(terms: Array, axis: ClassAxis) -> Array:
    """The sum over few classes, repeated for each of them, which is its own transpose."""

    def repeated(terms: Array) -> Array:
        columns = [_column(terms, j, axis) for j in range(terms.shape[axis.position])]
        return jnp.broadcast_to(functools.reduce(jnp.add, columns), terms.shape)

    return with_transpose(repeated, repeated)(terms)


def _column(v: Array, j: int, axis: ClassAxis) -> Array:
    return lax.slice_in_dim(v, j, j + 1, axis=axis.position)


# A sum over the classes is an array without their axis. On a GPU it is repeated for each of them:
# of rows that fit into one XLA makes a single kernel with any number of sums, three passes over
# memory in all, but only where every sum meets the very array that is summed.
_Sum = Callable[[Array, ClassAxis], Array]


def _sum(terms: Array, axis: ClassAxis) -> Array:
    return axis.sum(terms)


def _sum_for_each(terms: Array, axis: ClassAxis) -> Array:
    return 0 * terms + jnp.sum(terms, axis.position, keepdims=True)


def _jacobian_product(
    p: Array,
    v: Array,
    spread: Array,
    p_sink: Array | None,
    v_sink: Array | None,
    *,
    axis: ClassAxis,
    sum_of: _Sum,
) -> tuple[Array, Array | None]:
    dtype = _logits.compute_dtype(p.dtype)

    def across(of_row: Array) -> Array:
        of_row = of_row.astype(dtype)
        return of_row if of_row.ndim == p.ndim else axis.expand(of_row)

    def over_all(terms: Iterable[Array]) -> Array:
        of_classes, *of_sink = terms
        sums = sum_of(of_classes, axis), *(term.squeeze(axis.position) for term in of_sink)
        return functools.reduce(jnp.add, sums)

    def centred(vs: list[Array]) -> list[Array]:
        minus_centre = across(over_all(map(jnp.multiply, minus_weights, vs)))
        return [v + minus_centre for v in vs]

    def balanced(ys: list[Array]) -> list[Array]:
        excess = across(over_all(ys))
        return [y + weight * excess for y, weight in zip(ys, minus_weights, strict=True)]

    # The classes, and the sink as one more.
    ps, vs = [p.astype(dtype)], [v.astype(dtype)]
    if p_sink is not None and v_sink is not None:
        ps, vs = [*ps, across(p_sink)], [*vs, across(v_sink)]
    minus_weights = [_minus_anchor(p, across(spread)) for p in ps]
    begin, end = centred, balanced  # with a sink the end is what it would be anyway
    if len(ps) == 1:
        alone = lambda fun: lambda arrays: [fun(*arrays)]
        begin, end = map(alone, linear_pair(lambda v: centred([v])[0]))
    us = begin(vs)
    minus_mean = across(over_all(-p * u for p, u in zip(ps, us, strict=True)))
    product, *rest = end([p * (u + minus_mean) for p, u in zip(ps, us, strict=True)])
    return product, _mesh.shares(rest[0].squeeze(axis.position), p, axis.mesh) if rest else None


def _minus_anchor(p: Array, spread: Array) -> Array:
    """-w: -1 for a class above 1/2, and -p in a row without one (where spread is 1)."""
    return jnp.minimum(minus_top(p), lax.stop_gradient(-p * spread))


def minus_top(p: Array) -> Array:
    """-1 for a class above 1/2, else 0."""
    return lax.stop_gradient(jnp.floor(0.5 - p))


def undominated(largest: Array) -> Array:
    """1 in a row whose largest probability is at most 1/2, else 0."""
    return 1 - jnp.ceil(largest.astype(_logits.compute_dtype(largest.dtype)) - 0.5)


# 1 - Σp, taken to be 0, with the derivative that it has.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def defect(p: Array, axis: ClassAxis) -> Array:
    return jnp.zeros_like(axis.sum(p))


@defect.defjvp
def _defect_jvp(
    axis: ClassAxis, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return defect(*primals, axis), -axis.sum(*tangents)
