"""Questions about sizes that may be symbolic (`jax.export`), with a default if JAX cannot tell."""

from collections.abc import Callable

import jax

# Before it came to `jax.errors` it was in `jax.core`.
_INCONCLUSIVE = getattr(jax.errors, "InconclusiveDimensionOperation", None) or (
    jax.core.InconclusiveDimensionOperation
)


def known(question: Callable[[], bool], default: bool) -> bool:
    """The answer to a question about sizes, or the default where a size is symbolic."""
    try:
        return bool(question())
    except _INCONCLUSIVE:
        return default
