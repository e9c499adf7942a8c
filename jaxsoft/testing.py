"""Checks of derivatives in every differentiation mode, and errors in units of eps.

For functions with a rule of their own (`jax.custom_jvp`, `jax.custom_vjp`,
`jaxsoft.jvp_from_vjp`), which can be right in one mode and wrong in another.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float64, PyTree, Shaped

Wide = Float64[np.ndarray, "..."]
Named = dict[str, Any]
# A function of differentiated leaves and of held leaves that returns its floating leaves, by name.
Function = Callable[[Named, Named], Named]

# Public as `jax.enable_x64` in newer versions of jax, which have dropped the older name.
_enable_x64: Callable[[bool], AbstractContextManager[Any]] = (
    jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
).enable_x64

# --------------------------------------------------------------------------- error in eps


def error_in_eps(
    actual: Any, exact: Any, *, scale: Any = None, dtype: DTypeLike | None = None
) -> Wide:
    """Returns the error of every entry in units of the rounding of its dtype.

        error = abs(actual - exact) / (eps * abs(exact)),    or over eps * scale

    A correctly rounded number has an error of at most 1/2.

    Args:
        actual: the computed numbers, an array of a floating dtype.
        exact: what they should be, of the same shape or a scalar: an array, or a nested list or
            object array of `mpmath` or other numbers. Those are subtracted in their own
            arithmetic, so that no digit of theirs is lost.
        scale: the magnitude to measure against instead of abs(exact), of the same shape or a
            scalar.
        dtype: the dtype whose eps counts, when it is not that of `actual`.

    Returns:
        The errors, a float64 array shaped like `actual`.

    Raises:
        TypeError: `actual` or `dtype` is not floating, or `exact` or `scale` is not real.
        ValueError: `exact` or `scale` has another shape, or `scale` is negative or NaN.

    Numerics:
        0 where both are NaN or the same infinity; inf where they are not alike, and where the
        actual number differs from an exact 0 (or the scale is 0). Below `tiny`, the smallest
        normal number, where floating numbers lie no closer together, errors are measured against
        `tiny`. There hardware may replace a number by 0: with abs(exact) < tiny, an error below
        `tiny` counts as error / tiny, less than 1. Not so in float16, whose small numbers are
        ordinary probabilities and are not replaced.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft.testing import error_in_eps
        >>> print(error_in_eps(jnp.array([1.0, 2.0, 0.5], jnp.bfloat16), [1.0, 2.0625, 0.5]))
        [0.         3.87878788 0.        ]
    """
    given = np.asarray(actual)
    unit = given.dtype if dtype is None else jnp.dtype(dtype)
    for argument, found in (("actual", given.dtype), ("dtype", unit)):
        if not jnp.issubdtype(found, jnp.floating):
            raise TypeError(f"error_in_eps: {argument} must be of a floating dtype, got {found}")
    wanted = _numbers("exact", exact, given.shape)
    against = abs(wanted) if scale is None else _numbers("scale", scale, given.shape)
    if scale is not None and not np.all(against >= 0):
        raise ValueError("error_in_eps: scale must be 0 or larger, got a negative number or NaN")

    got = given.astype(np.float64).ravel()
    rounded = wanted.astype(np.float64)
    finite = np.isfinite(got) & np.isfinite(rounded)
    alike = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    eps, tiny = float(jnp.finfo(unit).eps), float(jnp.finfo(unit).tiny)
    with np.errstate(all="ignore"):
        got = np.where(finite, got, 0).astype(wanted.dtype)
        difference = abs(got - np.where(finite, wanted, 0))
        error = difference / np.maximum(against, tiny) / eps
        error = np.where((against == 0) & (difference != 0), math.inf, error)
        # Types with the exponents of float32 or more, so not float16.
        if tiny < 2.0**-100:
            replaced = (abs(wanted) < tiny) & (difference < tiny)
            error = np.where(replaced, np.minimum(error, difference / tiny), error)
        error = np.where(finite, error, np.where(alike, 0.0, math.inf))
        return error.astype(np.float64).reshape(given.shape)


def _numbers(argument: str, value: Any, shape: tuple[int, ...]) -> Shaped[np.ndarray, " n"]:
    """Returns numbers as a flat array: of Python objects, or of the widest float there is."""
    numbers = np.asarray(value)
    if numbers.dtype != object:
        if not jnp.issubdtype(numbers.dtype, jnp.floating) and numbers.dtype.kind not in "biu":
            raise TypeError(f"error_in_eps: {argument} must be real, got dtype {numbers.dtype}")
        numbers = numbers.astype(np.longdouble)
    if numbers.shape not in ((), shape):
        raise ValueError(
            f"error_in_eps: {argument} must have the shape of actual, {shape}, or be a scalar, "
            f"got shape {numbers.shape}"
        )
    return np.broadcast_to(numbers, shape).ravel()


# --------------------------------------------------------------------------- modes
# What a mode runs, on (live, held, tangents, cotangents). It returns blocks by name.
Run = Callable[[Named, Named, Named, Named], Named]


def _value(f: Function) -> Run:
    return lambda live, held, tangents, cotangents: f(live, held)


def _jvp(f: Function) -> Run:
    def run(live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
        out, out_tangents = jax.jvp(lambda x: f(x, held), (live,), (tangents,))
        return out | _prefixed("tangent of ", out_tangents)

    return run


def _linearize(f: Function) -> Run:
    def run(live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
        out, pushforward = jax.linearize(lambda x: f(x, held), live)
        return out | _prefixed("tangent of ", pushforward(tangents))

    return run


def _vjp(f: Function) -> Run:
    def run(live: Named, held: Named, tangents: Named, cotangents: Named) -> Named:
        out, pullback = jax.vjp(lambda x: f(x, held), live)
        return out | _prefixed("cotangent of ", pullback(cotangents)[0])

    return run


def _prefixed(prefix: str, named: Named) -> Named:
    return {prefix + name: leaf for name, leaf in named.items()}


def _scanned(f: Function) -> Function:
    return lambda live, held: jax.lax.scan(lambda _, row: (None, f(*row)), None, (live, held))[1]


def _partials(derivative: Callable[..., Any], f: Function) -> Function:
    """The derivative of each result by each leaf, apart for each dtype: JAX would join them."""

    def restricted(live: Named, held: Named, results: Named, by: Named) -> Named:
        def among(leaves: Named) -> Named:
            out = f(live | leaves, held)
            return {name: out[name] for name in results}

        return {
            _partial(name, leaf): block
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


def _partial(result: str, by: str) -> str:
    return f"∂{result}/∂{by}"


def _jacobian(derivative: Callable[..., Any]) -> Callable[[Function], Run]:
    return lambda f: jax.jit(_value(_partials(derivative, f)))


def _hessian(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[[Function], Run]:
    return lambda f: jax.jit(_value(_partials(outer, _partials(inner, f))))


@dataclass(frozen=True)
class _Mode:
    blocks: Literal["value", "jvp", "vjp", "jacobian", "hessian"]
    build: Callable[[Function], Run]
    two_rows: bool = False


_MODES = {
    "value": _Mode("value", _value),
    "jit": _Mode("value", lambda f: jax.jit(_value(f))),
    "vmap": _Mode("value", lambda f: jax.vmap(_value(f)), two_rows=True),
    "jvp": _Mode("jvp", _jvp),
    "linearize": _Mode("jvp", _linearize),
    "jit(jvp)": _Mode("jvp", lambda f: jax.jit(_jvp(f))),
    "vmap(jvp)": _Mode("jvp", lambda f: jax.vmap(_jvp(f)), two_rows=True),
    "jvp(scan)": _Mode("jvp", lambda f: _jvp(_scanned(f)), two_rows=True),
    "jvp(checkpoint)": _Mode("jvp", lambda f: _jvp(jax.checkpoint(f))),
    "vjp": _Mode("vjp", _vjp),
    "jit(vjp)": _Mode("vjp", lambda f: jax.jit(_vjp(f))),
    "vmap(vjp)": _Mode("vjp", lambda f: jax.vmap(_vjp(f)), two_rows=True),
    "vjp(scan)": _Mode("vjp", lambda f: _vjp(_scanned(f)), two_rows=True),
    "vjp(checkpoint)": _Mode("vjp", lambda f: _vjp(jax.checkpoint(f))),
    "jacfwd": _Mode("jacobian", _jacobian(jax.jacfwd)),
    "jacrev": _Mode("jacobian", _jacobian(jax.jacrev)),
    "jacfwd(jacfwd)": _Mode("hessian", _hessian(jax.jacfwd, jax.jacfwd)),
    "jacfwd(jacrev)": _Mode("hessian", _hessian(jax.jacfwd, jax.jacrev)),
    "jacrev(jacfwd)": _Mode("hessian", _hessian(jax.jacrev, jax.jacfwd)),
    "jacrev(jacrev)": _Mode("hessian", _hessian(jax.jacrev, jax.jacrev)),
}

MODES: tuple[str, ...] = tuple(_MODES)
"""The names of the modes, each written as the code it runs; the last four are of order two."""

# --------------------------------------------------------------------------- the check


def assert_derivatives(
    fun: Callable[..., PyTree],
    *args: PyTree,
    reference: Callable[..., PyTree] | None = None,
    argnums: int | Sequence[int] | None = None,
    modes: Sequence[str] | None = None,
    order: int = 2,
    tolerance: int | float | None = None,
    least_scale: int | float = 0.0,
) -> dict[str, float]:
    """Asserts that a function and its derivatives are right in every differentiation mode.

    All blocks (the values, a product J v or Jᵀ g, ∂out/∂args, ∂²out/∂args∂args) are compared with
    those that `jax.jacfwd` takes of the reference in float64:

        error = abs(block - exact) / (eps * max(abs(exact))) <= tolerance

    with the eps of the block's own dtype. For J v the scale is max(abs(J) abs(v)), and likewise
    for Jᵀ g; v and g are fixed and pseudo-random. The modes with "vmap" and "scan" run over two
    rows, the arguments and 3/4 of them.

    More modes come by composition: `assert_derivatives(jax.checkpoint(fun), x)` tests order two
    under `jax.checkpoint`, and `assert_derivatives(jax.grad(fun), x)` order three.

    Args:
        fun: the function; its arguments and results are pytrees. Results that are not floating
            are ignored.
        args: its arguments, small ones: whole derivatives of order two are built. Leaves that are
            not floating are held fixed; arrays are traced, Python integers stay as they are.
        reference: a function of the same arguments, right in float64. Without one, the exact
            blocks are central differences of `fun` in float64, which trust no rule of `fun`. For
            smooth functions and arguments near 1 they are good to 1e-9: therefore float64 blocks
            are then measured in eps of float32, and none against less than max(abs(out)) / 8192.
        argnums: the arguments to differentiate by. Default: all that have floating leaves.
        modes: names from `MODES`. Default: all up to `order`.
        order: 1 leaves out the derivatives of order two.
        tolerance: the largest error allowed, in eps, for both orders. Default: 64, but 8 for blocks
            of 16 bits or fewer, where 64 eps would be half of the number.
        least_scale: a block without an entry as large as this is measured against it. Derivatives
            that vanish but for rounding need it.

    Returns:
        The largest error of each mode, in eps.

    Raises:
        AssertionError: a mode is wrong or raises. The message is a table of all such modes, each
            with the number of wrong entries and the worst of them.
        TypeError: `fun` or `reference` is not callable, a leaf is not a real array or number, or
            an option has the wrong type.
        ValueError: there is nothing to differentiate, the results of `reference` have other
            shapes than those of `fun`, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft.testing import assert_derivatives
        >>> def softplus(x):
        ...     return jnp.logaddexp(x, 0.0)
        >>> errors = assert_derivatives(softplus, jnp.array([-2.0, 0.5, 3.0]))
        >>> print(len(errors), max(errors.values()) < 4)
        20 True
        >>> @jax.custom_jvp
        ... def cube(x):
        ...     return x**3
        >>> cube.defjvps(lambda tangent, out, x: 2 * x**2 * tangent)
        >>> assert_derivatives(cube, jnp.arange(1.0, 3.0), modes=["value", "jacfwd"])
        Traceback (most recent call last):
        AssertionError: assert_derivatives: cube is wrong in 1 of 2 modes
          mode    eps      wrong  at                    got  wanted
          jacfwd  2.8e+06  2/4    ∂out/∂args[0] [1, 1]  8    12
          right: value
          wanted is by central differences in float64; a reference would be sharper
    """
    chosen = _checked_options(fun, reference, modes, order, tolerance, least_scale)
    leaves, live, treedef = _checked_arguments(args, argnums)
    held = {n: leaf for n, leaf in leaves.items() if isinstance(leaf, jax.Array) and n not in live}

    def named(function: Callable[..., PyTree]) -> Function:
        def on_leaves(live: Named, held: Named) -> Named:
            out = function(*jax.tree.unflatten(treedef, (leaves | live | held).values()))
            paths = jax.tree_util.tree_leaves_with_path(out)
            names = {"out" + jax.tree_util.keystr(path): jnp.asarray(leaf) for path, leaf in paths}
            return {name: leaf for name, leaf in names.items() if _is_floating(leaf)}

        return on_leaves

    # Without a reference the values of `fun` itself are differentiated, by differences.
    differences = reference is None
    f, exact_f = named(fun), named(fun if reference is None else reference)
    results = jax.eval_shape(f, live, held)
    _require(bool(results), ValueError, "fun must return a floating array, got none")
    shapes, exact_shapes = _shapes(results), _shapes_in_float64(exact_f, live, held)
    text = f"reference must return {shapes} as fun does, got {exact_shapes}"
    _require(exact_shapes == shapes, ValueError, text)

    tangents, cotangents = _directions(live), _directions(results)
    rows = [live, {name: leaf * 0.75 for name, leaf in live.items()}]
    highest = 2 if any(_MODES[name].blocks == "hessian" for name in chosen) else 1
    exact = _exact(exact_f, rows, held, highest, differences)
    if differences:
        least_scale = max(
            least_scale, *(_largest(v) / 8192 for row in exact for v in row[0].values())
        )
    one_row, other_row = (_expected(row, tangents, cotangents) for row in exact)
    two_rows = {
        n: jax.tree.map(_Exact.stacked, one_row[n], blocks) for n, blocks in other_row.items()
    }
    once = (live, held, tangents, cotangents)
    twice = jax.tree.map(lambda *leaf: jnp.stack(leaf), once, (rows[1], *once[1:]))

    errors: dict[str, float] = {}
    table: list[tuple[str, ...]] = []
    for name in chosen:
        mode = _MODES[name]
        arguments, expected = (twice, two_rows) if mode.two_rows else (once, one_row)
        try:
            blocks = {n: np.asarray(block) for n, block in mode.build(f)(*arguments).items()}
        except Exception as error:  # Whatever a mode raises is what is wrong with it.
            text = (str(error).strip() or "no message").splitlines()[0]
            errors[name] = math.inf
            table.append((name, "raises", f"{_kind(error)}: {text}"))
        else:
            wanted = expected[mode.blocks]
            errors[name], wrong = _compared(blocks, wanted, tolerance, least_scale, differences)
            table += [(name, *row) for row in wrong]
    if table:
        raise AssertionError(_report(fun, chosen, table, differences))
    return errors


# --------------------------------------------------------------------------- what is exact


@dataclass(frozen=True)
class _Exact:
    """An exact block, and for each entry the magnitude that its error is measured against."""

    entries: Wide
    scale: Wide

    def stacked(self, other: "_Exact") -> "_Exact":
        return _Exact(np.stack([self.entries, other.entries]), np.stack([self.scale, other.scale]))


def _exact(
    f: Function, rows: list[Named], held: Named, highest: int, differences: bool
) -> list[list[Named]]:
    """The values and the derivatives of each row in float64; order two of the first row alone."""
    exact: list[list[Named]] = [[] for _ in rows]
    with _enable_x64(True):
        g: Function = jax.jit(f)
        for order in range(highest + 1):
            for row in range(len(rows) if order < 2 else 1):
                exact[row].append(_float64(g(_float64(rows[row]), _float64(held))))
            g = _differences(g) if differences else jax.jit(_partials(jax.jacfwd, g))
    return exact


# f'(x) = Σ w_k (f(x + kh) - f(x - kh)) / (60 h), with w = 45, -9, 1, is off by h⁶ f⁽⁷⁾(x) / 140 and
# by the rounding of f, eps / h. At order two the latter counts twice: h = 1/128 suits both.
def _differences(f: Function) -> Function:
    def blocks(live: Named, held: Named) -> Named:
        pairs = [(name, value, by) for name, value in f(live, held).items() for by in live]
        out = {_partial(n, by): np.zeros((*v.shape, *live[by].shape)) for n, v, by in pairs}
        for by, leaf in live.items():
            for index in np.ndindex(leaf.shape):
                # Smaller steps for small arguments, which may lie near the edge of the domain.
                step = float(np.clip(abs(leaf[index]), 1 / 16, 1)) / 128
                for k, weight in ((1, 45), (-1, -45), (2, -9), (-2, 9), (3, 1), (-3, -1)):
                    moved = leaf.copy()
                    moved[index] += k * step
                    for name, value in f(live | {by: moved}, held).items():
                        term = np.asarray(value) * (weight / (60 * step))
                        out[_partial(name, by)][(..., *index)] += term
        return out

    return blocks


def _expected(exact: list[Named], tangents: Named, cotangents: Named) -> dict[str, Named]:
    """The exact blocks for every kind of mode."""
    v, g = _float64(tangents), _float64(cotangents)
    values, jacobian, *higher = [
        {name: _block(entries, abs(entries)) for name, entries in blocks.items()}
        for blocks in exact
    ]
    of = {(o, i): jacobian[_partial(o, i)].entries for o in g for i in v}
    pushed = {o: _product([(of[o, i], v[i], v[i].ndim) for i in v]) for o in g}
    pulled = {i: _product([(g[o], of[o, i], g[o].ndim) for o in g]) for i in v}
    kinds = {
        "value": values,
        "jvp": values | _prefixed("tangent of ", pushed),
        "vjp": values | _prefixed("cotangent of ", pulled),
        "jacobian": jacobian,
    }
    return kinds | ({"hessian": higher[0]} if higher else {})


def _product(terms: list[tuple[Wide, Wide, int]]) -> _Exact:
    with np.errstate(invalid="ignore"):
        magnitude = sum(np.tensordot(abs(a), abs(b), axes) for a, b, axes in terms)
        return _block(sum(np.tensordot(a, b, axes) for a, b, axes in terms), magnitude)


def _block(entries: Any, magnitude: Any) -> _Exact:
    return _Exact(np.asarray(entries), np.full(np.shape(entries), _largest(magnitude)))


def _largest(entries: Any) -> float:
    return float(np.max(abs(entries), initial=0.0, where=np.isfinite(entries)))


def _directions(like: Named) -> Named:
    """Fixed pseudo-random numbers of magnitude 1/2 to 3/2, so that every entry counts."""
    random = np.random.default_rng(0)

    def direction(leaf: Any) -> Array:
        numbers = random.uniform(0.5, 1.5, leaf.shape) * random.choice([-1.0, 1.0], leaf.shape)
        return jnp.asarray(numbers, leaf.dtype)

    return {name: direction(leaf) for name, leaf in like.items()}


# --------------------------------------------------------------------------- what is wrong


def _compared(
    blocks: Named,
    expected: Named,
    tolerance: int | float | None,
    least_scale: int | float,
    differences: bool,
) -> tuple[float, list[tuple[str, ...]]]:
    """Returns the largest error, and a row of the table for each wrong block."""
    largest = 0.0
    rows: list[tuple[str, ...]] = []
    for name, exact in expected.items():
        got = blocks[name]
        unit = np.float32 if differences and got.dtype == np.float64 else got.dtype
        scale = np.maximum(exact.scale, least_scale)
        errors = error_in_eps(got, exact.entries, scale=scale, dtype=unit)
        allowed = (8 if got.dtype.itemsize <= 2 else 64) if tolerance is None else tolerance
        largest = max(largest, float(np.max(errors, initial=0.0)))
        if np.any(errors > allowed):
            at = tuple(int(i) for i in np.unravel_index(np.argmax(errors), errors.shape))
            wrong = f"{np.count_nonzero(errors > allowed)}/{errors.size}"
            digits = 17 if unit == np.float64 else 9
            numbers = (f"{float(x[at]):.{digits}g}" for x in (got, exact.entries))
            rows.append((f"{errors[at]:.3g}", wrong, f"{name} {list(at) or ''}".strip(), *numbers))
    return largest, rows


def _report(
    fun: object, chosen: Sequence[str], table: list[tuple[str, ...]], differences: bool
) -> str:
    lines = [("mode", "eps", "wrong", "at", "got", "wanted"), *table]
    # The text of an exception stands in place of the numbers and takes no part in the columns.
    widths = [max(len(line[i]) for line in lines if i == 0 or len(line) > 3) for i in range(6)]
    failed = {line[0] for line in table}
    name = getattr(fun, "__name__", _kind(fun))
    text = [f"assert_derivatives: {name} is wrong in {len(failed)} of {len(chosen)} modes"]
    text += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text.append("right: " + (", ".join(mode for mode in chosen if mode not in failed) or "none"))
    if differences:
        text.append("wanted is by central differences in float64; a reference would be sharper")
    return "\n  ".join(text)


# --------------------------------------------------------------------------- arguments


def _checked_options(
    fun: Any, reference: Any, modes: Any, order: Any, tolerance: Any, least_scale: Any
) -> tuple[str, ...]:
    """Returns the names of the modes to run."""
    for name, value in (("fun", fun), ("reference", fun if reference is None else reference)):
        _require(callable(value), TypeError, f"{name} must be callable, got {_kind(value)}")
    for name, value in (("tolerance", tolerance), ("least_scale", least_scale)):
        if not (value is None and name == "tolerance"):
            number = isinstance(value, (int, float))
            _require(number, TypeError, f"{name} must be a number, got {_kind(value)}")
            allowed = 0 <= value < math.inf
            _require(allowed, ValueError, f"{name} must be finite and 0 or more, got {value}")
    _require(order in (1, 2), ValueError, f"order must be 1 or 2, got {order!r}")
    above = [name for name in MODES if order == 1 and _MODES[name].blocks == "hessian"]
    if modes is None:
        return tuple(name for name in MODES if name not in above)
    names = isinstance(modes, Sequence) and not isinstance(modes, str)
    _require(names, TypeError, f"modes must be a sequence of names, got {_kind(modes)}")
    _require(len(modes) > 0, ValueError, "modes must name a mode, got none")
    for name in modes:
        known = f"modes must be among {', '.join(MODES)}, got {name}"
        _require(name in MODES, ValueError, known)
        _require(name not in above, ValueError, f"modes must be of order {order}, got {name}")
    return tuple(modes)


def _checked_arguments(args: tuple[PyTree, ...], argnums: Any) -> tuple[Named, Named, Any]:
    """Returns all leaves by name, those to differentiate by, and the structure of `args`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(args)
    leaves: Named = {}
    floating: dict[int, Named] = {}
    for path, leaf in paths:
        name = "args" + jax.tree_util.keystr(path)
        leaves[name] = _checked_leaf(name, leaf)
        if _is_floating(leaves[name]):
            floating.setdefault(path[0].idx, {})[name] = leaves[name]
    _require(bool(floating), ValueError, "args must hold a floating array, got none")
    chosen = sorted(floating) if argnums is None else argnums
    numbers = chosen if isinstance(chosen, Sequence) else [chosen]
    wanted = f"argnums must be among {sorted(floating)}, which have floating leaves, got"
    _require(len(numbers) > 0, ValueError, f"{wanted} none")
    for number in numbers:
        integer = isinstance(number, int)
        _require(integer, TypeError, f"argnums must be integers, got {_kind(number)}")
        _require(number in floating, ValueError, f"{wanted} {number}")
    live = {name: leaf for number in numbers for name, leaf in floating[number].items()}
    return leaves, live, treedef


