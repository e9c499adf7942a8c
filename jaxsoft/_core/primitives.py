"""Functions along the classes as primitives of JAX.

A primitive is one equation of a program until the program is lowered for a platform. So a platform
may have a form of its own that no derivative ever meets, and a linear function may state how its
transpose is computed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from jaxsoft._core.axes import ClassAxis

Form = Callable[..., PyTree]


class AlongClasses:
    """A function of arrays along an axis, all of them on one device.

    Its arguments are pytrees of arrays that have the axis, or have the shape of the rows.

    Args:
        name: the name of the primitive in a jaxpr.
        formula: the function, called with `axis`, a `ClassAxis`, by name.
        like: given the same arguments, those whose types are the types of the results.
    """

    def __init__(self, name: str, formula: Form, like: Callable[..., PyTree]) -> None:
        self.formula, self.like = formula, like
        self.forms: dict[str, Form] = {}  # by platform, where one has a form of its own
        self.primitive = Primitive(name)
        self.primitive.multiple_results = True
        self.primitive.def_impl(_flat(formula))
        self.primitive.def_abstract_eval(_flat(lambda *args, **_: like(*args)))
        batching.primitive_batchers[self.primitive] = self._batched
        self.lower(formula)

    def lower(self, form: Form, *platforms: str) -> None:
        """Sets the form of the function on these platforms, or on all that have none of theirs."""
        self.forms |= dict.fromkeys(platforms, form)
        rule = mlir.lower_fun(_flat(form), multiple_results=True)
        for platform in platforms or (None,):
            mlir.register_lowering(self.primitive, rule, platform=platform)

    def __call__(self, *args: PyTree, axis: ClassAxis) -> PyTree:
        leaves, tree = jax.tree.flatten(args)
        out = self.primitive.bind(*leaves, tree=tree, axis=axis)
        return jax.tree.unflatten(jax.tree.structure(self.like(*args)), out)

    # The whole batch is one array, and the form is chosen by its size.
    def _batched(
        self, leaves: Sequence[Any], dims: Sequence[int | None], *, tree: Any, axis: ClassAxis
    ) -> tuple[list[Any], list[int]]:
        size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)
        leaves = [batching.bdim_at_front(x, d, size) for x, d in zip(leaves, dims, strict=True)]
        axis = axis._replace(position=axis.position + 1)
        out = self.primitive.bind(*leaves, tree=tree, axis=axis)
        return out, [0] * len(out)


# Let y = A(c) v. JAX needs ẏ = A(c) v̇ + (∂A/∂c ċ) v, and v̄ = A(c)ᵀ ȳ. The first term is the
# function again and v̄ is its stated transpose; the second term is what JAX makes of the formula.
class Linear(AlongClasses):
    """A function of constants c and operands v that is linear in v.

    Args:
        name: the name of the primitive in a jaxpr.
        formula: formula(c, v, axis=axis); differentiated by c as it stands.
        like: as for `AlongClasses`.
        value: the formula as it is computed, if terms of the other one only serve its derivative.
    """

    def __init__(
        self, name: str, formula: Form, like: Callable[..., PyTree], *, value: Form | None = None
    ) -> None:
        super().__init__(name, value or formula, like)
        self._differentiable = formula
        ad.primitive_jvps[self.primitive] = self._jvp

    def transpose_to(self, other: "Linear") -> None:
        """States that the transpose of this function is the other one, and the reverse."""
        for one, two in ((self, other), (other, self)):
            ad.primitive_transposes[one.primitive] = functools.partial(_transposed, one, two)

    def _jvp(
        self, leaves: Sequence[Any], tangents: Sequence[Any], *, tree: Any, axis: ClassAxis
    ) -> tuple[list[Any], list[Any]]:
        constants, v = jax.tree.unflatten(tree, leaves)
        out = jax.tree.leaves(self(constants, v, axis=axis))
        n = len(jax.tree.leaves(constants))
        changes = []
        if any(type(t) is not ad.Zero for t in tangents[n:]):
            v_dot = jax.tree.unflatten(
                jax.tree.structure(v), map(ad.instantiate_zeros, tangents[n:])
            )
            changes.append(jax.tree.leaves(self(constants, v_dot, axis=axis)))
        live = [i for i, t in enumerate(tangents[:n]) if type(t) is not ad.Zero]
        if live:

            def of_live(*given: Any) -> list[Any]:
                filled = list(leaves[:n])
                for i, x in zip(live, given, strict=True):
                    filled[i] = x
                c = jax.tree.unflatten(jax.tree.structure(constants), filled)
                return jax.tree.leaves(self._differentiable(c, v, axis=axis))

            primals, dots = ([xs[i] for i in live] for xs in (leaves, tangents))
            changes.append(jax.jvp(of_live, primals, dots)[1])
        return out, [functools.reduce(jnp.add, terms) for terms in zip(*changes, strict=True)]


def _transposed(
    fun: Linear, other: Linear, cotangents: Sequence[Any], *leaves: Any, tree: Any, axis: ClassAxis
) -> list[Any]:
    """The transpose rule of a linear function, with another one for its transpose."""
    places = jax.tree.unflatten(tree, range(len(leaves)))
    constants = jax.tree.map(lambda place: leaves[place], places[0])
    results = jax.tree.structure(fun.like(*places))
    y_bar = jax.tree.unflatten(results, map(ad.instantiate_zeros, cotangents))
    v_bar = other(constants, y_bar, axis=axis)
    return [None] * len(jax.tree.leaves(constants)) + jax.tree.leaves(v_bar)


def _flat(form: Form) -> Callable[..., list[Any]]:
    """A form as a function of the leaves of its arguments."""

    def flat(*leaves: Any, tree: Any, axis: ClassAxis) -> list[Any]:
        return jax.tree.leaves(form(*jax.tree.unflatten(tree, leaves), axis=axis))

    return flat
