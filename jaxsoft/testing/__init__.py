"""Checks of derivatives in every differentiation mode, and errors in units of eps.

For functions with a rule of their own (`jax.custom_jvp`, `jax.custom_vjp`,
`jaxsoft.jvp_from_vjp`), which can be right in one mode and wrong in another.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxsoft.testing._arguments import checked_arguments, checked_options, kind, require
from jaxsoft.testing._comparison import compared, error_in_eps, report
from jaxsoft.testing._exact import directions, exact_derivatives, expected_blocks, largest
from jaxsoft.testing._modes import BY_NAME, MODES
from jaxsoft.testing._precision import Function, Named, is_floating, shapes_in_float64

__all__ = ["MODES", "assert_derivatives", "error_in_eps"]


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
    chosen = checked_options(fun, reference, modes, order, tolerance, least_scale)
    leaves, live, treedef = checked_arguments(args, argnums)
    held = {n: leaf for n, leaf in leaves.items() if isinstance(leaf, jax.Array) and n not in live}

    def named(function: Callable[..., PyTree]) -> Function:
        def on_leaves(live: Named, held: Named) -> Named:
            out = function(*jax.tree.unflatten(treedef, (leaves | live | held).values()))
            paths = jax.tree_util.tree_leaves_with_path(out)
            names = {"out" + jax.tree_util.keystr(path): jnp.asarray(leaf) for path, leaf in paths}
            return {name: leaf for name, leaf in names.items() if is_floating(leaf)}

        return on_leaves

    # Without a reference the values of `fun` itself are differentiated, by differences.
    differences = reference is None
    f, exact_f = named(fun), named(fun if reference is None else reference)
    results = jax.eval_shape(f, live, held)
    require(results, ValueError, "fun must return a floating array, got none")
    own, got = jax.tree.map(np.shape, results), shapes_in_float64(exact_f, live, held)
    require(got == own, ValueError, f"reference must return {own} as fun does, got {got}")

    tangents, cotangents = directions(live), directions(results)
    rows = [live, {name: leaf * 0.75 for name, leaf in live.items()}]
    highest = 2 if any(BY_NAME[name].blocks == "hessian" for name in chosen) else 1
    exact = exact_derivatives(exact_f, rows, held, highest, differences)
    if differences:
        scales = [largest(leaf) / 8192 for values, *_ in exact for leaf in values.values()]
        least_scale = max(least_scale, *scales)
    one_row, other_row = (expected_blocks(row, tangents, cotangents) for row in exact)
    stacked = lambda *rows: np.stack(rows)
    two_rows = {n: jax.tree.map(stacked, one_row[n], other_row[n]) for n in other_row}
    once = (live, held, tangents, cotangents)
    twice = jax.tree.map(lambda *leaf: jnp.stack(leaf), once, (rows[1], *once[1:]))

    errors: dict[str, float] = {}
    table: list[tuple[str, ...]] = []
    for name in chosen:
        mode = BY_NAME[name]
        arguments, expected = (twice, two_rows) if mode.two_rows else (once, one_row)
        try:
            blocks = {n: np.asarray(block) for n, block in mode.build(f)(*arguments).items()}
        except Exception as error:  # Any exception makes the mode wrong.
            text = (str(error).strip() or "no message").splitlines()[0]
            errors[name] = math.inf
            table.append((name, "raises", f"{kind(error)}: {text}"))
        else:
            wanted = expected[mode.blocks]
            errors[name], wrong = compared(blocks, wanted, tolerance, least_scale, differences)
            table += [(name, *row) for row in wrong]
    if table:
        raise AssertionError(report(fun, chosen, table, differences))
    return errors
