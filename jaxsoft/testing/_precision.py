"""How `jaxsoft.testing` works: functions of named leaves, and their arguments in float64.

A block is an array that a mode returns under a name: a value, a product with the Jacobian, or a
partial derivative of one result by one argument.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

Wide = Float64[np.ndarray, "..."]
Named = dict[str, Any]
Number = int | float
# A function of differentiated leaves and of held leaves that returns its floating leaves, by name.
Function = Callable[[Named, Named], Named]

# Public as `jax.enable_x64` in newer versions of jax, which have dropped the older name.
enable_x64: Callable[[bool], AbstractContextManager[Any]] = (
    jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
).enable_x64


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is a floating array or number."""
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating))


def float64(tree: Any) -> Any:
    """Converts floating leaves, and leaves the others as they are."""
    return jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(np.float64) if is_floating(leaf) else leaf, tree
    )


def shapes_in_float64(f: Function, live: Named, held: Named) -> dict[str, tuple[int, ...]]:
    """The shapes of what a function returns in float64, where the reference runs."""
    try:
        with enable_x64(True):
            return jax.tree.map(np.shape, jax.eval_shape(f, float64(live), float64(held)))
    except Exception as error:
        error.add_note("assert_derivatives: raised by the reference (default: fun) in float64")
        raise
