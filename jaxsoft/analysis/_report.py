"""jacobian_report: the Jacobian of every row in ten numbers."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from jaxsoft._core import options, validation
from jaxsoft._core.axes import ClassAxis, classes_last, one_hot, take
from jaxsoft._core.sizes import known
from jaxsoft._functions.entropy import entropy
from jaxsoft._rows.logits import compute_dtype, prepare
from jaxsoft._simplex.softmax_jacobian import softmax_and_jacobian


class JacobianReport(NamedTuple):
    r"""What `jacobian_report` says of each row of logits x, with p = softmax(x / T).

    J = (diag(p) - p pᵀ) / T is the Jacobian of p by x. All but the two classes are floating.

    Attributes:
        predicted: the most probable class, int32; of equals the first; -1 where there is none.
        runner_up: the second most probable, likewise.
        entropy: H = -Σ p log p, in nats.
        top_eigenvalue: ‖J‖₂, how far the probabilities move at most for a unit step of the logits.
        trace: tr J = (1 - Σ p²) / T.
        frobenius_norm: ‖J‖_F.
        effective_rank: (tr J / ‖J‖_F)², from 1 (two classes) to n - 1 (equal probabilities);
            0 where J = 0.
        temperature_sensitivity: ∂H/∂T = Var_p(x) / T³, in nats per unit of T.
        cross_influence: max_{i≠j} |J_ij| = p₁ p₂ / T, the largest influence of one class's logit
            on another class's probability. The classes are those predicted and the runner-up.
        certified_radius: (x₁ - x₂) / 2: no change of the logits by less than this, each, changes
            the predicted class, and changes by just this can make it tie. Infinite where there is
            no other class, 0 where there is no class at all.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft.analysis import jacobian_report
        >>> report = jacobian_report(jnp.array([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]]))
        >>> print(report.predicted, report.certified_radius, len(jax.tree.leaves(report)))
        [0 2] [0.5 2.5] 10
    """

    predicted: Int[Array, "*batch"]
    runner_up: Int[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    top_eigenvalue: Float[Array, "*batch"]
    trace: Float[Array, "*batch"]
    frobenius_norm: Float[Array, "*batch"]
    effective_rank: Float[Array, "*batch"]
    temperature_sensitivity: Float[Array, "*batch"]
    cross_influence: Float[Array, "*batch"]
    certified_radius: Float[Array, "*batch"]


# With `jax.export` a program that gives a report can be written to a file.
export.register_namedtuple_serialization(
    JacobianReport, serialized_name="jaxsoft.analysis.JacobianReport"
)


def jacobian_report(
    logits: Shaped[ArrayLike, "..."],
    axis: validation.Axis = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] = 1.0,
) -> JacobianReport:
    r"""The Jacobian of softmax at every row of logits, in ten numbers for each row.

        J = ∂softmax(x / T)/∂x = (diag(p) - p pᵀ) / T

    From n numbers per row, in O(n): J itself is never built. The floating numbers are
    differentiable in every mode.

    Args:
        logits: x, shape [..., n, ...]. Integers and booleans become the default float.
        axis: the axis of the classes, a tuple of axes, or None for all of them; with several,
            classes count through them in order.
        where: boolean mask of classes, broadcastable to `logits`; classes where it is False do not
            count.
        temperature: T > 0, a number or one value per row; as in `softmax`.

    Returns:
        A `JacobianReport` of arrays with the shape of `logits` without the axis, float32 or wider.

    Raises:
        TypeError: `logits` is complex or not an array, `where` is not boolean, `axis` is no
            integer.
        ValueError: `axis` is out of range, an option does not broadcast, a temperature given as
            a number is not positive (given as an array, its rows are NaN).

    Numerics:
        Nothing is subtracted from 1: a saturated row keeps its last bits. A row that is masked or
        -inf throughout is 0 in every number, and has the classes -1; so has its derivative. A row
        of one class is 0 but for an infinite radius. A row with NaN or +inf is NaN, its classes
        are -1, and other rows are untouched. Where classes tie, derivatives are those for the
        classes that are named (`cross_influence`, `certified_radius`); the top eigenvalue is
        differentiated as in `SimplexJacobian.norm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft.analysis import jacobian_report
        >>> report = jacobian_report(jnp.log(jnp.array([0.5, 0.25, 0.25])))
        >>> print(f"{report.top_eigenvalue:.4f} {report.trace:.4f} {report.cross_influence:.4f}")
        0.3750 0.6250 0.1250
        >>> flattest = jax.grad(lambda x: jacobian_report(x).top_eigenvalue)(jnp.zeros(2))
        >>> print(flattest)
        [0. 0.]
    """
    name = "jacobian_report"
    x = validation.floating(name, "logits", logits)
    axes = validation.axes(name, axis, x.ndim)
    where = validation.mask(name, where, x.shape)
    scale = options.temperature(name, temperature, x.shape, axes)
    return _report(x, where, scale, axes=axes)


@functools.partial(jax.jit, static_argnames="axes")
def _report(
    x: Array, where: Array | None, temperature: Array | None, *, axes: tuple[int, ...]
) -> JacobianReport:
    x = classes_last(x.astype(compute_dtype(x.dtype)), axes)
    where, temperature = (classes_last(a, axes) for a in (where, temperature))
    # The two largest logits need two places. A symbolic size (`jax.export`) is 1 or more.
    n = x.shape[-1]
    missing = known(lambda: n < 1, False) + known(lambda: n < 2, True)
    if missing:
        where = jnp.ones(x.shape, bool) if where is None else where
        x, where = (jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]) for a in (x, where))
    scale = 1.0 if temperature is None else temperature

    p, jacobian = softmax_and_jacobian(x, -1, where, temperature=scale)
    trace = jacobian.trace()
    x1, x2, first, second = _two_largest(x, where)
    one, two = x1 != -jnp.inf, x2 != -jnp.inf
    influence = take(jacobian.weights, first, -1) * take(p, second, -1)
    radius = jnp.where(two, x1 / 2 - jnp.where(two, x2, 0) / 2, jnp.inf)
    failed = jnp.isnan(trace)
    return JacobianReport(
        predicted=jnp.where(one & ~failed, first, -1),
        runner_up=jnp.where(two & ~failed, second, -1),
        entropy=entropy(x, -1, where, temperature=scale),
        top_eigenvalue=jacobian.norm(2),
        trace=trace,
        frobenius_norm=jacobian.norm("fro"),
        effective_rank=jacobian.effective_rank(),
        temperature_sensitivity=jacobian.quadratic_form(_gaps(x, where, temperature, p)),
        cross_influence=jnp.where(two, influence, 0),
        certified_radius=jnp.where(failed, jnp.nan, jnp.where(one, radius, 0)),
    )


# H = log Z - ⟨z⟩ with z = x / T, and ∂H/∂T = -⟨z, J_p ∂z/∂T⟩ = zᵀ J_p z / T = zᵀ J z. As J is blind
# to a constant, z is measured from its maximum; where p is 0, z has no weight, even if it is -inf.
def _gaps(x: Array, where: Array | None, temperature: Array | None, p: Array) -> Array:
    logits = prepare(x, ClassAxis(x.ndim - 1), where, temperature)
    absent = p == 0
    return jnp.where(absent, 0, jnp.where(absent, 0, logits.z) - logits.top[..., None])


def _two_largest(x: Array, where: Array | None) -> tuple[Array, Array, Array, Array]:
    """The two largest logits, -inf where there is none, and their places; of equals the first."""
    x = x if where is None else jnp.where(where, x, -jnp.inf)
    first = jnp.argmax(x, -1).astype(jnp.int32)
    others = jnp.where(one_hot(first, x.shape, x.ndim - 1), -jnp.inf, x)
    second = jnp.argmax(others, -1).astype(jnp.int32)
    return take(x, first, -1), take(others, second, -1), first, second
