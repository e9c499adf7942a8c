"""Checks of what the functions of `jaxsoft.analysis` take besides arrays of logits."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxsoft._core import validation


def callable_or_raise(function: str, argument: str, value: Any, following: Any) -> Any:
    """Returns a callable, or raises `TypeError`, with a hint if the next argument is one."""
    if not callable(value):
        got = type(value).__name__
        order = f"; {argument} comes first, then its arguments" if callable(following) else ""
        raise TypeError(f"{function}: {argument} must be callable, got {got}{order}")
    return value


def positive_integer(function: str, argument: str, value: Any) -> int:
    """Returns an integer of 1 or more."""
    try:
        number = operator.index(value)
    except TypeError:
        got = type(value).__name__
        raise TypeError(f"{function}: {argument} must be an integer, got {got}") from None
    if number < 1:
        raise ValueError(f"{function}: {argument} must be 1 or more, got {number}")
    return number


def logits_of(function: str, argument: str, value: Any) -> Array:
    """Returns the logits that a function of the caller has returned."""
    if not isinstance(value, jax.Array):
        got = type(value).__name__
        raise TypeError(f"{function}: {argument} must return an array of logits, got {got}")
    dtype = value.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{function}: {argument} must return floating logits, got dtype {dtype}")
    return value


def parameters(function: str, argument: str, tree: PyTree) -> PyTree:
    """Returns a tree whose leaves are floating arrays."""

    def checked(path: Any, value: Any) -> Array:
        name = argument + jax.tree_util.keystr(path)
        if callable(value) or isinstance(value, (bool, int)):
            raise TypeError(  # a model's functions and flags
                f"{function}: {argument} must be a pytree of arrays, got a leaf of type "
                f"{type(value).__name__} ({name}); with Equinox: params, static = "
                "eqx.partition(model, eqx.is_inexact_array)"
            )
        leaf = validation.array(function, name, value)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{function}: {name} must be floating, got dtype {leaf.dtype}")
        return leaf

    return jax.tree_util.tree_map_with_path(checked, tree)


def direction(function: str, tree: PyTree, params: PyTree) -> PyTree:
    """Returns a tree like the parameters, cast to their dtypes."""
    tree = parameters(function, "v", tree)
    wanted, got = str(jax.tree.structure(params)), str(jax.tree.structure(tree))
    if wanted != got:
        raise ValueError(f"{function}: v must have the tree of params, {wanted}, got {got}")

    def cast(path: Any, leaf: Array, like: Array) -> Array:
        name = "v" + jax.tree_util.keystr(path)
        validation.same_shape(function, name, leaf, like.shape, "as in params")
        return leaf.astype(like.dtype)

    return jax.tree_util.tree_map_with_path(cast, tree, params)
