"""One analytic rule for every differentiation mode."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, ArrayLike, PyTree

P = ParamSpec("P")
Out = TypeVar("Out")


# The derivation. Let f have the reverse rule  x̄ = Jᵀ ȳ, a linear map of ȳ. Its transpose is the
# forward rule ẏ = J ẋ, so `jax.linear_transpose` of the pullback is the pushforward: no second
# formula is needed, and none can disagree with the first. In reverse mode JAX transposes the
# pushforward once more and thereby runs the stated rule again.
#
# `jax.checkpoint` around the transposition makes the pushforward a function of the residuals of
# the stated rule and of the tangents alone. Without it, whatever the backward pass computes from
# the residuals would be computed ahead and kept, each intermediate the size of an input.
def jvp_from_vjp(
    fun: Callable[P, Out], *, nondiff_argnums: Sequence[int] | None = None
) -> Callable[P, Out]:
    """Makes a `jax.custom_vjp` function differentiable in every mode.

    A function with a `jax.custom_vjp` rule refuses `jax.jvp`, `jax.jacfwd`, `jax.hessian` and
    `jax.linearize`. The function returned here has the same values and the same rule, and takes
    its forward derivative from the transpose of that rule:

        y, pullback = vjp(fun, x)          x̄ = pullback(ȳ) = Jᵀ ȳ
        ẏ = linear_transpose(pullback)(ẋ) = J ẋ

    Derivatives are taken only for the arguments that are being differentiated. Nothing but the
    residuals of the stated rule is kept between the passes.

    Derivatives of order two are those of the rule, and as analytic as the first: where the rule
    calls `fun` itself, or another `jax.custom_vjp` function that was given to `jvp_from_vjp`, it
    gets the function with all modes. Elsewhere `fun` stays as it is. A rule that calls a
    `jax.custom_vjp` function that was not given has no forward mode of order two.

    Args:
        fun: a `jax.custom_vjp` function, whose rule may be defined later, or any other function
            that `jax.vjp` accepts. The backward rule must be linear in the cotangent and built
            from operations that JAX can transpose; a constant that it adds is lost. Arguments and
            results may be pytrees; integer and boolean leaves (labels, masks) are held fixed.
            Arguments may be given by keyword where `fun` has them by position too; for keyword
            options, wrap the result in a function.
        nondiff_argnums: positions of static arguments, as in `jax.custom_vjp`; taken from `fun`
            when it is a `jax.custom_vjp` function that has them.

    Returns:
        A function of the same arguments.

    Raises:
        TypeError: `fun` is not callable; or, where a derivative is taken, the backward rule cannot
            be transposed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import jvp_from_vjp
        >>> @jax.custom_vjp
        ... def f(x):
        ...     return jnp.sqrt(x)
        >>> def f_fwd(x):
        ...     root = f(x)
        ...     return root, root
        >>> def f_bwd(root, cotangent):
        ...     return (cotangent / (2 * root),)
        >>> f.defvjp(f_fwd, f_bwd)
        >>> square_root = jvp_from_vjp(f)
        >>> print(jax.jvp(square_root, (4.0,), (1.0,))[1], jax.hessian(square_root)(4.0))
        0.25 -0.03125
    """
    if not callable(fun):
        raise TypeError(f"jvp_from_vjp: fun must be callable, got {type(fun).__name__}")
    if nondiff_argnums is None:
        # The second name is that of the successor of `jax.custom_vjp` (JAX_CUSTOM_VJP3).
        nondiff_argnums = getattr(fun, "nondiff_argnums", getattr(fun, "static_argnums", ()))
    static = tuple(sorted(nondiff_argnums))
    # Bound now: `_redirect` changes what a call of `fun` means.
    bare = functools.wraps(fun)(functools.partial(type(fun).__call__, fun))
    rule = functools.partial(_transposed_rule, bare, static)

    def with_rule(primal: Callable[..., Out]) -> Callable[..., Out]:
        # `wraps` keeps the signature, by which JAX resolves arguments given by keyword.
        @functools.wraps(fun)
        def call(*args: Any) -> Out:
            return primal(*args)

        differentiable = jax.custom_jvp(call, nondiff_argnums=static)
        differentiable.defjvp(rule, symbolic_zeros=True)
        return differentiable

    # Where reverse mode goes through a loop, JAX evaluates the part that does not depend on the
    # tangents without its `custom_jvp` rules, and a forward pass over that would meet the bare
    # `custom_vjp`. A rule within a `jax.checkpoint` is left alone: hence two, one in the other.
    inner = jax.checkpoint(
        with_rule(bare),
        prevent_cse=False,
        policy=jax.checkpoint_policies.everything_saveable,
        static_argnums=static,
    )
    differentiable = with_rule(inner)
    if hasattr(type(fun), "defvjp"):
        _redirect(fun, differentiable)
    return differentiable


_in_rule: ContextVar[bool] = ContextVar("_in_rule", default=False)


@contextlib.contextmanager
def _within_rule() -> Iterator[None]:
    token = _in_rule.set(True)
    try:
        yield
    finally:
        _in_rule.reset(token)


# A forward rule usually calls the `custom_vjp` function that it belongs to. At order two that call
# is differentiated, and refuses forward mode. Python looks `__call__` up in the class of an object,
# so `fun` gets a subclass of its own. Its calls change within rules only: elsewhere `fun` keeps
# refusing forward mode, as its author may rely on.
def _redirect(fun: Callable[..., Out], differentiable: Callable[..., Out]) -> None:
    """Lets calls of a `custom_vjp` function within any rule mean the differentiable function."""
    cls = type(fun)

    @functools.wraps(cls.__call__)
    def call(self: Callable[..., Out], *args: Any, **kwargs: Any) -> Out:
        if _in_rule.get():
            return differentiable(*args, **kwargs)
        # In reverse mode JAX runs the forward rule now. Where that is jitted, it is traced once for
        # both, so that the trace has to be the differentiable one.
        with _within_rule():
            return cls.__call__(self, *args, **kwargs)

    body = {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__}
    fun.__class__ = type(cls.__name__, (cls,), body)


# JAX runs both halves of the rule of `fun` in here.
@_within_rule()
def _transposed_rule(
    fun: Callable[..., PyTree], nondiff_argnums: Sequence[int], *args: Any
) -> tuple[PyTree, PyTree]:
    *static, primals, tangents = args
    leaves, treedef = jax.tree.flatten(primals)
    tangent_leaves = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    live = [i for i, t in enumerate(tangent_leaves) if not isinstance(t, SymbolicZero)]

    def of_live(*live_leaves: Array) -> tuple[list[Array], PyTree]:
        filled = list(leaves)
        for i, leaf in zip(live, live_leaves, strict=True):
            filled[i] = leaf
        call_args = list(jax.tree.unflatten(treedef, filled))
        for position, value in sorted(zip(nondiff_argnums, static, strict=True)):
            call_args.insert(position, value)
        out = fun(*call_args)
        return [leaf for leaf in jax.tree.leaves(out) if _is_inexact(leaf)], out

    inexact_out, pullback, out = jax.vjp(of_live, *[leaves[i] for i in live], has_aux=True)

    def pushforward(
        pullback: Callable[..., tuple[Array, ...]], live_tangents: tuple[Array, ...]
    ) -> list[Array]:
        transpose = jax.linear_transpose(pullback, inexact_out)  # runs the backward rule
        try:
            (out_tangents,) = transpose(live_tangents)
        except Exception as error:
            raise TypeError(
                f"jvp_from_vjp: the backward rule of {_name(fun)} must be linear in the cotangent "
                "and built from operations that JAX can transpose"
            ) from error
        return out_tangents

    live_tangents = tuple(tangent_leaves[i] for i in live)
    inexact_tangents = iter(jax.checkpoint(pushforward, prevent_cse=False)(pullback, live_tangents))
    return out, jax.tree.map(
        lambda leaf: (
            next(inexact_tangents)
            if _is_inexact(leaf)
            else np.zeros(np.shape(leaf), jax.dtypes.float0)
        ),
        out,
    )


def analytic(
    fun: Callable[P, Out], pullback: Callable[..., Any], *, static: tuple[int, ...] = ()
) -> Callable[P, Out]:
    """A function with a stated pullback, differentiable in every mode.

    Reverse mode keeps the arguments.

    Args:
        fun: the function, called by position.
        pullback: given the arguments of the function and the cotangent of its result, the
            cotangents of all arguments but the static ones; None for a constant.
        static: the positions of arguments that are not arrays.
    """
    rule = jax.custom_vjp(fun, nondiff_argnums=static)
    differentiable = jvp_from_vjp(rule)

    def forward(*args: Any) -> tuple[Any, Any]:
        call: Any = differentiable
        return call(*args), tuple(arg for i, arg in enumerate(args) if i not in static)

    def backward(*args: Any) -> Any:
        *given, residuals, cotangent = args
        arguments = list(residuals)
        for position, value in zip(static, given, strict=True):
            arguments.insert(position, value)
        return pullback(*arguments, cotangent)

    rule.defvjp(forward, backward)
    return differentiable


def values_and_live(args: Any) -> tuple[Any, Any]:
    """What the forward rule of a `custom_vjp` with symbolic zeros is given, in two trees.

    Returns:
        The arguments; and which of their leaves are being differentiated.
    """
    leaves, tree = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    parts = [leaf.value for leaf in leaves], [leaf.perturbed for leaf in leaves]
    values, live = (jax.tree.unflatten(tree, part) for part in parts)
    return values, live


def instantiated(cotangents: Any) -> Any:
    """Arrays of zeros in place of the symbolic ones that such a rule may be given."""
    leaves, tree = jax.tree.flatten(cotangents, is_leaf=lambda x: isinstance(x, SymbolicZero))
    is_zero = [isinstance(leaf, SymbolicZero) for leaf in leaves]
    arrays = [jnp.zeros(x.shape, x.dtype) if z else x for x, z in zip(leaves, is_zero, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def transposable(fun: Callable[[PyTree], Out], x: PyTree) -> Out:
    """fun(x) for a linear function with loops, so that JAX can transpose it.

    It can as it is, but before 0.10 JAX transposes a loop only if it has made it linear itself.
    """
    if jax.__version_info__ >= (0, 10):
        return fun(x)
    # Zeros that differ along the same axes of a mesh as x, in every version of JAX.
    zeros = jax.tree.map(lambda leaf: jnp.where(False, leaf, jnp.zeros_like(leaf)), x)
    _, linear = jax.linearize(fun, zeros)
    return linear(x)


@jax.custom_jvp
def valued(formula: Array, value: Array) -> Array:
    """A value that equals a formula but keeps more digits, with the derivative of the formula."""
    return value


@valued.defjvp
def _valued_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return valued(*primals), tangents[0]


def _is_inexact(leaf: ArrayLike) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _name(fun: Callable[..., Any]) -> str:
    return getattr(fun, "__qualname__", type(fun).__name__)
