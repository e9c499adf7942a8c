"""`jvp_from_vjp` on every form of a rule, in every mode and to order three."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import jvp_from_vjp

X = jnp.array([-0.7, 0.3])
EXP = np.exp(np.float64(np.asarray(X)))


@pytest.fixture(
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["custom_vjp", "custom_vjp3"],
    autouse=True,
)
def _both_kinds_of_custom_vjp(request):
    """JAX means to replace `jax.custom_vjp`; the successor is behind a flag since jax 0.8.

    The tests that ask for both by name run on both in `make test` too.
    """
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


def exponential():
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    return f


def twice(y, ct):
    return (2 * y * ct,)


def calls_itself():
    f = exponential()

    def fwd(x):
        y = f(x)
        return y, y

    f.defvjp(fwd, twice)
    return f


def keeps_x_and_calls_itself_in_the_backward_rule():
    f = exponential()
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (2 * f(x) * ct,))
    return f


def calls_itself_within_jit():
    f = exponential()
    fwd = jax.jit(lambda x: (f(x), jax.jit(f)(x)))
    f.defvjp(fwd, twice)
    return f


def calls_itself_within_a_scan():
    f = exponential()

    def fwd(x):
        y = jax.lax.scan(lambda carry, _: (carry, f(x)), None, length=1)[1][0]
        return y, y

    f.defvjp(fwd, twice)
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
    f = exponential()

    def fwd(x):
        y = f(x.value)
        return y, y

    f.defvjp(fwd, twice, symbolic_zeros=True)
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

on_both_kinds = pytest.mark.parametrize(
    "_both_kinds_of_custom_vjp", [False, True], ids=["custom_vjp", "custom_vjp3"], indirect=True
)

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


@on_both_kinds
@pytest.mark.parametrize("rule", RULES)
def test_every_mode_to_order_three(rule):
    all_of_them = derivatives(jvp_from_vjp(RULES[rule]()))
    np.testing.assert_allclose(all_of_them(X[0]), EXP[0] * FACTORS, rtol=1e-6)


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


@on_both_kinds
def test_every_mode_under_vmap():
    f = calls_itself()
    try:
        jax.vmap(lambda x: jax.vmap(lambda y: f(x) + y)(X))(X)
    except TypeError:
        pytest.skip("this jax cannot batch the function twice as it is")  # 0.10, custom_vjp3
    all_of_them = jax.vmap(derivatives(jvp_from_vjp(f)))
    np.testing.assert_allclose(all_of_them(X), np.outer(EXP, FACTORS), rtol=1e-6)


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


# ------------------------------------------------------------------------ arguments and results


class Pair(NamedTuple):
    product: jax.Array
    count: int


def of_trees():
    """(scale, {"x": x, "none": None, "label": k}) to Pair(scale x + k, k)."""

    @jax.custom_vjp
    def f(scale, tree):
        return Pair(scale * tree["x"] + tree["label"], tree["label"])

    def fwd(scale, tree):
        return f(scale, tree), (scale, tree["x"])

    def bwd(residuals, cotangents):
        scale, x = residuals
        ct = cotangents.product
        return jnp.sum(2 * x * ct), {"x": 2 * scale * ct, "none": None, "label": None}

    f.defvjp(fwd, bwd)
    return f


@on_both_kinds
def test_trees_with_none_integers_and_named_tuples():
    g = jvp_from_vjp(of_trees())
    fun = lambda scale, x: g(scale, {"x": x, "none": None, "label": 3})
    out, tangents = jax.jvp(fun, (2.0, X), (1.0, jnp.ones(2)))
    assert isinstance(out, Pair)
    assert isinstance(tangents, Pair)
    np.testing.assert_allclose(out.product, 2 * X + 3, rtol=1e-6)
    np.testing.assert_allclose(tangents.product, 2 * (X + 2), rtol=1e-6)
    assert (int(out.count), tangents.count.dtype) == (3, jax.dtypes.float0)
    loss = lambda scale, x: fun(scale, x).product.sum()
    gradient = jax.grad(loss, (0, 1))
    of_scale, of_x = gradient(2.0, X)
    np.testing.assert_allclose(of_scale, 2 * X.sum(), rtol=1e-6)
    np.testing.assert_allclose(of_x, [4.0, 4.0], rtol=1e-6)
    blocks = jax.jit(jax.jacfwd(gradient, (0, 1)))(2.0, X)
    np.testing.assert_allclose(blocks[0][1], [2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(blocks[1][0], [2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("z", [1 + 2j, np.complex64(1 + 2j)], ids=["Python", "NumPy"])
def test_complex_numbers(z):
    g = jvp_from_vjp(calls_itself())
    value = np.exp(complex(z))
    np.testing.assert_allclose(g(z), value, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(g, (z,), (type(z)(1),)), [value, 2 * value], rtol=1e-6)
    derivatives = [
        jax.grad(g, holomorphic=True),
        jax.jacfwd(g, holomorphic=True),
        jax.grad(jax.grad(g, holomorphic=True), holomorphic=True),
        jax.jacfwd(jax.grad(g, holomorphic=True), holomorphic=True),
    ]
    actual = [derivative(z) for derivative in derivatives]
    np.testing.assert_allclose(actual, value * np.array([2, 2, 4, 4]), rtol=1e-6)


def test_python_numbers():
    g = jvp_from_vjp(calls_itself())
    np.testing.assert_allclose([g(1), g(True), g(1.0)], np.exp(1), rtol=1e-6)
    # Integers and booleans are held fixed.
    for number in (1, True):
        _, tangent = jax.jvp(g, (number,), (np.zeros((), jax.dtypes.float0),))
        assert float(tangent) == 0


@on_both_kinds
def test_keywords_and_static_arguments():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
    def f(name, x, power=1):
        """The documentation of f."""
        assert name == "name"
        return jnp.exp(x) * 10**power

    def fwd(name, x, power):
        y = f(name, x, power=power)
        return y, y

    f.defvjp(fwd, lambda name, power, y, ct: (2 * y * ct,))
    g = jvp_from_vjp(f)
    for fun in (
        lambda x: g("name", x),
        lambda x: g(x=x, name="name"),
        lambda x: g("name", x=x, power=1),
        jax.jit(lambda x: g("name", x, 1)),
    ):
        np.testing.assert_allclose(jax.hessian(fun)(X[0]), 40 * EXP[0], rtol=1e-6)
    assert (g.__name__, g.__doc__, g.__wrapped__.__wrapped__) == (f.__name__, f.__doc__, f)
    assert list(inspect.signature(g).parameters) == ["name", "x", "power"]


def test_a_function_with_a_rule_within():
    f = calls_itself()
    jvp_from_vjp(f)
    fun = jvp_from_vjp(lambda x: 3 * f(x))
    np.testing.assert_allclose(derivatives(fun)(X[0]), 3 * EXP[0] * FACTORS, rtol=1e-6)


def test_the_rule_may_be_defined_later_and_given_twice():
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    g, again = jvp_from_vjp(f), jvp_from_vjp(f)
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (2 * f(x) * ct,))
    for fun in (g, again):
        np.testing.assert_allclose(jax.hessian(fun)(X[0]), 4 * EXP[0], rtol=1e-6)


def test_a_jitted_rule_that_was_traced_for_the_function_given():
    f = calls_itself_within_jit()
    g = jvp_from_vjp(f)
    assert float(jax.grad(f)(0.0)) == 2
    assert float(jax.hessian(g)(0.0)) == 4


def test_the_function_given_stays_as_it_is():
    f = calls_itself()
    before = inspect.signature(f), f.__name__, type(f).__name__
    g = jvp_from_vjp(f)
    jax.hessian(g)(X[0])
    assert (inspect.signature(f), f.__name__, type(f).__name__) == before
    assert float(jax.grad(f)(X[0])) == float(jax.grad(g)(X[0]))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jacfwd(f)(X[0])


# ------------------------------------------------------------------------ errors

NOT_LINEAR = {
    "product": lambda ct: ct * ct,
    "function": jnp.sin,
    "clip": lambda ct: jnp.clip(ct, -1, 1),
    "where": lambda ct: jnp.where(ct > 0, ct, 0),
    "while": lambda ct: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, ct)
    )[1],
    "callback": lambda ct: jax.pure_callback(lambda ct: ct, ct, ct),
}


@pytest.mark.parametrize("form", NOT_LINEAR)
def test_a_rule_that_cannot_be_transposed(form):
    @jax.custom_vjp
    def my_function(x):
        return jnp.exp(x)

    my_function.defvjp(lambda x: (jnp.exp(x), None), lambda _, ct: (NOT_LINEAR[form](ct),))
    message = (
        r"^jvp_from_vjp: the backward rule of \S*my_function must be linear in the cotangent and "
        "built from operations that JAX can transpose"
    )
    g = jvp_from_vjp(my_function)
    for fun in (jax.grad(g), jax.jacfwd(g), jax.jit(jax.grad(g))):
        with pytest.raises(TypeError, match=message) as caught:
            fun(1.0)
        assert caught.value.__cause__ is not None


def test_errors_of_the_rule_itself_are_its_own():
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    f.defvjp(lambda x: (f(x), None), lambda _, ct: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        jax.grad(jvp_from_vjp(f))(1.0)
    # And the next rule finds everything as it was.
    np.testing.assert_allclose(jax.hessian(jvp_from_vjp(calls_itself()))(0.0), 4.0)
