"""Validation of what `assert_derivatives` is given: every error message."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxsoft.testing._modes import BY_NAME, MODES
from jaxsoft.testing._precision import Named, is_floating


def checked_options(
    fun: Any, reference: Any, modes: Any, order: Any, tolerance: Any, least_scale: Any
) -> tuple[str, ...]:
    """Returns the names of the modes to run."""
    for name, value in (("fun", fun), ("reference", fun if reference is None else reference)):
        require(callable(value), TypeError, f"{name} must be callable, got {kind(value)}")
    limits = (("tolerance", 0 if tolerance is None else tolerance), ("least_scale", least_scale))
    for name, value in limits:
        number = isinstance(value, (int, float))
        require(number, TypeError, f"{name} must be a number, got {kind(value)}")
        allowed = 0 <= value < math.inf
        require(allowed, ValueError, f"{name} must be finite and 0 or more, got {value}")
    require(order in (1, 2), ValueError, f"order must be 1 or 2, got {order!r}")
    allowed = [name for name in MODES if order == 2 or BY_NAME[name].blocks != "hessian"]
    if modes is None:
        return tuple(allowed)
    names = isinstance(modes, Sequence) and not isinstance(modes, str)
    require(names, TypeError, f"modes must be a sequence of names, got {kind(modes)}")
    require(len(modes) > 0, ValueError, "modes must name a mode, got none")
    for name in modes:
        require(name in MODES, ValueError, f"modes must be among {', '.join(MODES)}, got {name}")
        require(name in allowed, ValueError, f"modes must be of order {order}, got {name}")
    return tuple(modes)


def checked_arguments(args: tuple[PyTree, ...], argnums: Any) -> tuple[Named, Named, Any]:
    """Returns all leaves by name, those to differentiate by, and the structure of `args`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(args)
    leaves: Named = {}
    floating: dict[int, Named] = {}
    for path, leaf in paths:
        name = "args" + jax.tree_util.keystr(path)
        leaves[name] = _checked_leaf(name, leaf)
        if is_floating(leaves[name]):
            floating.setdefault(path[0].idx, {})[name] = leaves[name]
    require(floating, ValueError, "args must hold a floating array, got none")
    chosen = sorted(floating) if argnums is None else argnums
    numbers = chosen if isinstance(chosen, Sequence) else [chosen]
    wanted = f"argnums must be among {sorted(floating)}, which have floating leaves, got"
    require(len(numbers) > 0, ValueError, f"{wanted} none")
    for number in numbers:
        require(isinstance(number, int), TypeError, f"argnums must be integers, got {kind(number)}")
        require(number in floating, ValueError, f"{wanted} {number}")
    live = {name: leaf for number in numbers for name, leaf in floating[number].items()}
    return leaves, live, treedef


def _checked_leaf(name: str, leaf: Any) -> Any:
    """Returns the leaf as an array, but Python integers and booleans as they are."""
    if isinstance(leaf, (float, np.ndarray, np.generic)) and np.asarray(leaf).dtype.kind in "biufV":
        leaf = jnp.asarray(np.asarray(leaf))
    array = isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    got = getattr(leaf, "dtype", kind(leaf))
    text = f"args must hold real arrays and numbers, got {got} at {name}"
    require(array or isinstance(leaf, int), TypeError, text)
    return leaf


def require(condition: object, error: type[Exception], text: str) -> None:
    """Raises the error unless the condition holds."""
    if not condition:
        raise error(f"assert_derivatives: {text}")


def kind(value: object) -> str:
    """The name of the type."""
    return type(value).__name__
