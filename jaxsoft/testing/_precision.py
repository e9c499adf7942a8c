"""Functions and their arguments in float64."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoft.testing._types import Function, Named

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
            return shapes(jax.eval_shape(f, float64(live), float64(held)))
    except Exception as error:
        error.add_note("assert_derivatives: raised by the reference (default: fun) in float64")
        raise


def shapes(named: Named) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf."""
    return {name: leaf.shape for name, leaf in named.items()}
