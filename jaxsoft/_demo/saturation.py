"""One logit running ahead of the others: what jaxsoft, jax.nn and optax make of it."""

import dataclasses
import decimal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import jaxsoft
from jaxsoft.testing import error_in_eps

_GAPS = (5, 10, 15, 20, 40, 80)
_DIGITS = 50
_TOLERANCE = 8.0  # eps, beside gap / 2: DESIGN section 7


@dataclasses.dataclass(frozen=True)
class Saturated:
    """One quantity at the logits (gap, 0, 0), where the first class has nearly all the mass.

    Attributes:
        gap: the lead of the first logit.
        quantity: what is computed in float32.
        exact: its value, from a closed form in decimal arithmetic.
        values: what each library returns; one that has no such function is left out.
        errors: the same in eps.
        tolerance: the largest error allowed to jaxsoft, in eps.
    """

    gap: int
    quantity: str
    exact: float
    values: dict[str, float]
    errors: dict[str, float]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Saturation:
    """Where others compute 1 - p by subtraction and jaxsoft sums the other classes.

    Attributes:
        digits: of the decimal arithmetic behind the exact values.
        rows: the quantities at each gap.
        failures: what is wrong.
    """

    digits: int
    rows: tuple[Saturated, ...]
    failures: tuple[str, ...]


def saturation() -> Saturation:
    """Compares the libraries with exact values at every gap."""
    libraries = {
        "jaxsoft": _quantities(jaxsoft.softmax, lambda x: jaxsoft.cross_entropy(x, 0)),
        "jax.nn": _quantities(jax.nn.softmax, lambda x: -jax.nn.log_softmax(x)[0]),
        "optax": _quantities(None, lambda x: optax.softmax_cross_entropy_with_integer_labels(x, 0)),
    }
    rows: list[Saturated] = []
    for gap in _GAPS:
        x = jnp.asarray([gap, 0, 0], jnp.float32)
        computed = {name: of(x) for name, of in libraries.items()}
        for quantity, exact in _exact(gap).items():
            found = {name: of[quantity] for name, of in computed.items() if quantity in of}
            rows.append(
                Saturated(
                    gap=gap,
                    quantity=quantity,
                    exact=exact,
                    values={name: float(value) for name, value in found.items()},
                    errors={name: float(error_in_eps(v, exact)) for name, v in found.items()},
                    tolerance=_TOLERANCE + gap / 2,
                )
            )
    return Saturation(
        digits=_DIGITS,
        rows=tuple(rows),
        failures=tuple(
            f"saturated row, {row.quantity} at gap {row.gap}: "
            f"off by {row.errors['jaxsoft']:.3g} eps"
            for row in rows
            if not row.errors["jaxsoft"] <= row.tolerance
        ),
    )


def _quantities(
    softmax: Callable[[Array], Array] | None, loss: Callable[[Array], Array]
) -> Callable[[Array], dict[str, Array]]:
    @jax.jit
    def quantities(x: Array) -> dict[str, Array]:
        slope = {} if softmax is None else {"∂p₁/∂z₁": jax.jacfwd(softmax)(x)[0, 0]}
        return slope | {
            "loss": loss(x),
            "∂loss/∂z₁": jax.grad(loss)(x)[0],
            "∂²loss/∂z₁²": jax.hessian(loss)(x)[0, 0],
        }

    return quantities


# With s = 2 exp(-gap) the sum of the other exponentials, p = 1 / (1 + s) and 1 - p = s / (1 + s).
def _exact(gap: int) -> dict[str, float]:
    with decimal.localcontext(prec=_DIGITS):
        s = 2 * decimal.Decimal(-gap).exp()
        exact = {
            "∂p₁/∂z₁": s / (1 + s) ** 2,
            "loss": (1 + s).ln(),
            "∂loss/∂z₁": -s / (1 + s),
            "∂²loss/∂z₁²": s / (1 + s) ** 2,
        }
    return {quantity: float(value) for quantity, value in exact.items()}
