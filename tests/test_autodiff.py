"""`jvp_from_vjp` on every form of a rule, in every mode and to order three."""

import functools
import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import jvp_from_vjp

X = jnp.array([-0.7, 0.3])
EXP = np.exp(np.float64(np.asarray(X)))


@pytest.fixture(params=[False, True], ids=["custom_vjp", "custom_vjp3"], autouse=True)
def _both_kinds_of_custom_vjp(request):
    """JAX means to replace `jax.custom_vjp`; the successor is behind a flag since jax 0.8."""
    if not hasattr(jax.config, "jax_custom_vjp3"):
        if request.param:
            pytest.skip("this jax has one kind")
        yield
        return
    before = jax.config.jax_custom_vjp3
    jax.config.update("jax_custom_vjp3", request.param)
    yield
    jax.config.update("jax_custom_vjp3", before)


# Every rule below states the derivative of exp to be 2 exp, so that the k-th is 2^k exp. Where a
# mode differentiates the formula instead of the rule, a factor is missing.


def calls_itself():
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    def fwd(x):
        y = f(x)
        return y, y

    f.defvjp(fwd, lambda y, ct: (2 * y * ct,))
    return f


def keeps_x_and_calls_itself_in_the_backward_rule():
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (2 * f(x) * ct,))
    return f


def calls_itself_within_jit():
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    fwd = jax.jit(lambda x: (f(x), jax.jit(lambda x: f(x))(x)))
    f.defvjp(fwd, lambda y, ct: (2 * y * ct,))
    return f


def calls_itself_within_a_scan():
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    def fwd(x):
        y = jax.lax.scan(lambda carry, _: (carry, f(x)), None, length=1)[1][0]
        return y, y

    f.defvjp(fwd, lambda y, ct: (2 * y * ct,))
    return f


def calls_another_one():
    other = calls_itself()
    jvp_from_vjp(other)

    @jax.custom_vjp
    def f(x):
        return other(x)

    f.defvjp(lambda x: (other(x), x), lambda x, ct: (2 * other(x) * ct,))
    return f


def with_symbolic_zeros():
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    def fwd(x):
        y = f(x.value)
        return y, y

    f.defvjp(fwd, lambda y, ct: (2 * y * ct,), symbolic_zeros=True)
    return f


RULES = {
    rule.__name__: rule
    for rule in (
        calls_itself,
        keeps_x_and_calls_itself_in_the_backward_rule,
        calls_itself_within_jit,
        calls_itself_within_a_scan,
        calls_another_one,
        with_symbolic_zeros,
    )
}

MODES = {
    "forward": jax.jacfwd,
    "reverse": jax.jacrev,
    "linearize": lambda fun: lambda x: jax.linearize(fun, x)[1](jnp.ones_like(x)),
}
# From the inside out.
NESTINGS = (
    ("forward",),
    ("reverse",),
    ("linearize",),
    ("forward", "forward"),
    ("forward", "reverse"),
    ("reverse", "forward"),
    ("reverse", "reverse"),
    ("forward", "reverse", "forward"),
    ("reverse", "forward", "reverse"),
)
FACTORS = np.array([2.0 ** len(nesting) for nesting in NESTINGS])


def nested(fun, nesting):
    return functools.reduce(lambda derivative, mode: MODES[mode](derivative), nesting, fun)


def derivatives(fun):
    """Those of all nestings, in one program."""
    return jax.jit(lambda x: jnp.stack([nested(fun, nesting)(x) for nesting in NESTINGS]))


@pytest.mark.parametrize("rule", RULES)
def test_every_mode_to_order_three(rule):
    # A batch shows each entry of the stack under vmap too.
    all_of_them = jax.vmap(derivatives(jvp_from_vjp(RULES[rule]())))
    np.testing.assert_allclose(all_of_them(X), np.outer(EXP, FACTORS), rtol=1e-6)


def test_every_mode_without_jit():
    # JAX then differentiates as it evaluates, and refuses at once.
    g = jvp_from_vjp(calls_itself())
    actual = [nested(g, nesting)(X[0]) for nesting in NESTINGS]
    np.testing.assert_allclose(actual, EXP[0] * FACTORS, rtol=1e-6)


def loop(fun):
    return lambda x: jax.lax.scan(lambda carry, x: (carry, fun(x)), None, x[None])[1].sum()


FORMS = {"checkpoint": jax.checkpoint, "scan": loop, "both": lambda fun: loop(jax.checkpoint(fun))}


@pytest.mark.parametrize("form", FORMS)
def test_every_mode_within(form):
    fun = FORMS[form](jvp_from_vjp(calls_itself()))
    np.testing.assert_allclose(derivatives(fun)(X[0]), EXP[0] * FACTORS, rtol=1e-6)


def test_optimize_remat_as_far_as_jax_goes():
    # JAX has no reverse mode of it beyond order one.
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    def fwd(x):
        y = f(x)
        return y, y

    f.defvjp(fwd, lambda y, ct: (2 * y * ct,), optimize_remat=True)
    g = jvp_from_vjp(f)
    for nesting in NESTINGS[:4], NESTINGS[5:6]:
        for modes in nesting:
            np.testing.assert_allclose(
                jax.jit(nested(g, modes))(X[0]), 2 ** len(modes) * EXP[0], rtol=1e-6
            )
