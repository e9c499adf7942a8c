"""What is left of C when classes are merged, and when logits move."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsoft._core.devices import Mesh
from jaxsoft._simplex.formulas import fractions, jit, others, quotient


# With every logit moved by at most r, p_i is largest when its own goes up and all others down, and
# smallest the other way round; the sink's logit stays. In units of e^r all exponents are negative.
@jit
def certificate(
    s: Float[Array, "*b n"],
    s0: Float[Array, "*b"],
    radius: Float[Array, "*b"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "*b n"], Float[Array, "*b n"]]:
    """The smallest and the largest probabilities; NaN where the radius is negative."""
    radius = jnp.where(radius >= 0, radius, jnp.nan)
    t, a, a0 = fractions(s, s0, mesh)
    a0, rest = a0[..., None], others(a, mesh)
    decay = jnp.exp(-radius * t)[..., None]
    upper = _share(a, rest * decay * decay + a0 * decay)
    # Where there is no other class, e^-r is a factor of both.
    common = jnp.where(rest == 0, 1, decay)
    lower = _share(a * decay * common, rest + a0 * common)
    return jnp.where((rest == 0) & (a0 == 0), a, lower), upper


def _share(part: Array, rest: Array) -> Array:
    """part / (part + rest), 0 / 0 being 0."""
    whole = part + rest
    return jnp.where(whole == 0, 0, quotient(part, jnp.where(whole == 0, 1, whole)))


@functools.partial(jax.jit, static_argnames="count")
def merged(
    s: Float[Array, "*b n"], ids: Int[Array, " n"], *, count: int
) -> tuple[Float[Array, "*b m"], Float[Array, "*b"]]:
    """The weights summed over the classes of each id, and the sum of those of no id in [0, m)."""
    inside = (ids >= 0) & (ids < count)
    place = jnp.where(inside, ids, count)
    sums = jnp.zeros((*s.shape[:-1], count + 1), s.dtype).at[..., place].add(s)
    return sums[..., :-1], sums[..., -1]
