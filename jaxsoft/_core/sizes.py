"""Questions about sizes, which may be symbolic (`jax.export`)."""

from collections.abc import Callable
from typing import Any

import jax

# Until jax 0.6 it had another place, from which later versions warn.
_Inconclusive: Any = (
    getattr(jax.errors, "InconclusiveDimensionOperation", None)
    or jax.core.InconclusiveDimensionOperation
)


Size = Any  # an int, or a symbolic size
Shape = tuple[Size, ...]


def known(question: Callable[[], bool], default: bool) -> bool:
    """The answer to a question about sizes, or the default where a size is symbolic."""
    try:
        return bool(question())
    except _Inconclusive:
        return default


def is_empty(x: jax.Array) -> bool:
    """Whether an array is known to have no entry."""
    return known(lambda: x.size == 0, False)
