"""`jaxsoft.testing`: each kind of wrong derivative is found, and in the modes where it is wrong."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call

from jaxsoft.testing import MODES, assert_derivatives, error_in_eps
from jaxsoft.testing._modes import BY_NAME
from jaxsoft.testing._precision import enable_x64

VALUES = {"value", "jit", "vmap"}
ORDER_TWO = set(MODES[-4:])
# A vmap of the derivative or a nesting of order two is forward when any part of it is.
FORWARD = {mode for mode in MODES if "jvp" in mode or "jacfwd" in mode} | {"linearize"}
X = np.array([0.5, -1.25, 2.0], np.float32)


def failures(fun, *args, **options):
    """Returns the rows of the table of failures, by mode."""
    with pytest.raises(AssertionError) as caught:
        assert_derivatives(fun, *args, **options)
    text = str(caught.value)
    print(text)
    rows = {}
    for line in text.splitlines()[2:]:
        if line.startswith("  right:"):
            break
        mode, rest = line.split(maxsplit=1)
        rows.setdefault(mode, []).append(rest)
    right = [mode.strip() for mode in line.removeprefix("  right:").split(",")]
    assert set(right) - {"none"} == set(options.get("modes", MODES)) - set(rows)
    assert f"is wrong in {len(rows)} of {len(options.get('modes', MODES))} modes" in text
    return rows


# --------------------------------------------------------------------------- error in eps

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
TINY = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


def array(numbers, dtype):
    return np.asarray(numbers, jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", EPS)
def test_error_in_eps_of_neighbours(dtype):
    eps = EPS[dtype]
    actual = array([1 + eps, 1.0, -2 - 2 * eps, 0.0, 1 - eps / 2, 2 - eps], dtype)
    exact = np.array([1.0, 1.0, -2.0, 0.0, 1.0, 2.0])
    wanted = [1.0, 0.0, 1.0, 0.0, 0.5, 0.5]
    for given in (actual, jnp.asarray(actual) if dtype != "float64" else actual):
        error = error_in_eps(given, exact)
        assert isinstance(error, np.ndarray)
        assert error.dtype == np.float64
        np.testing.assert_array_equal(error, wanted)
    # A third of eps lies between the numbers of the type.
    with mpmath.workdps(50):
        exact = mpmath.mpf(1.5) + mpmath.mpf(eps) / 3
    error = error_in_eps(array([1.5, 1.5], dtype), exact)
    np.testing.assert_allclose(error, 1 / (4.5 + eps), rtol=1e-15)


@pytest.mark.parametrize("dtype", EPS)
def test_error_in_eps_of_infinities_nan_and_zero(dtype):
    inf, nan = math.inf, math.nan
    cases = [
        (inf, inf, 0),
        (-inf, -inf, 0),
        (nan, nan, 0),
        (inf, -inf, inf),
        (inf, nan, inf),
        (nan, inf, inf),
        (1.0, nan, inf),
        (nan, 1.0, inf),
        (inf, 1.0, inf),
        (1.0, inf, inf),
        (0.0, 0.0, 0),
        (-0.0, 0.0, 0),
        (1.0, 0.0, inf),
        (0.0, 1.0, 1 / EPS[dtype]),
    ]
    actual, exact, wanted = zip(*cases, strict=True)
    for numbers in (exact, [mpmath.mpf(x) for x in exact]):
        np.testing.assert_array_equal(error_in_eps(array(actual, dtype), numbers), wanted)


@pytest.mark.parametrize("dtype", EPS)
def test_error_in_eps_below_the_smallest_normal_number(dtype):
    eps, tiny = EPS[dtype], TINY[dtype]
    replaced = dtype != "float16"  # small numbers may become 0
    actual = array([0.0, 0.0, tiny * eps, tiny, 0.0, 2 * tiny], dtype)
    least = mpmath.mpf(tiny)
    exact = [least / 2, least * eps / 4, least * eps, least / 4, least, 0 * least]
    wanted = [
        0.5 if replaced else 0.5 / eps,
        0.25 * eps if replaced else 0.25,
        0,
        0.75 if replaced else 0.75 / eps,
        1 / eps,
        math.inf,
    ]
    np.testing.assert_array_equal(error_in_eps(actual, exact), wanted)
    # In float16, whose small numbers are probabilities, 0 in place of 1/70000 is an error.
    uniform = error_in_eps(array([0.0, 1 / 70000], dtype), 1 / 70000)
    assert uniform[0] > 100
    assert uniform[1] <= 1
    # An exact number far below the range of the type is no error.
    assert error_in_eps(array(0.0, dtype), mpmath.mpf("1e-5000")) < 1e-300


def test_error_in_eps_does_not_overflow():
    largest = np.finfo(np.float64).max
    error = error_in_eps(np.array([largest, -largest]), np.array([largest, largest]))
    np.testing.assert_array_equal(error, [0, 2 / EPS["float64"]])


def test_error_in_eps_keeps_the_digits_of_mpmath():
    with mpmath.workdps(50):
        exact = [mpmath.mpf(1) / 3, mpmath.exp(1), -mpmath.pi]
    actual = np.array([1 / 3, math.e, -math.pi])
    error = error_in_eps(actual, exact)
    # 1/3 rounds to 6004799503160661 / 2**54, which is 1/3 - 2**-54/3; the other two are tables'.
    assert error[0] == pytest.approx(2.0**-54 / EPS["float64"], rel=1e-12)
    assert error[1] == pytest.approx(1.4456468917292502e-16 / math.e / EPS["float64"], rel=1e-12)
    assert error[2] == pytest.approx(1.2246467991473532e-16 / math.pi / EPS["float64"], rel=1e-12)
    # Rounded to float64 first, none of these errors would be left.
    np.testing.assert_array_equal(error_in_eps(actual, [float(x) for x in exact]), 0)
    matrix = np.array([exact, exact], dtype=object)
    np.testing.assert_array_equal(error_in_eps(np.stack([actual, actual]), matrix)[1], error)


def test_error_in_eps_with_a_scale_and_another_dtype():
    actual = np.array([1.0, 0.5, 1e-3], np.float32)
    error = error_in_eps(actual, np.zeros(3), scale=2.0)
    np.testing.assert_allclose(error, np.float64(actual) / 2 / EPS["float32"])
    error = error_in_eps(actual, np.zeros(3), scale=[mpmath.mpf(1), 0, 4])
    np.testing.assert_allclose(error, np.array([1, math.inf, np.float64(actual[2]) / 4]) * 2.0**23)
    error = error_in_eps(np.array([1 + 2.0**-7, 2.0]), [1.0, 2.0], dtype=jnp.bfloat16)
    np.testing.assert_array_equal(error, [1, 0])
    assert error_in_eps(1.0, 1.0).shape == ()
    assert error_in_eps(np.zeros((2, 0)), np.zeros((2, 0))).shape == (2, 0)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "actual must be of a floating dtype, got int32", (np.int32(1), 1.0), {}),
        (TypeError, "dtype must be of a floating dtype, got int32", (X, X), {"dtype": "int32"}),
        (TypeError, "exact must be real, got dtype <U1", (X, "a"), {}),
        (TypeError, "exact must be real, got dtype complex128", (X, 1j), {}),
        (TypeError, "scale must be real, got dtype complex128", (X, X), {"scale": 1j}),
        (
            ValueError,
            "exact must have the shape of actual, (3,), or be a scalar, got shape (1,)",
            (X, X[:1]),
            {},
        ),
        (
            ValueError,
            "scale must have the shape of actual, (3,), or be a scalar, got shape (2, 3)",
            (X, X),
            {"scale": np.ones((2, 3))},
        ),
        (
            ValueError,
            "scale must be 0 or larger, got a negative number or NaN",
            (X, X),
            {"scale": np.array([1.0, math.nan, 1.0])},
        ),
    ],
)
def test_bad_input_of_error_in_eps(error, message, args, options):
    with pytest.raises(error) as caught:
        inspect.unwrap(error_in_eps)(*args, **options)
    assert str(caught.value) == f"error_in_eps: {message}"


# --------------------------------------------------------------------------- right functions


def test_a_right_function_passes_in_every_mode_with_and_without_a_reference():
    for reference in (None, lambda x: jnp.log1p(jnp.exp(x))):
        errors = assert_derivatives(jax.nn.softplus, X, reference=reference)
        assert tuple(errors) == MODES
        assert all(0 < error < 16 for error in errors.values()), errors


def test_the_modes_are_those_that_the_issue_names():
    assert len(set(MODES)) == len(MODES) == 20
    assert {"jvp", "vjp", "jacfwd", "jacrev", "vmap", "jit", "vjp(checkpoint)"} < set(MODES)
    jac = ("jacfwd", "jacrev")
    assert {f"{outer}({inner})" for outer in jac for inner in jac} == ORDER_TWO


def test_every_mode_runs_what_its_name_says():
    seen = set()

    @jax.custom_jvp
    def f(x):
        return x**3

    @f.defjvp
    def _(primals, tangents):
        seen.add("rule")
        return f(*primals), 3 * primals[0] ** 2 * tangents[0]

    for mode in MODES:
        seen.clear()
        assert set(assert_derivatives(f, X, reference=lambda x: x**3, modes=[mode])) == {mode}
        assert bool(seen) == (mode not in VALUES), mode


@pytest.mark.parametrize("mode", [mode for mode in MODES if "(" in mode and "vmap" not in mode])
def test_the_transformation_of_a_mode_is_in_its_program(mode):
    run = BY_NAME[mode].build(lambda live, held: {"out": jnp.sin(live["x"])})
    x = {"x": jnp.asarray(X)}
    program = str(jax.make_jaxpr(run)(x, {}, x, {"out": x["x"]}))
    primitives = {"jvp(scan)": "scan", "vjp(scan)": "scan"}
    primitives |= {"jvp(checkpoint)": "remat2", "vjp(checkpoint)": "remat2"}
    assert f"{primitives.get(mode, 'jit')}[" in program, program


def test_pytrees_integers_and_mixed_dtypes():
    @functools.partial(jax.jit, static_argnums=3)
    def loss(parameters, features, labels, axis):
        z = parameters["w"].astype(features.dtype) @ features + parameters["b"][0]
        z = z - jax.nn.logsumexp(z, axis, keepdims=True)
        return {"loss": -jnp.take(z, labels), "parts": (z, jnp.argmax(z))}

    parameters = {
        "w": jnp.array([[0.5, -1.0], [2.0, 0.25], [1.0, 1.0]], jnp.bfloat16),
        "b": [np.array([0.25, 0.5, -1.0], np.float32)],
    }
    args = (parameters, np.array([1.5, -0.5], np.float32), jnp.array([2, 0]), 0)
    modes = ["vmap", "jvp", "vjp", "vjp(scan)", "jacfwd", "jacrev", *sorted(ORDER_TWO)[1:3]]
    assert_derivatives(loss, *args, modes=modes)
    assert_derivatives(loss, *args, modes=["vjp"], argnums=1)

    def reference(parameters, *rest):
        return loss({**parameters, "w": parameters["w"] * 2}, *rest)

    modes = ["vjp", "jacrev", "jacfwd(jacrev)"]
    rows = failures(loss, *args, reference=reference, modes=modes)
    assert set(rows) == set(modes)
    for mode, place in (
        ("vjp", "cotangent of args[0]['w'] ["),
        ("jacrev", "∂out['parts'][0]/∂args[0]['w'] ["),
        ("jacfwd(jacrev)", "∂∂out['loss']/∂args[0]['w']/∂args[1] ["),
    ):
        assert any(place in row for row in rows[mode])
    rows = failures(loss, *args, reference=reference, modes=["vjp"], argnums=1)
    assert [row.split()[2:4] for row in rows["vjp"]][-1] == ["cotangent", "of"]
    assert "args[1] [" in rows["vjp"][-1]
    assert len(rows["vjp"]) == 3


@pytest.mark.parametrize(
    "x",
    [
        2.5,
        pytest.param(np.float32(2.5), marks=pytest.mark.slow),
        pytest.param(jnp.zeros(0), marks=pytest.mark.slow),
        jnp.zeros((2, 0, 3)),
    ],
)
def test_scalars_and_empty_arrays(x):
    assert_derivatives(lambda x: (x**2, jnp.sum(jnp.sin(x))), x)


def test_higher_orders_and_transformations_by_composition():
    def f(x):
        return jnp.sum(jnp.sin(x) * jnp.cos(x[::-1]))

    modes = ["jacfwd(jacrev)"]
    assert_derivatives(jax.grad(f), X, reference=jax.jacfwd(f), modes=modes)
    assert_derivatives(jax.checkpoint(f), X, reference=f, modes=modes)
    assert_derivatives(jax.vmap(f), np.stack([X, -X]), reference=jax.vmap(f), modes=modes)


def test_float64():
    with enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        modes = ["value", "jvp", "jacrev", "jacfwd(jacrev)"]
        assert_derivatives(jnp.sin, x, reference=lambda x: jnp.cos(x - jnp.pi / 2), modes=modes)
        assert_derivatives(jnp.sin, x, modes=modes)

        def almost(x):
            return jnp.sin(x) * (1 + 1e-12)

        # Only a reference tells 1e-12; differences are good to eps of float32.
        rows = failures(almost, x, reference=jnp.sin, modes=modes)
        assert set(rows) == set(modes)
        # The digits in which the two differ are shown.
        got, wanted = rows["value"][0].split()[-2:]
        assert got.startswith("-0.948984619356")
        assert wanted.startswith("-0.948984619355")
        assert_derivatives(almost, x, modes=modes)


def test_float64_is_on_for_the_reference_alone():
    seen = []

    def f(x):
        seen.append((x.dtype, jnp.zeros(1).dtype))
        return jnp.sin(x)

    with enable_x64(False):
        assert_derivatives(f, X, modes=["value", "jacrev"])
        assert jnp.zeros(1).dtype == jnp.float32
    assert set(seen) == {(jnp.dtype(t), jnp.dtype(t)) for t in ("float32", "float64")}


# --------------------------------------------------------------------------- wrong functions


def square_with_rule(factor):
    @jax.custom_jvp
    def square(x):
        return x**2

    square.defjvps(lambda tangent, out, x: factor * x * tangent)
    return square


def test_a_wrong_jvp_rule_is_wrong_in_every_derivative():
    rows = failures(square_with_rule(3.0), X)
    assert set(rows) == set(MODES) - VALUES
    # A diagonal Jacobian of three entries, of which all are wrong, the largest at x = 2.
    for mode in ("jacfwd", "jacrev"):
        (row,) = rows[mode]
        assert row.split() == ["4.19e+06", "3/9", "∂out/∂args[0]", "[2,", "2]", "6", "4"]
    # The value that the rule returns is right.
    assert [row.split()[2:4] for row in rows["jvp"]] == [["tangent", "of"]]
    assert set(failures(square_with_rule(3.0), X, reference=jnp.square)) == set(MODES) - VALUES


def test_an_error_of_a_few_eps_is_measured():
    slightly = square_with_rule(2 * (1 + 2.0**-15))
    errors = assert_derivatives(slightly, X, tolerance=300)
    assert errors["jacfwd"] == pytest.approx(2.0**8, rel=1e-2)
    assert "jacfwd" in failures(slightly, X, tolerance=200, modes=["value", "jacfwd"])


def test_a_custom_vjp_raises_in_forward_mode_and_only_there():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    for reference in (None, lambda x: x**3):
        rows = failures(cube, X, reference=reference)
        assert set(rows) == FORWARD
        for text in rows.values():
            assert text[0].startswith("raises  TypeError: can't apply forward-mode")


def test_a_loop_raises_in_reverse_mode_and_only_there():
    def power(x):
        # The number of rounds depends on data, so that nothing can be kept for a way back.
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, x))[1]

    rows = failures(power, X, reference=lambda x: x**4)
    assert set(rows) == {mode for mode in MODES if "vjp" in mode or "jacrev" in mode}
    assert all(text[0].startswith("raises  ValueError: Reverse-mode") for text in rows.values())


def test_the_outer_derivative_of_order_two_is_the_one_named_first():
    @jax.custom_vjp
    def slope(x):
        return 3 * x**2

    slope.defvjp(lambda x: (3 * x**2, x), lambda x, g: (6 * x * g,))

    @jax.custom_jvp
    def cube(x):
        return x**3

    cube.defjvps(lambda tangent, out, x: slope(x) * tangent)
    rows = failures(cube, X, reference=lambda x: x**3)
    assert set(rows) == {"jacfwd(jacfwd)", "jacfwd(jacrev)"}


def test_a_wrong_vjp_rule_is_wrong_where_it_is_used():
    @jax.custom_vjp
    def cube(x, y):
        return x**3 + y

    def backward(x, g):
        return (3 * x**2 * g).at[1].set(0.0), g

    cube.defvjp(lambda x, y: (x**3 + y, x), backward)
    rows = failures(cube, X, 2 * X)
    assert set(rows) == set(MODES) - VALUES
    (row,) = rows["jacrev"]
    assert row.split()[1:] == ["1/9", "∂out/∂args[0]", "[1,", "1]", "0", "4.6875"]
    (row,) = rows["vjp"]
    assert row.split()[1:6] == ["1/3", "cotangent", "of", "args[0]", "[1]"]
    (row,) = rows["vmap(vjp)"]
    assert row.split()[1:7] == ["2/6", "cotangent", "of", "args[0]", "[0,", "1]"]


def test_a_wrong_value_from_the_forward_pass_of_a_rule():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3 + 1, x), lambda x, g: (3 * x**2 * g,))
    rows = failures(cube, X, modes=["value", "vjp", "jit(vjp)", "jacrev"])
    assert set(rows) == {"vjp", "jit(vjp)"}
    assert rows["vjp"][0].split()[1:3] == ["3/3", "out"]


def test_a_wrong_transpose_is_wrong_in_reverse_mode_only():
    @jax.custom_jvp
    def double(x):
        return 2 * x

    @double.defjvp
    def _(primals, tangents):
        out = linear_call(lambda _, t: 2 * t, lambda _, g: 3 * g, (), *tangents)
        return double(*primals), out

    modes = ["jvp", "linearize", "jit(jvp)", "jvp(checkpoint)", "vjp", "jit(vjp)"]
    assert set(failures(double, X, modes=modes)) == {"vjp", "jit(vjp)"}


def test_a_derivative_that_is_wrong_at_order_two_only():
    @jax.custom_jvp
    def cosine(x):
        return jnp.cos(x)

    cosine.defjvps(lambda tangent, out, x: jnp.sin(x) * tangent)

    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    sine.defjvps(lambda tangent, out, x: cosine(x) * tangent)
    for reference in (None, jnp.sin):
        rows = failures(sine, X, reference=reference)
        assert set(rows) == ORDER_TWO
        assert all("∂∂out/∂args[0]/∂args[0] [" in row for (row,) in rows.values())
    assert set(assert_derivatives(sine, X, order=1)) == set(MODES) - ORDER_TWO


def test_residuals_that_are_cut_off_are_wrong_in_reverse_over_reverse_only():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, jax.lax.stop_gradient(x)), lambda x, g: (3 * x**2 * g,))
    modes = ["vjp", "jacrev", "jacrev(jacrev)"]
    assert set(failures(cube, X, modes=modes)) == {"jacrev(jacrev)"}


def test_a_function_that_is_wrong_under_vmap_only():
    @custom_vmap
    def inner(x):
        return x**2

    @inner.def_vmap
    def _(axis_size, in_batched, x):
        return x**2 + jnp.mean(x) * 0.01, True

    @jax.custom_jvp
    def square(x):
        return inner(x)

    square.defjvps(lambda tangent, out, x: 2 * x * tangent)
    rows = failures(square, X, modes=[m for m in MODES if m not in ORDER_TWO], order=1)
    assert set(rows) == {"vmap", "vmap(jvp)", "vmap(vjp)"}
    assert rows["vmap"][0].split()[1:3] == ["6/6", "out"]


def test_rows_that_change_places_under_vmap():
    @custom_vmap
    def identity(x):
        return x + 0

    @identity.def_vmap
    def _(axis_size, in_batched, x):
        return x[::-1], True

    assert set(failures(identity, X, modes=["value", "jit", "vmap"])) == {"vmap"}


def test_nan_where_a_number_is_wanted():
    x = np.array([1.0, -np.inf, 0.5], np.float32)
    modes = ["value", "jacfwd", "jacrev"]

    @jax.jit
    def careless(x):
        return jnp.where(x > -jnp.inf, 1.0, 0.0) * jnp.exp(x) * x

    @jax.jit
    def careful(x):
        finite = jnp.where(x > -jnp.inf, x, 0.0)
        return jnp.where(x > -jnp.inf, jnp.exp(finite) * finite, 0.0)

    assert_derivatives(careful, x, reference=careful)
    rows = failures(careless, x, reference=careful, modes=modes)
    assert set(rows) == set(modes)
    assert rows["value"][0].split() == ["inf", "1/3", "out", "[1]", "nan", "0"]


def test_an_exception_of_one_mode_is_told_and_the_others_still_run():
    def f(x):
        if isinstance(x, jax.core.Tracer) and x.ndim == 1 and "Batch" in type(x).__name__:
            raise RuntimeError("no batches\nsecond line")
        return jnp.sin(x)

    rows = failures(f, X, modes=["value", "vmap", "jacrev"])
    assert rows == {"vmap": ["raises  RuntimeError: no batches"]}


@pytest.mark.parametrize(("dtype", "wrong"), [(jnp.bfloat16, 1.1), (jnp.float16, 1.02)])
def test_16_bit_types(dtype, wrong):
    x = jnp.asarray(X, dtype)
    modes = ["value", "jvp", "vjp", "jacfwd", "jacrev"]
    errors = assert_derivatives(jnp.square, x, modes=modes)
    assert max(errors.values()) <= 1
    bad = square_with_rule(2 * wrong)
    assert set(failures(bad, x, modes=modes)) == set(modes) - {"value"}


@pytest.mark.optimised
def test_the_scale_of_a_vanishing_derivative():
    def zero(x):
        return jax.nn.logsumexp(jax.nn.log_softmax(x))

    # Nothing but rounding is left of the derivative, and it is measured against nothing.
    options = {"reference": lambda x: 0 * jnp.sum(x), "modes": ["jacrev"]}
    assert failures(zero, X, **options)["jacrev"][0].startswith("inf ")
    assert_derivatives(zero, X, least_scale=1, tolerance=4, **options)
    # By differences the least scale is max(abs(out)) / 8192.
    assert_derivatives(lambda x: zero(x) + 1, X, modes=["jacrev"], tolerance=8192)


def test_the_message_is_a_readable_table():
    with pytest.raises(AssertionError) as caught:
        assert_derivatives(
            square_with_rule(3.0),
            np.array([1.0, 2.0], np.float32),
            modes=["value", "vjp", "jacrev"],
        )
    assert str(caught.value).splitlines() == [
        "assert_derivatives: square is wrong in 2 of 3 modes",
        "  mode    eps       wrong  at                        got          wanted",
        *str(caught.value).splitlines()[2:3],
        "  jacrev  4.19e+06  2/4    ∂out/∂args[0] [1, 1]      6            4",
        "  right: value",
        "  wanted is by central differences in float64; a reference would be sharper",
    ]
    with pytest.raises(AssertionError) as caught:
        assert_derivatives(jnp.sin, X, reference=jnp.cos, modes=["value"])
    assert str(caught.value).splitlines()[-1] == "  right: none"


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "fun must be callable, got int", (3, X), {}),
        (TypeError, "reference must be callable, got str", (jnp.sin, X), {"reference": "sin"}),
        (
            TypeError,
            "args must hold real arrays and numbers, got str at args[0]['a']",
            (jnp.sin, {"a": "b"}),
            {},
        ),
        (
            TypeError,
            "args must hold real arrays and numbers, got complex64 at args[1]",
            (jnp.add, X, jnp.ones(3, jnp.complex64)),
            {},
        ),
        (ValueError, "args must hold a floating array, got none", (jnp.sin, np.arange(3)), {}),
        (ValueError, "args must hold a floating array, got none", (jnp.sin,), {}),
        (ValueError, "fun must return a floating array, got none", (jnp.argmax, X), {}),
        (
            ValueError,
            "argnums must be among [1], which have floating leaves, got 0",
            (lambda i, x: x, 3, X),
            {"argnums": 0},
        ),
        (
            ValueError,
            "argnums must be among [0], which have floating leaves, got none",
            (jnp.sin, X),
            {"argnums": ()},
        ),
        (
            TypeError,
            "argnums must be integers, got float",
            (jnp.sin, X),
            {"argnums": 0.0},
        ),
        (TypeError, "modes must be a sequence of names, got str", (jnp.sin, X), {"modes": "jvp"}),
        (
            ValueError,
            f"modes must be among {', '.join(MODES)}, got hvp",
            (jnp.sin, X),
            {"modes": ["hvp"]},
        ),
        (ValueError, "modes must name a mode, got none", (jnp.sin, X), {"modes": []}),
        (
            ValueError,
            "modes must be of order 1, got jacrev(jacrev)",
            (jnp.sin, X),
            {"modes": ["jvp", "jacrev(jacrev)"], "order": 1},
        ),
        (ValueError, "order must be 1 or 2, got 3", (jnp.sin, X), {"order": 3}),
        (TypeError, "tolerance must be a number, got str", (jnp.sin, X), {"tolerance": "4"}),
        (
            ValueError,
            "tolerance must be finite and 0 or more, got nan",
            (jnp.sin, X),
            {"tolerance": math.nan},
        ),
        (
            TypeError,
            "least_scale must be a number, got NoneType",
            (jnp.sin, X),
            {"least_scale": None},
        ),
        (
            ValueError,
            "least_scale must be finite and 0 or more, got -1",
            (jnp.sin, X),
            {"least_scale": -1},
        ),
        (
            ValueError,
            "reference must return {'out': (3,)} as fun does, got {'out': ()}",
            (jnp.sin, X),
            {"reference": jnp.sum},
        ),
    ],
)
def test_bad_input(error, message, args, options):
    with pytest.raises(error) as caught:
        inspect.unwrap(assert_derivatives)(*args, **options)
    assert str(caught.value) == f"assert_derivatives: {message}"
