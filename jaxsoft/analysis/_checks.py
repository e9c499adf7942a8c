"""Checks of what the functions of `jaxsoft.analysis` take besides arrays of logits."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxsoft._core import validation


def callable_or_raise(function: str, argument: str, value: Any, following: Any) -> Any:
    """Returns what can be called, or raises `TypeError`; the next argument may be it instead."""
    if not callable(value):
        order = f"; {argument} comes first, then its arguments" if callable(following) else ""
        raise TypeError(
            f"{function}: {argument} must be callable, got {type(value).__name__}{order}"
        )
    return value


def positive_integer(function: str, argument: str, value: Any) -> int:
    """Returns an integer of 1 or more."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{function}: {argument} must be an integer, got {type(value).__name__}"
        ) from None
    if number < 1:
        raise ValueError(f"{function}: {argument} must be 1 or more, got {number}")
    return number


def logits_of(function: str, argument: str, value: Any) -> Array:
    """Returns the logits that a function of the caller has returned."""
    if not isinstance(value, jax.Array):
        raise TypeError(
            f"{function}: {argument} must return an array of logits, got {type(value).__name__}"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{function}: {argument} must return floating logits, got dtype {value.dtype}"
        )
    return value


def parameters(function: str, argument: str, tree: PyTree) -> PyTree:
    """Returns a tree whose leaves are floating arrays."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    arrays = []
    for path, value in leaves:
        name = argument + jax.tree_util.keystr(path)
        if callable(value) or isinstance(value, (bool, int)):
            raise TypeError(  # the functions and flags of a model
                f"{function}: {argument} must be a pytree of arrays, got a leaf of type "
                f"{type(value).__name__} ({name}); with Equinox: params, static = "
                "eqx.partition(model, eqx.is_inexact_array)"
            )
        leaf = validation.array(function, name, value)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{function}: {name} must be floating, got dtype {leaf.dtype}")
        arrays.append(leaf)
    return jax.tree.unflatten(treedef, arrays)


def direction(function: str, tree: PyTree, params: PyTree) -> PyTree:
    """Returns a tree like the parameters, cast to their dtypes."""
    tree = parameters(function, "v", tree)
    wanted, got = str(jax.tree.structure(params)), str(jax.tree.structure(tree))
    if wanted != got:
        raise ValueError(f"{function}: v must have the tree of params, {wanted}, got {got}")
    leaves, shaped = jax.tree_util.tree_flatten_with_path(tree)[0], jax.tree.leaves(params)
    for (path, leaf), like in zip(leaves, shaped, strict=True):
        name = "v" + jax.tree_util.keystr(path)
        validation.same_shape(function, name, leaf, like.shape, "as in params")
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, params)
