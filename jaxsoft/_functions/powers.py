"""Functions of p^a that are those of log p where a is 0: they are means of exp(-w t) over t."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TERMS = {4: 11, 8: 18}  # of a series, for numbers of so many bytes


# (1 - exp(-w)) / w = ∫₀¹ exp(-w t) dt, of which minus the derivative is ∫₀¹ t exp(-w t) dt.
@jax.custom_jvp
def mean(w: Float[Array, "..."]) -> Float[Array, "..."]:
    """(1 - exp(-w)) / w for w ≥ 0; 1 at 0."""
    positive = jnp.where(w == 0, 1, w)
    return jnp.where(w == 0, 1, -jnp.expm1(-positive) / positive)


@mean.defjvp
def _mean_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (w,), (w_dot,) = primals, tangents
    return mean(w), -first_moment(w) * w_dot


def first_moment(w: Float[Array, "..."]) -> Float[Array, "..."]:
    """(1 - (1 + w) exp(-w)) / w² for w ≥ 0; 1/2 at 0."""
    near = w < 1
    small, large = jnp.where(near, w, 0), jnp.where(near, 1, w)
    series = jnp.zeros_like(w)
    for k in range(_TERMS[w.dtype.itemsize], -1, -1):
        series = series * -small + 1 / (math.factorial(k) * (k + 2))
    return jnp.where(near, series, (1 - (1 + large) * jnp.exp(-large)) / large**2)
