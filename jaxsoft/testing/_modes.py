"""The differentiation modes: for each one how it runs a function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from jaxsoft.testing._types import Function, Named

# What a mode runs, on (live, held, tangents, cotangents). It returns blocks by name.
Run = Callable[[Named, Named, Named, Named], Named]


def _value(f: Function) -> Run:
    return lambda live, held, tangents, cotangents: f(live, held)


def _jvp(f: Function) -> Run:
    def run(live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
        out, out_tangents = jax.jvp(lambda x: f(x, held), (live,), (tangents,))
        return out | prefixed("tangent of ", out_tangents)

    return run


def _linearize(f: Function) -> Run:
    def run(live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
        out, pushforward = jax.linearize(lambda x: f(x, held), live)
        return out | prefixed("tangent of ", pushforward(tangents))

    return run


def _vjp(f: Function) -> Run:
    def run(live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
        out, pullback = jax.vjp(lambda x: f(x, held), live)
        return out | prefixed("cotangent of ", pullback(cotangents)[0])

    return run


def prefixed(prefix: str, named: Named) -> Named:
    """The leaves with a prefix to their names."""
    return {prefix + name: leaf for name, leaf in named.items()}


def _scanned(f: Function) -> Function:
    return lambda live, held: jax.lax.scan(lambda _, row: (None, f(*row)), None, (live, held))[1]


def partials(derivative: Callable[..., Any], f: Function) -> Function:
    """The derivative of each result by each leaf, apart for each dtype: JAX would join them."""

    def restricted(live: Named, held: Named, results: Named, by: Named) -> Named:
        def among(leaves: Named) -> Named:
            out = f(live | leaves, held)
            return {name: out[name] for name in results}

        return {
            partial(name, leaf): block
            for name, of in derivative(among)(by).items()
            for leaf, block in of.items()
        }

    def blocks(live: Named, held: Named) -> Named:
        out: Named = {}
        for results in _by_dtype(f(live, held)):
            for by in _by_dtype(live):
                out |= restricted(live, held, results, by)
        return out

    return blocks


def _by_dtype(named: Named) -> list[Named]:
    dtypes = dict.fromkeys(leaf.dtype for leaf in named.values())
    return [{n: leaf for n, leaf in named.items() if leaf.dtype == dtype} for dtype in dtypes]


def partial(result: str, by: str) -> str:
    """The name of a partial derivative."""
    return f"∂{result}/∂{by}"


def _jacobian(derivative: Callable[..., Any]) -> Callable[[Function], Run]:
    return lambda f: jax.jit(_value(partials(derivative, f)))


def _hessian(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[[Function], Run]:
    return lambda f: jax.jit(_value(partials(outer, partials(inner, f))))


@dataclass(frozen=True)
class Mode:
    """A mode: the kind of blocks it returns, how it runs a function, on one row or on two."""

    blocks: Literal["value", "jvp", "vjp", "jacobian", "hessian"]
    build: Callable[[Function], Run]
    two_rows: bool = False


BY_NAME = {
    "value": Mode("value", _value),
    "jit": Mode("value", lambda f: jax.jit(_value(f))),
    "vmap": Mode("value", lambda f: jax.vmap(_value(f)), two_rows=True),
    "jvp": Mode("jvp", _jvp),
    "linearize": Mode("jvp", _linearize),
    "jit(jvp)": Mode("jvp", lambda f: jax.jit(_jvp(f))),
    "vmap(jvp)": Mode("jvp", lambda f: jax.vmap(_jvp(f)), two_rows=True),
    "jvp(scan)": Mode("jvp", lambda f: _jvp(_scanned(f)), two_rows=True),
    "jvp(checkpoint)": Mode("jvp", lambda f: _jvp(jax.checkpoint(f))),
    "vjp": Mode("vjp", _vjp),
    "jit(vjp)": Mode("vjp", lambda f: jax.jit(_vjp(f))),
    "vmap(vjp)": Mode("vjp", lambda f: jax.vmap(_vjp(f)), two_rows=True),
    "vjp(scan)": Mode("vjp", lambda f: _vjp(_scanned(f)), two_rows=True),
    "vjp(checkpoint)": Mode("vjp", lambda f: _vjp(jax.checkpoint(f))),
    "jacfwd": Mode("jacobian", _jacobian(jax.jacfwd)),
    "jacrev": Mode("jacobian", _jacobian(jax.jacrev)),
    "jacfwd(jacfwd)": Mode("hessian", _hessian(jax.jacfwd, jax.jacfwd)),
    "jacfwd(jacrev)": Mode("hessian", _hessian(jax.jacfwd, jax.jacrev)),
    "jacrev(jacfwd)": Mode("hessian", _hessian(jax.jacrev, jax.jacfwd)),
    "jacrev(jacrev)": Mode("hessian", _hessian(jax.jacrev, jax.jacrev)),
}

MODES: tuple[str, ...] = tuple(BY_NAME)
"""The names of the modes, each written as the code it runs; the last four are of order two."""
