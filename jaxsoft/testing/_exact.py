"""The exact blocks, in float64, and for each entry the magnitude of its terms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsoft.testing._modes import partial, partials, prefixed
from jaxsoft.testing._precision import Function, Named, Wide, enable_x64, float64


class Exact(NamedTuple):
    """An exact block, and for each entry the magnitude that its error is measured against."""

    entries: Wide
    scale: Wide


def exact_derivatives(
    f: Function, rows: list[Named], held: Named, highest: int, differences: bool
) -> list[list[Named]]:
    """The values and the derivatives of each row in float64; order two of the first row alone."""
    exact: list[list[Named]] = [[] for _ in rows]
    with enable_x64(True):
        g: Function = jax.jit(f)
        for order in range(highest + 1):
            for row in range(len(rows) if order < 2 else 1):
                exact[row].append(float64(g(float64(rows[row]), float64(held))))
            g = _differences(g) if differences else jax.jit(partials(jax.jacfwd, g))
    return exact


# f'(x) = Σ w_k (f(x + kh) - f(x - kh)) / (60 h), with w = 45, -9, 1, is off by h⁶ f⁽⁷⁾(x) / 140 and
# by the rounding of f, eps / h. At order two the latter counts twice: h = 1/128 suits both.
def _differences(f: Function) -> Function:
    def blocks(live: Named, held: Named) -> Named:
        shapes = {name: value.shape for name, value in f(live, held).items()}
        out = {partial(n, by): np.zeros(shapes[n] + live[by].shape) for n in shapes for by in live}
        for by, leaf in live.items():
            for index in np.ndindex(leaf.shape):
                # Smaller steps for small arguments, which may lie near the edge of the domain.
                step = float(np.clip(abs(leaf[index]), 1 / 16, 1)) / 128
                for k, weight in ((1, 45), (-1, -45), (2, -9), (-2, 9), (3, 1), (-3, -1)):
                    moved = leaf.copy()
                    moved[index] += k * step
                    for name, value in f(live | {by: moved}, held).items():
                        term = np.asarray(value) * (weight / (60 * step))
                        out[partial(name, by)][(..., *index)] += term
        return out

    return blocks


def expected_blocks(exact: list[Named], tangents: Named, cotangents: Named) -> dict[str, Named]:
    """The exact blocks for every kind of mode."""
    v, g = float64(tangents), float64(cotangents)
    blocks = [{name: _block(x, abs(x)) for name, x in of_order.items()} for of_order in exact]
    jacobian = {(o, i): exact[1][partial(o, i)] for o in g for i in v}
    pushed = {o: _product([(jacobian[o, i], v[i], v[i].ndim) for i in v]) for o in g}
    pulled = {i: _product([(g[o], jacobian[o, i], g[o].ndim) for o in g]) for i in v}
    return dict(zip(("value", "jacobian", "hessian"), blocks, strict=False)) | {
        "jvp": blocks[0] | prefixed("tangent of ", pushed),
        "vjp": blocks[0] | prefixed("cotangent of ", pulled),
    }


def _product(terms: list[tuple[Wide, Wide, int]]) -> Exact:
    with np.errstate(invalid="ignore"):
        magnitude = sum(np.tensordot(abs(a), abs(b), axes) for a, b, axes in terms)
        return _block(sum(np.tensordot(a, b, axes) for a, b, axes in terms), magnitude)


def _block(entries: Any, magnitude: Any) -> Exact:
    return Exact(np.asarray(entries), np.full(np.shape(entries), largest(magnitude)))


def largest(entries: Any) -> float:
    """The largest magnitude among the finite entries."""
    return float(np.max(abs(entries), initial=0.0, where=np.isfinite(entries)))


def directions(like: Named) -> Named:
    """Fixed pseudo-random numbers of magnitude 1/2 to 3/2, so that every entry counts."""
    random = np.random.default_rng(0)

    def direction(leaf: Any) -> Array:
        entries = random.uniform(0.5, 1.5, leaf.shape) * random.choice([-1.0, 1.0], leaf.shape)
        return jnp.asarray(entries, leaf.dtype)

    return {name: direction(leaf) for name, leaf in like.items()}
