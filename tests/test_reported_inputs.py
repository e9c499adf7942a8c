"""Inputs on which users met a wrong number, and relatives of these, with the right values."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import mpmath
import numpy as np
import pytest

import jaxsoft
from jaxsoft._testing.precision import enable_x64
from tests.exact import DTYPES, EPS, Exact

INF, NAN = np.inf, np.nan
WIDE = ["float32", "float64"]
MODES = {"f": jax.jacfwd, "r": jax.jacrev}
ORDERS = ["", "f", "r", "ff", "fr", "rf", "rr"]
SIGNED_FLOAT8 = [
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
]


def derivative(fun, order, by=0):
    """The derivative of the order and the modes, outermost last: "fr" is jacrev of jacfwd."""
    for mode in order:
        fun = MODES[mode](fun, by)
    return fun


def in_all_modes(fun, by=0):
    """A program of the value and of the derivatives of order one and two."""
    return jax.jit(lambda *args: {order: derivative(fun, order, by)(*args) for order in ORDERS})


def close(actual, wanted, dtype, factor=8.0, size=0.0):
    """Within a number of eps of the value wanted, or of a size from which it has cancelled."""
    eps = EPS[dtype]
    actual = np.asarray(actual)
    assert actual.dtype == DTYPES[dtype]
    wanted = np.asarray(wanted, float)
    np.testing.assert_allclose(
        np.asarray(actual, float), wanted, rtol=factor * eps, atol=factor * eps * size
    )


class Parameter:
    """What neural network libraries wrap an array in."""

    def __init__(self, value):
        self.value = jnp.asarray(value)

    def __jax_array__(self):
        return self.value


# ------------------------------------------------- kl_divergence where one side lacks a class

PAIRS = [
    ([0, 0, -INF], [1, 2, 3], 1.2144588),
    ([0, 0, -1e9], [1, 2, 3], 1.2144588),
    ([0, -INF, -INF], [0.3, 0.2, -0.1], 0.945911),
    ([0, 0, -INF], [1, 2, -INF], None),  # both lack it
    ([0, -800, 1], [0, 3, 1], None),  # exp(-800) is 0 in float64 too
    ([5, -INF, 4, -INF, 3, -INF, 2], [0, 1, 2, 3, 2, 1, 0], None),
    ([-INF, -INF, 1e9], [-1, 0, 1], None),
]
N = 10


def of_classes(row):
    return np.array([*row, *[-INF] * (N - len(row))])


class ExactDivergence:
    """KL, its gradients and its Hessians in 50 digits."""

    def __init__(self, x, y):
        p, q = Exact(x), Exact(y)
        self.p, self.q = (np.array(a.p, object) for a in (p, q))
        log_ratio = [
            mpmath.mpf(0) if a == 0 else b - c
            for a, b, c in zip(p.p, p.log_p, q.log_p, strict=True)
        ]
        terms = self.p * np.array(log_ratio, object)
        self.value = mpmath.fsum(terms)
        self.by_x = terms - self.p * self.value
        self.by_y = self.q - self.p

    def hessian(self):
        jacobian = np.diag(self.p) - np.outer(self.p, self.p)
        # p_i (r_i - KL): p moves by J, r_i by e_i - p, KL by itself.
        xx = np.diag(self.by_x) - np.outer(self.by_x, self.p) - np.outer(self.p, self.by_x)
        yy = np.diag(self.q) - np.outer(self.q, self.q)
        return np.block([[xx + jacobian, -jacobian], [-jacobian, yy]])


@functools.cache
def divergences(temperature=None):
    """Of x and y in one array, for the derivatives by both."""
    options = {} if temperature is None else {"temperature": temperature}
    fun = lambda xy: jaxsoft.kl_divergence(*jnp.split(xy, 2), **options)
    return jax.jit(jax.vmap(in_all_modes(fun)))


def test_kl_divergence_where_p_lacks_a_class_that_q_has():
    for dtype in WIDE:
        rows = [tuple(of_classes(row).astype(dtype) for row in pair[:2]) for pair in PAIRS]
        got = divergences()(jnp.array([np.concatenate(row) for row in rows]))
        for i, ((x, y), (_, _, value)) in enumerate(zip(rows, PAIRS, strict=True)):
            right = ExactDivergence(x, y)
            assert value is None or abs(right.value - value) < 1e-6
            size = 1 + abs(float(right.value))
            close(got[""][i], right.value, dtype, size=size)
            for order in "fr":
                close(got[order][i], [*right.by_x, *right.by_y], dtype, size=size)
            for order in ("ff", "fr", "rf", "rr"):
                close(got[order][i], right.hessian(), dtype, 16, size=size)


@pytest.mark.parametrize("jit", [False, True])
def test_kl_divergence_of_short_rows(jit):
    wrap = jax.jit if jit else lambda fun: fun
    x, y = jnp.array([0, 0, -INF]), jnp.array([1.0, 2, 3])
    for derive in (jax.jacfwd, jax.jacrev):
        by_x, by_y = wrap(derive(jaxsoft.kl_divergence, (0, 1)))(x, y)
        right = ExactDivergence(x, y)
        close(by_x, right.by_x, "float64")
        close(by_y, right.by_y, "float64")
        np.testing.assert_allclose(by_y, [-0.410, -0.255, 0.665], atol=5e-4)
    # q = 0 < p stays infinite; what both lack does not count.
    fun = wrap(jaxsoft.kl_divergence)
    assert fun(y, x) == INF
    close(fun(x, jnp.array([1.0, 2, -INF])), fun(x[:2], y[:2]), "float64")
    close(fun(x[:2], y[:2]), np.log(np.cosh(0.5)), "float64")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_teacher_of_few_of_many_classes(dtype):
    rng = np.random.default_rng(1)
    x, y = (3 * rng.normal(size=50).astype(DTYPES[dtype]) for _ in range(2))
    top = x >= np.sort(x)[-5]
    right = ExactDivergence(np.where(top, x, DTYPES[dtype](-INF)), y)
    out = "float64" if dtype == "float64" else "float32"
    given = [np.where(top, x, DTYPES[dtype](low)) for low in (-INF, np.finfo(np.float16).min)]
    for teacher in given:
        loss, by_y = jax.value_and_grad(jaxsoft.kl_divergence, 1)(jnp.array(teacher), jnp.array(y))
        close(loss, right.value, out, size=4)
        close(by_y, right.by_y, dtype)


# ----------------------------------------------------------------- means over what counts


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_mean_does_not_count_what_is_ignored(dtype):
    x = jnp.array([[0.5, 2.0, -1.0], [1.0, 0.0, 0.25], [3.0, -2.0, 1.0], [0.0, 0.0, 0.0]], dtype)
    labels = jnp.array([0, 2, -1, 1])
    weights = jnp.array([1.0, 0.5, 2.0, 0.25], dtype)
    out = "float64" if dtype == "float64" else "float32"
    for given in (labels, jnp.full(4, -1)):
        for weighted, smoothing in itertools.product((False, True), (0.0, 0.1)):
            options = {"weights": weights if weighted else None, "label_smoothing": smoothing}

            @jax.jit
            def everything(x, given=given, options=options):
                fun = functools.partial(jaxsoft.cross_entropy, ignore_index=-1, **options)
                return {
                    reduction: [
                        call(lambda x, r=reduction: fun(x, given, reduction=r), x)
                        for call in (lambda f, x: f(x), *map(applied, MODES.values()))
                    ]
                    for reduction in ("none", "sum", "mean")
                }

            def loss(x, reduction, given=given, options=options):
                return jaxsoft.linear_cross_entropy(
                    x, jnp.eye(3, dtype=dtype), given, ignore_index=-1, reduction=reduction, **options
                )

            of = np.asarray(weights, float) if weighted else np.ones(4)
            total = (of * (given != -1)).sum()
            got = everything(x)
            for whole, part in zip(got["sum"], got["none"], strict=True):
                close(whole, np.asarray(part, float).sum(0), whole.dtype.name, size=2)
            for mean, whole in zip(got["mean"], got["sum"], strict=True):
                wanted = np.asarray(whole, float) / (total or 1)
                close(mean, wanted, mean.dtype.name)
            for reduction, (value, *_) in got.items():
                close(value, loss(x, reduction), out, size=2)


def applied(derive):
    return lambda fun, x: derive(fun)(x)


def test_the_weighted_means_of_torch():
    rng = np.random.default_rng(2)
    x, labels, w = rng.normal(size=(6, 4)), np.array([0, 3, 1, 1, 2, 0]), rng.uniform(0.5, 3, 4)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    of_label = w[labels]
    hard = -(of_label * log_p[np.arange(6), labels]).sum() / of_label.sum()
    uniform = -(log_p @ w).sum() / 4 / of_label.sum()
    for fun in (jaxsoft.cross_entropy, lambda x, *a, **k: jaxsoft.linear_cross_entropy(x, np.eye(4), *a, **k)):
        close(fun(x, labels, weights=of_label, reduction="mean"), hard, "float64")
        total = fun(x, labels, class_weights=w, label_smoothing=0.1, reduction="sum")
        close(total / of_label.sum(), 0.9 * hard + 0.1 * uniform, "float64")
        # By the number of examples, as the mean without `weights` is.
        mean = fun(x, labels, class_weights=w, reduction="mean")
        close(mean, hard * of_label.sum() / 6, "float64")


# ------------------------------------------------------------- labels beyond the narrow type


def losses(x, labels, **options):
    """By both functions, which take the same ids."""
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    yield jaxsoft.cross_entropy(x, labels, **options)
    yield jaxsoft.linear_cross_entropy(x, eye, labels, reduction="none", **options)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        ("int64", 2**32),
        ("int64", 2**32 + 1),
        ("int64", -(2**32)),
        ("int64", 2**63 - 1),
        ("int64", -(2**63)),
        ("uint64", 2**32),
        ("uint64", 2**64 - 1),
        ("uint64", 2**63),
        ("uint32", 2**32 - 1),
    ],
)
def test_labels_of_64_bits(dtype, wrong, x64):
    with enable_x64(x64):
        x, labels = jnp.array([[1.0, 2.0], [0.5, 0.0]]), np.array([wrong, 1], dtype)
        for loss in losses(x, labels):
            np.testing.assert_array_equal(np.isnan(loss), [True, False])
        jitted = jax.jit(lambda x: jaxsoft.cross_entropy(x, labels))  # known as it is traced
        np.testing.assert_array_equal(np.isnan(jitted(x)), [True, False])
        by = jax.grad(lambda x: jaxsoft.cross_entropy(x, labels).sum())(x)
        np.testing.assert_array_equal(np.isnan(by), [[True, True], [False, False]])
        for loss in losses(x, labels, ignore_index=wrong):
            np.testing.assert_array_equal(loss == 0, [True, False])
        # What it is modulo 2³² is another label.
        for other in (wrong % 2**32, wrong - 2**64 if wrong >= 2**63 else wrong + 2**32):
            if other != wrong:
                for loss in losses(x, labels, ignore_index=other):
                    np.testing.assert_array_equal(np.isnan(loss), [True, False])
        p = jaxsoft.softmax(x)
        entry = jaxsoft.softmax_derivative(p, labels, 0)
        np.testing.assert_array_equal(np.isnan(entry), [True, False])


@pytest.mark.parametrize("ignored", [2**40, -(2**40), 2**64, 2**31, 10**30])
@pytest.mark.parametrize("x64", [False, True])
def test_an_ignored_label_of_any_size(ignored, x64):
    with enable_x64(x64):
        x, labels = jnp.array([[1.0, 2.0], [0.5, 0.0]]), np.array([0, 1])
        for loss in losses(x, labels, ignore_index=ignored):
            np.testing.assert_array_equal(loss, jaxsoft.cross_entropy(x, labels))
        for loss in losses(x, jnp.array([0, 1], "int8"), ignore_index=ignored):
            np.testing.assert_array_equal(loss, jaxsoft.cross_entropy(x, labels))


@pytest.mark.parametrize(
    "label", [3, -1, 2**40, np.int64(2**32), np.uint8(3), np.array(-1), np.array(2**63, "uint64")]
)
def test_a_label_known_as_a_number_is_checked(label):
    x = jnp.zeros(3)
    for x64 in (False, True):
        with enable_x64(x64):
            for wrap in (lambda f: f, jax.jit):
                for fun, name in (
                    (lambda x: jaxsoft.cross_entropy(x, label), "cross_entropy: labels"),
                    (
                        lambda x: jaxsoft.linear_cross_entropy(x, jnp.ones((3, 3)), label),
                        "linear_cross_entropy: labels",
                    ),
                    (lambda x: jaxsoft.softmax_derivative(x, label, 0), "softmax_derivative: i"),
                ):
                    message = rf"^{name} must lie in \[0, 3\), got {int(label)}$"
                    with pytest.raises(ValueError, match=message):
                        wrap(fun)(x)
            loss = jaxsoft.cross_entropy(x, label, ignore_index=int(label))
            assert loss == 0


# ------------------------------------------------------------------- temperatures of any size

# Logits, and the maximum at a temperature that no gap between them stands.
HARD = [([2, 4, 3], [0, 1, 0]), ([2, 4, 4], [0, 0.5, 0.5]), ([-INF, 1, 0], [0, 1, 0])]
LOGITS = np.array([row for row, _ in HARD])
MAXIMA = np.array([row for _, row in HARD])
LEAST = {"float32": 2.0**-126, "float64": 2.0**-1022}


@functools.cache
def at_temperature():
    """By the temperature, which is an argument: one program for all of them."""
    of_row = {
        "softmax": lambda t, x: jaxsoft.softmax(x, temperature=t),
        "entropy": lambda t, x: jaxsoft.entropy(x, temperature=t),
        "kl_divergence": lambda t, x: jaxsoft.kl_divergence(x, x[::-1] + x, temperature=t),
        "cross_entropy": lambda t, x: jaxsoft.cross_entropy(x, 1, temperature=t),
        "linear_cross_entropy": lambda t, x: jaxsoft.linear_cross_entropy(
            x[None], jnp.eye(3, dtype=x.dtype), jnp.array([1]), temperature=t
        ),
    }
    programs = {name: in_all_modes(fun) for name, fun in of_row.items()}
    return jax.jit(lambda t, x: {name: program(t, x) for name, program in programs.items()})


@pytest.mark.parametrize("dtype", WIDE)
def test_the_least_temperature(dtype):
    x = jnp.array(LOGITS, dtype)
    for t in (LEAST[dtype], LEAST[dtype] * 3, 1e-38 if dtype == "float32" else 1e-307):
        number, array = float(t), jnp.asarray(t, dtype)
        for temperature in (number, np.dtype(dtype).type(t), array, jnp.full((3, 1), t, dtype)):
            softmax = lambda x, t=temperature: jaxsoft.softmax(x, temperature=t)
            np.testing.assert_array_equal(softmax(x), MAXIMA)
            np.testing.assert_array_equal(jax.jit(softmax)(x), MAXIMA)
        hard = x[:1]
        for by_x in (jax.jacfwd, jax.jacrev):
            jacobian = by_x(lambda x: jaxsoft.softmax(x, temperature=array))(hard)
            assert not np.any(jacobian)
        # log_softmax has numbers of the size of 1 / T.
        log_p = jaxsoft.log_softmax(x[0] / 2, temperature=array)
        np.testing.assert_array_equal(log_p, (np.array([-1, 0, -0.5]) / t).astype(dtype))
        by = jax.jacrev(lambda x: jaxsoft.log_softmax(x, temperature=array))(hard[0])
        unit = np.array([[1, -1, 0], [0, 0, 0], [0, -1, 1]]) / t
        np.testing.assert_array_equal(by, unit.astype(dtype))
        loss = jax.value_and_grad(lambda x: jaxsoft.cross_entropy(x, 1, temperature=array))(hard[0])
        assert loss[0] == 0
        assert not np.any(loss[1])
        close(jaxsoft.cross_entropy(x[0] / 2, 0, temperature=array), 1 / t, dtype)


# Smaller than what the type or the processor holds: the maximum all the same.
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("temperature", [np.float32(1e-45), 1e-300, 5e-324, 1e-20, np.float64(1e-310)])
@pytest.mark.parametrize("x64", [False, True])
def test_numbers_below_every_temperature(dtype, temperature, x64):
    if dtype == "float64" and not x64:
        return
    with enable_x64(x64):
        x = jnp.array(LOGITS, dtype)
        softmax = lambda x: jaxsoft.softmax(x, temperature=temperature)
        for fun in (softmax, jax.jit(softmax)):
            np.testing.assert_array_equal(np.asarray(fun(x), float), MAXIMA)
        np.testing.assert_array_equal(
            jaxsoft.entropy(x, temperature=temperature), np.array([0, np.log(2), 0], jaxsoft.entropy(x).dtype)
        )
        np.testing.assert_array_equal(jaxsoft.cross_entropy(x[:1], np.array([1]), temperature=temperature), [0])


@pytest.mark.parametrize("dtype", WIDE)
def test_every_order_by_a_small_temperature(dtype):
    for t in (1e-20, 1e-30, LEAST[dtype]):
        got = at_temperature()(jnp.asarray(t, dtype), jnp.array(LOGITS[0], dtype))
        for name in ("softmax", "entropy", "cross_entropy", "linear_cross_entropy"):
            for order, by in got[name].items():
                wanted = MAXIMA[0] if (name, order) == ("softmax", "") else 0 * np.asarray(by)
                np.testing.assert_array_equal(by, wanted, err_msg=f"{name} {order} {t}")


@pytest.mark.parametrize("dtype", WIDE)
def test_every_order_by_the_temperature_beside_a_finite_mask(dtype):
    t, lowest = jnp.asarray(0.5, dtype), float(np.finfo(dtype).min)
    of_three = lambda row: at_temperature()(t, jnp.array(row, dtype))
    for low in (lowest, lowest / 2, -1e9):
        got, alone = of_three([1, 2, low]), of_three([1, 2, -INF])
        for name in got:
            if name == "kl_divergence":
                continue
            for order in ORDERS:
                np.testing.assert_array_equal(got[name][order], alone[name][order], err_msg=f"{name} {order}")
    # p = sigmoid(-1 / T), by T.
    p = 1 / (1 + np.exp(2))
    slope = p * (1 - p) / 0.25
    second = slope * ((1 - 2 * p) / 0.25 - 4)
    rights = {"": [p, 1 - p], "f": [slope, -slope], "r": [slope, -slope]}
    rights |= dict.fromkeys(("ff", "fr", "rf", "rr"), [second, -second])
    assert abs(slope - 0.41997) < 1e-5
    for order, right in rights.items():
        close(alone["softmax"][order], [*right, 0], dtype)
    for order, right in zip(("", "f", "ff"), entropy_by_temperature(p), strict=True):
        close(alone["entropy"][order], right, dtype, 16)


def entropy_by_temperature(p):
    """H of two classes with a gap of 1 at T = 1/2, and its derivatives: dH/dT = Var(x) / T³."""
    variance = p * (1 - p)
    by_log_odds = p * (1 - p) * (1 - 2 * p)  # d Var / d(log p / (1 - p))
    entropy = -p * np.log(p) - (1 - p) * np.log1p(-p)
    return entropy, variance * 8, by_log_odds * 4 * 8 - 3 * variance * 16
