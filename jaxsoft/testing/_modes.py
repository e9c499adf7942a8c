"""The differentiation modes: for each one how it runs a function."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from jaxsoft.testing._precision import Function, Named

# What a mode runs, on (live, held, tangents, cotangents). It returns blocks by name.
Run = Callable[[Named, Named, Named, Named], Named]


def _value(f: Function, live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
    return f(live, held)


def _jvp(f: Function, live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
    out, out_tangents = jax.jvp(lambda x: f(x, held), (live,), (tangents,))
    return out | prefixed("tangent of ", out_tangents)


def _linearize(f: Function, live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
    out, pushforward = jax.linearize(lambda x: f(x, held), live)
    return out | prefixed("tangent of ", pushforward(tangents))


def _vjp(f: Function, live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
    out, pullback = jax.vjp(lambda x: f(x, held), live)
    return out | prefixed("cotangent of ", pullback(cotangents)[0])


def prefixed(prefix: str, named: Named) -> Named:
    """The leaves with a prefix to their names."""
    return {prefix + name: leaf for name, leaf in named.items()}


def _scanned(f: Function) -> Function:
    return lambda live, held: jax.lax.scan(lambda _, row: (None, f(*row)), None, (live, held))[1]


def partials(derivative: Callable[..., Any], f: Function) -> Function:
    """The derivative of each result by each leaf, by one call for each pair of dtypes.

    In one call JAX would ravel leaves of several dtypes into one array of a common dtype.
    """

    def restricted(live: Named, held: Named, results: Named, by: Named) -> Named:
        out = f(live | by, held)
        return {name: out[name] for name in results}

    return lambda live, held: {
        partial(name, leaf): block
        for results in _by_dtype(f(live, held))
        for by in _by_dtype(live)
        for name, of in derivative(functools.partial(restricted, live, held, results))(by).items()
        for leaf, block in of.items()
    }


def _by_dtype(named: Named) -> list[Named]:
    dtypes = dict.fromkeys(leaf.dtype for leaf in named.values())
    return [{n: leaf for n, leaf in named.items() if leaf.dtype == dtype} for dtype in dtypes]


def partial(result: str, by: str) -> str:
    """The name of a partial derivative."""
    return f"∂{result}/∂{by}"


def _partials(*derivatives: Callable[..., Any]) -> Callable[[Function], Function]:
    """Nested derivatives, the outermost first."""
    return lambda f: functools.reduce(lambda g, outer: partials(outer, g), derivatives[::-1], f)


class Mode(NamedTuple):
    """A mode: the kind of blocks it returns, and `outer(run)` of `inner(f)`, on one row or two."""

    blocks: Literal["value", "jvp", "vjp", "jacobian", "hessian"]
    run: Callable[..., Named]
    outer: Callable[..., Run] = lambda run: run
    inner: Callable[[Function], Function] = lambda f: f
    two_rows: bool = False

    def build(self, f: Function) -> Run:
        """How the mode runs a function."""
        return self.outer(functools.partial(self.run, self.inner(f)))


BY_NAME = {
    "value": Mode("value", _value),
    "jit": Mode("value", _value, jax.jit),
    "vmap": Mode("value", _value, jax.vmap, two_rows=True),
    "jvp": Mode("jvp", _jvp),
    "linearize": Mode("jvp", _linearize),
    "jit(jvp)": Mode("jvp", _jvp, jax.jit),
    "vmap(jvp)": Mode("jvp", _jvp, jax.vmap, two_rows=True),
    "jvp(scan)": Mode("jvp", _jvp, inner=_scanned, two_rows=True),
    "jvp(checkpoint)": Mode("jvp", _jvp, inner=jax.checkpoint),
    "vjp": Mode("vjp", _vjp),
    "jit(vjp)": Mode("vjp", _vjp, jax.jit),
    "vmap(vjp)": Mode("vjp", _vjp, jax.vmap, two_rows=True),
    "vjp(scan)": Mode("vjp", _vjp, inner=_scanned, two_rows=True),
    "vjp(checkpoint)": Mode("vjp", _vjp, inner=jax.checkpoint),
    "jacfwd": Mode("jacobian", _value, jax.jit, _partials(jax.jacfwd)),
    "jacrev": Mode("jacobian", _value, jax.jit, _partials(jax.jacrev)),
    "jacfwd(jacfwd)": Mode("hessian", _value, jax.jit, _partials(jax.jacfwd, jax.jacfwd)),
    "jacfwd(jacrev)": Mode("hessian", _value, jax.jit, _partials(jax.jacfwd, jax.jacrev)),
    "jacrev(jacfwd)": Mode("hessian", _value, jax.jit, _partials(jax.jacrev, jax.jacfwd)),
    "jacrev(jacrev)": Mode("hessian", _value, jax.jit, _partials(jax.jacrev, jax.jacrev)),
}

MODES: tuple[str, ...] = tuple(BY_NAME)
"""The names of the modes, each written as the code it runs; the last four are of order two."""