def _checked_leaf(name: str, leaf: Any) -> Any:
    """Returns the leaf as an array, but Python integers and booleans as they are."""
    if isinstance(leaf, (float, np.ndarray, np.generic)) and np.asarray(leaf).dtype.kind in "biufV":
        leaf = jnp.asarray(np.asarray(leaf))
    array = isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    got = getattr(leaf, "dtype", _kind(leaf))
    text = f"args must hold real arrays and numbers, got {got} at {name}"
    _require(array or isinstance(leaf, int), TypeError, text)
    return leaf


def _require(condition: bool, error: type[Exception], text: str) -> None:
    if not condition:
        raise error(f"assert_derivatives: {text}")


def _kind(value: object) -> str:
    return type(value).__name__


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating))


def _float64(tree: Any) -> Any:
    """Converts floating leaves, and leaves the others as they are."""
    return jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(np.float64) if _is_floating(leaf) else leaf, tree
    )


def _shapes_in_float64(f: Function, live: Named, held: Named) -> dict[str, tuple[int, ...]]:
    try:
        with _enable_x64(True):
            return _shapes(jax.eval_shape(f, _float64(live), _float64(held)))
    except Exception as error:
        error.add_note("assert_derivatives: raised by the reference (default: fun) in float64")
        raise


def _shapes(named: Named) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in named.items()}
