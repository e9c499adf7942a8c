"""Functions of p^a that are those of log p where a is 0: they are means of exp(-w t) over t."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TERMS = {4: 11, 8: 18}  # of a series, for numbers of so many bytes


def surprisal(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log p; 0 where p is 0."""
    return -jnp.log(jnp.where(p == 0, 1, p))


# With l = -log p this is l mean(a l), and -log p for a = 0.
def depth(p: Float[Array, "..."], a: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """(1 - p^a) / a for a ≥ 0; 0 where p is 0."""
    logarithm = surprisal(p)
    return logarithm * mean(a * logarithm)


def depth_slope(p: Float[Array, "..."], a: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """The derivative of it by a: 0 or less."""
    logarithm = surprisal(p)
    return -(logarithm**2) * first_moment(a * logarithm)


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
