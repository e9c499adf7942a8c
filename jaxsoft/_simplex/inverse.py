"""Inverse and determinant of C(s, s0) + λ I, with λ = 0 the pseudo-inverse and -determinant.

A damping of None stands for the number 0: then only the pseudo-inverse is computed. Of an array
each row selects one of the two, and a negative damping makes its row NaN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._core import programs
from jaxsoft._core.devices import Mesh
from jaxsoft._rows.logits import divisor
from jaxsoft._simplex import formulas
from jaxsoft._simplex.formulas import Pair, PerClass, PerRow, fractions, quotient, total


@formulas.jit
def solve(
    s: PerClass, s0: PerRow, b: PerClass, damping: PerRow | None, mesh: Mesh | None
) -> PerClass:
    """(C + λ I)⁻¹ b, and C⁺ b where λ = 0."""
    if damping is None:
        return _solve_pseudo(s, s0, b, mesh)
    zero, positive = _split(damping)
    damped = _solve_damped(s, s0, b, positive, mesh)
    return jnp.where(zero[..., None], _solve_pseudo(s, s0, b, mesh), damped)


# With α = 1 / (s + λ) the formula of Sherman and Morrison has the denominator t - Σ α s², which is
# Σ α λ s + s0: nothing cancels, and for b ≥ 0 no term is negative.
def _solve_damped(s: Array, s0: Array, b: Array, damping: Array, mesh: Mesh | None) -> Array:
    shifted = s + damping[..., None]
    scaled, denominator = quotient(s, shifted), _grounded(s, s0, damping, mesh)
    projected = quotient(total(scaled * b, mesh), denominator)
    return quotient(b, shifted) + scaled * projected[..., None]


def _grounded(s: Array, s0: Array, damping: Array, mesh: Mesh | None = None) -> Array:
    """Σ s λ / (s + λ) + s0 as a divisor: 1 in a row without any weight."""
    return divisor(total(_parallel(s, damping[..., None]), mesh) + s0)


def _parallel(s: Array, damping: Array) -> Array:
    """s λ / (s + λ): the smaller of the two times a number between a half and 1, in any range."""
    return jnp.minimum(s, damping) * quotient(jnp.maximum(s, damping), s + damping)


# On its support C is regular with a sink: C⁻¹ b = b / s + Σb / s0. Without one its kernel is the
# constants: C⁺ = H diag(1/s) H with H = I - 1 1ᵀ / k for k classes.
def _solve_pseudo(s: Array, s0: Array, b: Array, mesh: Mesh | None) -> Array:
    support = s != 0
    count = jnp.maximum(total(support, mesh, keepdims=True), 1).astype(s.dtype)

    def project(x: Array) -> Array:
        return jnp.where(support, x - total(x, mesh, keepdims=True) / count, 0)

    b, s = jnp.where(support, b, 0), divisor(s)
    common = quotient(total(b, mesh), divisor(s0))
    regular = jnp.where(support, quotient(b, s) + common[..., None], 0)
    return jnp.where((s0 != 0)[..., None], regular, project(quotient(project(b), s)))


@programs.program(places=programs.of_last)
def log_determinant(s: PerClass, s0: PerRow, damping: PerRow | None) -> PerRow:
    """log det(C + λ I), and the logarithm of the pseudo-determinant where λ = 0."""
    if damping is None:
        return _log_pseudo_determinant(s, s0)
    zero, positive = _split(damping)
    return jnp.where(zero, _log_pseudo_determinant(s, s0), _log_damped(s, s0, positive))


# det(diag(s + λ) - s sᵀ / t) = Π (s + λ) · (Σ α λ s + s0) / t. With the factor s1 + λ of a largest
# weight multiplied into the last, this is
#
#     Π_{j≠1} (s_j + λ) · (λ + Σ_j (a1 - a_j) α_j λ s_j + a1 s0),
#
# where no term is negative: at λ = 1 the logarithm of each factor keeps its digits near 0.
#
# Its derivative is tr (C + λ I)⁻¹ dC. To C, ds_i adds (e_i - a)(e_i - a)ᵀ ds_i and ds0 adds
# a aᵀ ds0; the inverse is diag(α) + β βᵀ / (Σ α λ s + s0) with β = α ∘ s. So every slope is a sum
# of squares, while the formula's own terms cancel where λ is far above the weights.
@jax.custom_jvp
def _log_damped(s: Array, s0: Array, damping: Array) -> Array:
    _, a, _ = fractions(s, s0)
    top, shift = jnp.max(a, -1, initial=0), damping[..., None]
    factor = jnp.sum((top[..., None] - a) * _parallel(s, shift), -1) + top * s0
    logarithms = jnp.where(formulas.first_largest(s), 0, _log_of_sum(s, shift))
    return jnp.sum(logarithms, -1) + _log_of_sum(damping, factor)


def _log_of_sum(x: Array, y: Array) -> Array:
    """log(x + y) of two numbers of 0 or more, to its last bits where x or y is 1."""
    smaller, larger = jnp.minimum(x, y), jnp.maximum(x, y)
    return jnp.log(larger) + jnp.log1p(smaller / larger)


@_log_damped.defjvp
def _log_damped_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Pair:
    (s, s0, damping), (ds, ds0, ddamping) = primals, tangents
    _, a, a0 = fractions(s, s0)
    shifted, divisor = s + damping[..., None], _grounded(s, s0, damping)
    inverse, beta = quotient(jnp.ones_like(s), shifted), quotient(s, shifted)
    squares = inverse * a * a
    along = formulas.complement(a, a0) ** 2 * inverse + formulas.others(squares)
    spread = quotient(_centred_shares(s, a, a0, damping) ** 2, divisor[..., None])
    of_sink = jnp.sum(squares, -1) + quotient(jnp.sum(a * beta, -1) ** 2, divisor)
    of_damping = jnp.sum(inverse + quotient(beta * beta, divisor[..., None]), -1)
    change = jnp.sum((along + spread) * ds, -1) + of_sink * ds0 + of_damping * ddamping
    return _log_damped(s, s0, damping), change


# s / (s + λ) - c / (c + λ) = λ (s - c) / ((s + λ) (c + λ)) is right to its last bits both for a
# small λ, where all shares are nearly 1, and for a large one, where they are nearly 0.
def _centred_shares(s: Array, a: Array, a0: Array, damping: Array) -> Array:
    """β - ⟨a, β⟩ for β = s / (s + λ)."""
    centre = jnp.sum(formulas.anchor(a, a0) * s, -1)
    factor = quotient(damping, centre + damping)
    u = factor[..., None] * quotient(s - centre[..., None], s + damping[..., None])
    u0 = -quotient(centre, centre + damping)
    return u - (jnp.sum(a * u, -1) + a0 * u0)[..., None]


# The product of the eigenvalues other than 0: on a support of k classes k Π s / t without a sink,
# and s0 Π s / t with one.
def _log_pseudo_determinant(s: Array, s0: Array) -> Array:
    count = jnp.sum(s != 0, -1).astype(s.dtype)
    factor, whole = jnp.where(s0 != 0, s0, count), jnp.sum(s, -1) + s0
    empty = count == 0
    ratio = jnp.log(jnp.where(empty, 1, factor)) - jnp.log(jnp.where(empty, 1, whole))
    return jnp.sum(jnp.log(divisor(s)), -1) + ratio


def _split(damping: Array) -> tuple[Array, Array]:
    """Where the damping is 0; and the damping, with 1 in place of 0, NaN of a negative one."""
    positive = jnp.where(damping > 0, damping, jnp.nan)
    return damping == 0, jnp.where(damping == 0, 1, positive)
