"""Inputs on which users met a wrong number, and relatives of these, with the right values."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import mpmath
import numpy as np
import pytest

import jaxsoft
from jaxsoft.testing._precision import enable_x64
from tests.exact import DTYPES, EPS, Exact

INF, NAN = np.inf, np.nan
WIDE = ["float32", "float64"]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Every order in one dtype is what a contributor needs.
SECOND_SLOW = ["float32", slow("float64")]
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


@pytest.fixture
def unchecked(monkeypatch):
    """Annotations are checked at run time; wrapped arrays and symbolic sizes have other types."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


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


@pytest.mark.parametrize(
    ("dtype", "weighted"),
    [
        ("float32", False),
        ("float64", True),
        ("bfloat16", True),
        slow("float32", True),
        slow("float64", False),
        slow("bfloat16", False),
    ],
)
def test_the_mean_does_not_count_what_is_ignored(dtype, weighted):
    x = jnp.array([[0.5, 2.0, -1.0], [1.0, 0.0, 0.25], [3.0, -2.0, 1.0], [0.0, 0.0, 0.0]], dtype)
    labels = np.array([0, 2, -1, 1])
    weights = np.array([1.0, 0.5, 2.0, 0.25])
    options = {"ignore_index": -1}
    if weighted:
        options |= {"weights": jnp.array(weights, dtype), "label_smoothing": 0.1}

    @jax.jit
    def everything(x, labels):
        """By reduction the value by either function, and its Jacobians forward and reverse."""
        out = {}
        for reduction in ("none", "sum", "mean"):
            of = {"reduction": reduction, **options}
            loss = lambda x, of=of: jaxsoft.cross_entropy(x, labels, **of)
            fused = jaxsoft.linear_cross_entropy(x, jnp.eye(3, dtype=dtype), labels, **of)
            out[reduction] = [fused, loss(x), *(mode(loss)(x) for mode in MODES.values())]
        return out

    for given in (labels, np.full(4, -1)):
        got = everything(x, given)
        total = (weights if weighted else np.ones(4))[given != -1].sum()
        for whole, part in zip(got["sum"], got["none"], strict=True):
            close(whole, np.asarray(part, float).sum(0), whole.dtype.name, size=2)
        for mean, whole in zip(got["mean"], got["sum"], strict=True):
            close(mean, np.asarray(whole, float) / (total or 1), mean.dtype.name)
        for fused, value, *_ in got.values():
            close(value, fused, "float64" if dtype == "float64" else "float32", size=2)


def test_the_weighted_means_of_torch():
    rng = np.random.default_rng(2)
    x, labels, w = rng.normal(size=(6, 4)), np.array([0, 3, 1, 1, 2, 0]), rng.uniform(0.5, 3, 4)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    of_label = w[labels]
    hard = -(of_label * log_p[np.arange(6), labels]).sum() / of_label.sum()
    uniform = -(log_p @ w).sum() / 4 / of_label.sum()
    for fun in (
        jaxsoft.cross_entropy,
        lambda x, *a, **k: jaxsoft.linear_cross_entropy(x, np.eye(4), *a, **k),
    ):
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
    for x64 in (False, True):
        with enable_x64(x64):
            x = jnp.zeros(3)
            for wrap in (lambda f: f, jax.jit):
                for fun, name in (
                    (lambda x: jaxsoft.cross_entropy(x, label), "cross_entropy: labels"),
                    (
                        lambda x: jaxsoft.linear_cross_entropy(x, jnp.ones((3, 3)), label),
                        "linear_cross_entropy: labels",
                    ),
                    (lambda x: jaxsoft.softmax_derivative(x, label, 0), "softmax_derivative: i"),
                ):
                    message = rf"^{name} must lie in \[0, 3\), got {int(label)}(\n|$)"
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

    def linear(t, x):  # its logits are the bias
        features, w = jnp.zeros((1, 1), x.dtype), jnp.zeros((1, 3), x.dtype)
        return jaxsoft.linear_cross_entropy(features, w, jnp.array([1]), bias=x, temperature=t)

    programs = {
        "softmax": in_all_modes(lambda t, x: jaxsoft.softmax(x, temperature=t)),
        "entropy": in_all_modes(lambda t, x: jaxsoft.entropy(x, temperature=t)),
        "cross_entropy": in_all_modes(lambda t, x: jaxsoft.cross_entropy(x, 1, temperature=t)),
        "linear_cross_entropy": in_all_modes(linear),
    }
    return jax.jit(lambda t, x: {name: program(t, x) for name, program in programs.items()})


@pytest.mark.parametrize("dtype", SECOND_SLOW)
def test_the_least_temperature(dtype):
    x = jnp.array(LOGITS, dtype)
    softmax = lambda x, t: jaxsoft.softmax(x, temperature=t)
    log_softmax = lambda x, t: jaxsoft.log_softmax(x, temperature=t)
    cross_entropy = lambda x, t: jaxsoft.cross_entropy(x, 1, temperature=t)

    @jax.jit
    def everything(x, hard, t):
        return {
            "softmax": [softmax(x, t), softmax(x, jnp.full((3, 1), t))],
            "its derivatives": [by_x(softmax)(hard, t) for by_x in MODES.values()],
            "log_softmax": log_softmax(hard / 2, t),
            "of log_softmax": [by_x(log_softmax)(hard, t) for by_x in MODES.values()],
            "loss": jax.value_and_grad(cross_entropy)(hard, t),
            "large loss": jaxsoft.cross_entropy(hard / 2, 0, temperature=t),
        }

    for t in (LEAST[dtype], LEAST[dtype] * 3, 1.2e-38 if dtype == "float32" else 1e-307):
        scalars = (float(t), np.dtype(dtype).type(t))
        for temperature in (*scalars, jnp.asarray(t, dtype), jnp.full((3, 1), t, dtype)):
            np.testing.assert_array_equal(softmax(x, temperature), MAXIMA)
        of_scalars = jax.jit(lambda x, scalars=scalars: [softmax(x, t) for t in scalars])(x)
        got = everything(x, x[0], jnp.asarray(t, dtype))
        for p in (*of_scalars, *got["softmax"]):
            np.testing.assert_array_equal(p, MAXIMA)
        assert not np.any(got["its derivatives"])
        # log_softmax has numbers of the size of 1 / T.
        wanted = (np.array([-1, 0, -0.5]) / t).astype(dtype)
        np.testing.assert_array_equal(got["log_softmax"], wanted)
        wanted = (np.array([[1, -1, 0], [0, 0, 0], [0, -1, 1]]) / t).astype(dtype)
        for by_x in got["of log_softmax"]:
            np.testing.assert_array_equal(by_x, wanted)
        loss, by = got["loss"]
        assert loss == 0
        assert not np.any(by)
        close(got["large loss"], 1 / t, dtype)


# Smaller than what the type or the processor holds: the maximum all the same.
@pytest.mark.parametrize(
    ("dtype", "x64"),
    [
        ("float32", False),
        ("bfloat16", False),
        ("float32", True),
        ("float16", True),
        ("float64", True),
    ],
)
def test_numbers_below_every_temperature(dtype, x64):
    with enable_x64(x64):
        x = jnp.array(LOGITS, dtype)
        for t in (np.float32(1e-45), 1e-300, 5e-324, np.float64(1e-310), 1e-38, 1e-20):
            p, entropy = jaxsoft.softmax(x, temperature=t), jaxsoft.entropy(x, temperature=t)
            np.testing.assert_array_equal(np.asarray(p, float), MAXIMA)
            np.testing.assert_array_equal(entropy, np.array([0, np.log(2), 0], entropy.dtype))
            assert jaxsoft.cross_entropy(x[0], np.array(1), temperature=t) == 0
        p = jax.jit(lambda x: jaxsoft.softmax(x, temperature=1e-300))(x)
        np.testing.assert_array_equal(np.asarray(p, float), MAXIMA)


@pytest.mark.parametrize("dtype", SECOND_SLOW)
def test_every_order_by_a_small_temperature(dtype):
    for t in (1e-20, 1e-30, LEAST[dtype]):
        got = at_temperature()(jnp.asarray(t, dtype), jnp.array(LOGITS[0], dtype))
        for name in got:
            for order, by in got[name].items():
                wanted = MAXIMA[0] if (name, order) == ("softmax", "") else 0 * np.asarray(by)
                np.testing.assert_array_equal(by, wanted, err_msg=f"{name} {order} {t}")


@pytest.mark.parametrize("dtype", SECOND_SLOW)
def test_every_order_by_the_temperature_beside_a_finite_mask(dtype):
    t, lowest = jnp.asarray(0.5, dtype), float(np.finfo(dtype).min)
    of_three = lambda row: at_temperature()(t, jnp.array(row, dtype))
    for low in (lowest, lowest / 2, -1e9):
        got, alone = of_three([1, 2, low]), of_three([1, 2, -INF])
        for name in got:
            for order in ORDERS:
                np.testing.assert_array_equal(
                    got[name][order], alone[name][order], err_msg=f"{name} {order}"
                )
    # p = sigmoid(-1 / T), by T.
    p = 1 / (1 + np.exp(2))
    slope = p * (1 - p) / 0.25
    second = slope * ((1 - 2 * p) / 0.25 - 4)
    rights = {"": [p, 1 - p], "f": [slope, -slope], "r": [slope, -slope]}
    rights |= {order: [second, -second] for order in ("ff", "fr", "rf", "rr")}
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


# ---------------------------------------------------------- gaps beyond the largest number

HUGE = {"float32": 2e38, "float64": 1e308, "bfloat16": 2e38}


@functools.cache
def information():
    """entropy and kl_divergence of three classes, in all modes."""
    kl = lambda x: jaxsoft.kl_divergence(x, jnp.array([0, 0.5, 1], x.dtype))
    programs = {fun: in_all_modes(fun) for fun in (jaxsoft.entropy, kl)}
    return jax.jit(lambda x: [program(x) for program in programs.values()])


@pytest.mark.parametrize("dtype", [*WIDE, "bfloat16"])
def test_gaps_that_overflow(dtype):
    out = "float64" if dtype == "float64" else "float32"
    big, lowest = HUGE[dtype], float(jnp.finfo(dtype).min)
    for wrap in (lambda f: f, jax.jit):
        entropy, kl = wrap(jaxsoft.entropy), wrap(jaxsoft.kl_divergence)
        for row in ([big, -big], [lowest, -lowest], [0, lowest], [-INF, lowest]):
            x = jnp.array(row, dtype)
            assert entropy(x) == entropy(x[::-1]) == 0
            assert kl(x, x) == 0
            close(kl(x, jnp.zeros(2, dtype)), np.log(2), out)
            by_x, by_y = jax.grad(jaxsoft.kl_divergence, (0, 1))(x, jnp.zeros(2, dtype))
            assert not np.any(by_x)
            np.testing.assert_array_equal(np.sort(np.asarray(by_y, float)), [-0.5, 0.5])
        # Half of what the gap of 2 big is beyond the largest number.
        spread = jnp.array([big, -big], dtype)
        close(kl(jnp.zeros(2, dtype), spread), spread[0], out)


@pytest.mark.parametrize("dtype", SECOND_SLOW)
def test_every_order_beside_the_lowest_number(dtype):
    lowest = float(np.finfo(dtype).min)
    for low in (lowest, lowest / 2, -1e9, -INF):
        got = information()(jnp.array([1, 2, low], dtype))
        p = 1 / (1 + np.exp(1))
        difference = np.array([1.0, -1.0, 0.0])
        # Of two classes with gap g: dH/dg = -g p q, d²H/dg² = -p q - g d(p q)/dg.
        slope, second = -p * (1 - p), -p * (1 - p) + p * (1 - p) * (1 - 2 * p)
        for order, by in got[0].items():
            right = [
                -p * np.log(p) - (1 - p) * np.log1p(-p),
                -slope * difference,
                second * np.outer(difference, difference),
            ][len(order)]
            close(by, right, dtype, size=0.2)
        right = ExactDivergence(np.array([1, 2, -INF]), np.array([0, 0.5, 1]))
        close(got[1][""], right.value, dtype, size=1)
        for order in ORDERS[1:]:
            wanted = right.by_x if len(order) == 1 else right.hessian()[:3, :3]
            close(got[1][order], wanted, dtype, 16, size=1)


# ------------------------------------------------------------------ targets of masked classes

SOFT = [0.5, 0.3, 0.2]
SEEN = [True, True, False]


@functools.cache
def soft_loss(smoothed):
    options = {"label_smoothing": 0.1, "temperature": 2.0, "z_loss": 0.1} if smoothed else {}
    fun = lambda x, y: jaxsoft.cross_entropy(x, y, where=jnp.array(SEEN), **options)

    def everything(x, y):
        first = [mode(fun, (0, 1))(x, y) for mode in MODES.values()]
        return fun(x, y), first, [derivative(fun, order)(x, y) for order in ORDERS[3:]]

    return jax.jit(everything)


@pytest.mark.parametrize(
    ("dtype", "smoothed"),
    [
        ("float32", False),
        ("float64", True),
        ("bfloat16", False),
        slow("float32", True),
        slow("float64", False),
        slow("bfloat16", True),
    ],
)
def test_a_masked_class_has_no_target(dtype, smoothed):
    x = jnp.array([0, 1, 2], dtype)
    run = soft_loss(smoothed)
    wanted = run(x, jnp.array([*SOFT[:2], 0], dtype))
    for hidden in (0.2, NAN, INF, -1.0):
        for logit in (2.0, NAN, INF, -INF):
            got = run(x.at[2].set(logit), jnp.array([*SOFT[:2], hidden], dtype))
            jax.tree.map(np.testing.assert_array_equal, got, wanted)
    loss, first, _ = wanted
    if not smoothed:
        assert abs(loss - 0.7506) < (5e-3 if dtype == "bfloat16" else 1e-4)
        log_p = np.array([0, 1]) - np.log1p(np.e)
        y = np.asarray(jnp.array(SOFT[:2], dtype), float)
        close(loss, -y @ log_p, "float64" if dtype == "float64" else "float32")
        for by_x, by_y in first:
            close(by_x, [*(y.sum() * np.exp(log_p) - y), 0], by_x.dtype.name, size=1)
            close(by_y, [*-log_p, 0], by_y.dtype.name)
    eager = jaxsoft.cross_entropy(x, jnp.array(SOFT, dtype), where=jnp.array(SEEN))
    assert smoothed or eager == loss


def test_masked_targets_with_class_weights_and_more_axes():
    x, y = jnp.array([[0.0, 1, 2]] * 2), jnp.array([SOFT, [0.1, NAN, 0.4]])
    where = jnp.array([SEEN, [True, False, True]])
    alone = [
        jaxsoft.cross_entropy(x[0, :2], y[0, :2], class_weights=jnp.array([1.0, 2.0])),
        jaxsoft.cross_entropy(x[1, ::2], y[1, ::2], class_weights=jnp.array([1.0, 3.0])),
    ]
    w = jnp.array([1.0, 2.0, 3.0])
    for fun in (jaxsoft.cross_entropy, jax.jit(jaxsoft.cross_entropy)):
        close(fun(x, y, where=where, class_weights=w), alone, "float64")
    for mean in ("mean", "sum"):
        loss = jaxsoft.cross_entropy(x.T, y.T, 0, where.T, class_weights=w, reduction=mean)
        close(loss, np.mean(alone) * (1 if mean == "mean" else 2), "float64")
    # Of a row masked throughout there is no target; an id on a masked class costs infinity.
    assert jaxsoft.cross_entropy(x[0], y[0], where=jnp.zeros(3, bool)) == 0
    assert jaxsoft.cross_entropy(x[0] - INF, y[0]) == INF
    assert jaxsoft.cross_entropy(x[0], 2, where=where[0]) == INF


# -------------------------------------------------- smoothing over what a bias takes out

BIAS = [0.5, -INF, -1.0, 0.25, -INF]
OPTIONS_OF_LAYER = (("temperature", 0.5), ("z_loss", 0.1), ("softcap", 4.0))


@functools.cache
def of_layer(reduction, chunk, options):
    def fused(x, w, bias, labels):
        return jaxsoft.linear_cross_entropy(
            x,
            w,
            labels,
            bias=bias,
            label_smoothing=0.2,
            reduction=reduction,
            token_chunk=chunk,
            vocab_chunk=chunk,
            **dict(options),
        )

    def plain(x, w, bias, labels):
        return jaxsoft.cross_entropy(
            x @ w + jnp.where(bias == -INF, 0, bias)[None],
            labels,
            where=jnp.array(BIAS) > -INF,
            label_smoothing=0.2,
            reduction=reduction,
            **dict(options),
        )

    by = (0, 1, 2)
    of_fused = lambda *a: (fused(*a), jax.jacrev(fused, by)(*a), jax.jacfwd(fused, by)(*a))
    return jax.jit(of_fused), jax.jit(lambda *a: (plain(*a), jax.jacrev(plain, by)(*a)))


@pytest.mark.parametrize(
    ("reduction", "chunk", "options", "dtype"),
    [
        ("mean", None, (), "bfloat16"),
        ("none", 2, (), "float32"),
        ("mean", 2, OPTIONS_OF_LAYER, "float64"),
        slow("mean", None, (), "float32"),
        slow("mean", None, (), "float64"),
        slow("none", 2, (), "float64"),
        slow("mean", 2, OPTIONS_OF_LAYER, "float32"),
    ],
)
def test_a_class_that_a_bias_takes_out_is_not_smoothed_over(reduction, chunk, options, dtype):
    rng = np.random.default_rng(4)
    x, w, labels = rng.normal(size=(3, 2)), rng.normal(size=(2, 5)), jnp.array([0, 3, 2])
    fused, plain = of_layer(reduction, chunk, options)
    given = [np.array(a, DTYPES[dtype]) for a in (x, w, BIAS)]
    loss, *gradients = fused(*given, labels)
    wanted, by = plain(*(a.astype(float) for a in given), labels)
    close(loss, wanted, loss.dtype.name, size=2)
    assert np.all(np.isfinite(loss))
    for gradient in gradients:
        for one, other in zip(gradient, by, strict=True):
            close(np.asarray(one).astype(DTYPES[dtype]), other, dtype, 16, size=1)
            assert np.all(np.isfinite(np.asarray(one, float)))
        assert not np.any(gradient[2][..., 1])


# --------------------------------------------------------------- types of 8 bits, and caps


def of_masked(x, where):
    """Every function of a masked row, by name."""
    cross_entropy = lambda x: jaxsoft.cross_entropy(x, 0, where=where)
    return {
        "softmax": jaxsoft.softmax(x, where=where),
        "log_softmax": jaxsoft.log_softmax(x, where=where),
        "logsumexp": jaxsoft.logsumexp(x, where=where),
        "entropy": jaxsoft.entropy(x, where=where),
        "kl_divergence": jaxsoft.kl_divergence(x, x[::-1], where=where),
        "cross_entropy": cross_entropy(x),
        "gradient": jax.grad(cross_entropy)(x),
    }


of_masked_jitted = jax.jit(of_masked)


@pytest.mark.parametrize(
    ("dtype", "jit"),
    [(dtype, True) for dtype in SIGNED_FLOAT8]
    + [("float8_e4m3fn", False)]
    + [slow(dtype, False) for dtype in SIGNED_FLOAT8 if dtype != "float8_e4m3fn"],
)
def test_8_bits_with_a_mask(unchecked, dtype, jit):  # of some jaxtyping does not know
    x, where = np.array([1.0, 2.0, 4.0, -0.5]), np.array([True, True, False, True])
    narrow = jnp.array(x, dtype)
    found = (of_masked_jitted if jit else of_masked)(narrow, jnp.array(where))
    rights = of_masked_jitted(np.array(x, np.float32), where)
    for name, got in found.items():
        statistic = name in ("entropy", "kl_divergence", "cross_entropy")
        kept = np.dtype(np.float32 if statistic else narrow.dtype)
        assert got.dtype == kept
        seen = where if got.ndim else ...
        right = np.asarray(rights[name]).astype(kept)
        np.testing.assert_array_equal(
            np.asarray(got, float)[seen], right.astype(float)[seen], err_msg=name
        )
        if name in ("softmax", "gradient"):
            assert got[2] == 0


@pytest.mark.parametrize("dtype", SECOND_SLOW)
@pytest.mark.parametrize("fused", [False, True])
def test_caps_of_any_size(dtype, fused):
    x = jnp.array([1, 2, 3], dtype)

    def loss(x, c):
        if not fused:
            return jaxsoft.cross_entropy(x, 0, softcap=c)
        return jaxsoft.linear_cross_entropy(
            x[None], jnp.eye(3, dtype=dtype), np.array([0]), softcap=c
        )

    program = jax.jit(lambda x, c: (loss(x, c), *(m(loss, (0, 1))(x, c) for m in MODES.values())))
    uncapped = float(np.log(np.exp([0, 1, 2]).sum()))
    assert abs(uncapped - 2.4076) < 1e-4
    p = np.exp(np.array([1, 2, 3]) - 1 - uncapped) - np.array([1, 0, 0])
    large = [INF, float(np.finfo(dtype).max), 1e38, 1e30] + [1e308] * (dtype == "float64")
    for c in large:
        close(loss(x, c), uncapped, dtype)
        value, *by = program(x, jnp.asarray(c, dtype))
        close(value, uncapped, dtype)
        for by_x, by_c in by:
            close(by_x, p, dtype)
            assert abs(by_c) < 1e-25
    for c in (1e-38, 1e-30, 1e-45, 5e-324):
        close(loss(x, c), np.log(3), dtype)
    for c in (0.001, 1e-15, 1e-30, float(np.finfo(dtype).tiny)):
        value, *by = program(x, jnp.asarray(c, dtype))
        close(value, np.log(3), dtype)
        for by_x, by_c in by:
            assert not np.any(by_x)
            close(by_c, 0, dtype, 2, size=1)
    for c in (np.float32(INF), np.array(INF), jnp.asarray(INF)):
        close(loss(x, c), uncapped, dtype)
    for wrong in (0, -1.0, NAN, -INF):
        with pytest.raises(ValueError, match=r"softcap must lie in \(0, inf\)"):
            loss(x, wrong)
    z_loss = r"cross_entropy: z_loss must lie in \[0, inf\), got inf"
    with pytest.raises(ValueError, match=z_loss):
        jaxsoft.cross_entropy(x, 0, z_loss=INF)
    with pytest.raises(ValueError, match=z_loss):
        jaxsoft.linear_cross_entropy(x[None], jnp.eye(3, dtype=dtype), np.array([0]), z_loss=INF)


# ------------------------------------------------------------------------ dtypes of statistics


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_of_16_bits_are_float32(dtype):
    x = jnp.linspace(-1, 1, 410).astype(dtype)
    right = Exact(np.asarray(x))
    entropy = -mpmath.fsum(p * log_p for p, log_p in zip(right.p, right.log_p, strict=True))
    y = np.asarray(x)[::-1]
    divergence = ExactDivergence(np.asarray(x), y).value
    kl = jaxsoft.kl_divergence
    both = lambda x, y: [jaxsoft.entropy(x), kl(x, y), kl(y, x)]
    with jax.numpy_dtype_promotion("standard"):
        for other in (y, y.astype("float32")):
            for got in (both(x, other), jax.jit(both)(x, other)):
                for one, wanted in zip(got, (entropy, divergence, divergence), strict=True):
                    close(one, wanted, "float32")
        assert jax.eval_shape(kl, x, y.astype("float64")).dtype == np.float64
    assert jaxsoft.entropy(x[:0]).dtype == kl(x[:0], x[:0]).dtype == np.float32
    drop_ins = (jaxsoft.softmax, jaxsoft.log_softmax, jaxsoft.logsumexp)
    kept = jax.jit(lambda x: [jax.grad(jaxsoft.entropy)(x), *(fun(x) for fun in drop_ins)])(x)
    assert all(out.dtype == dtype for out in kept)
    tangent = jax.eval_shape(lambda x: jax.jvp(jaxsoft.entropy, (x,), (x,))[1], x)
    assert tangent.dtype == np.float32


# ------------------------------------------------------------------------- sizes of programs


def instructions(fun, n):
    """Of the compiled gradient of a product with the Hessian."""
    x = jax.ShapeDtypeStruct((8, n), jnp.float32)
    product = lambda x, v, c: jax.jvp(jax.grad(lambda x: fun(x, c)), (x,), (v,))[1]
    penalty = jax.grad(lambda x, v, c: jnp.sum(product(x, v, c) ** 2))
    return jax.jit(penalty).lower(x, x, x).compile().as_text().count(" = ")


@pytest.mark.parametrize(
    "fun",
    [
        lambda x, c: jnp.sum(c * jaxsoft.softmax(x)),
        lambda x, c: jnp.sum(c * jaxsoft.log_softmax(x)),
        lambda x, c: jnp.sum(jaxsoft.cross_entropy(x, np.arange(8))),
        lambda x, c: jnp.sum(jaxsoft.cross_entropy(x, c)),
    ],
    ids=["softmax", "log_softmax", "cross_entropy", "cross_entropy, soft"],
)
def test_programs_of_few_classes_are_no_larger(fun):
    most = 1.5 * instructions(fun, 17)
    for n in (10, 16):
        assert instructions(fun, n) <= most


# --------------------------------------------------------------------------- symbolic sizes


def of_everything(x, w, labels):
    """Every function, with its gradient."""
    where, row = x < 1, jnp.exp(labels.astype(x.dtype))[:, None]
    scalars = {
        "softmax": lambda x: (jaxsoft.softmax(x) ** 2).sum(),
        "softmax, options": lambda x: (
            jaxsoft.softmax(x, where=where, temperature=row, sink=row) ** 2
        ).sum(),
        "log_softmax": lambda x: (jaxsoft.log_softmax(x) ** 2).sum(),
        "logsumexp": lambda x: (jaxsoft.logsumexp(x, -1) ** 2).sum(),
        "logsumexp, b": lambda x: (jaxsoft.logsumexp(x, -1, x * x + 1, where=where) ** 2).sum(),
        "entropy": lambda x: jaxsoft.entropy(x, where=where, temperature=row).sum(),
        "kl_divergence": lambda x: jaxsoft.kl_divergence(x, x * x, temperature=row).sum(),
        "cross_entropy": lambda x: jaxsoft.cross_entropy(
            x, labels, ignore_index=2, label_smoothing=0.1, z_loss=0.1, reduction="mean"
        ),
        "cross_entropy, soft": lambda x: jaxsoft.cross_entropy(x, x * x, where=where).sum(),
        "linear_cross_entropy": lambda x: jaxsoft.linear_cross_entropy(x, w, labels),
        "linear_cross_entropy, none": lambda x: jaxsoft.linear_cross_entropy(
            x, w, labels, label_smoothing=0.1, z_loss=0.1, temperature=row, reduction="none"
        ).sum(),
        "has_aux": lambda x: jaxsoft.linear_cross_entropy(x, w, labels, has_aux=True)[
            1
        ].log_partition.sum(),
        "linear_log_probs": lambda x: sum(
            map(jnp.sum, jaxsoft.linear_log_probs(x, w, labels, temperature=row)[:3])
        ),
        "linear_kl_divergence": lambda x: jaxsoft.linear_kl_divergence(x, w, x * x, w),
        "sparsemax": lambda x: (jaxsoft.sparsemax(x, temperature=row) ** 2).sum(),
        "entmax": lambda x: (jaxsoft.entmax(x, 1 + row / (1 + row), where=where) ** 2).sum(),
        "entmax_loss": lambda x: jaxsoft.entmax_loss(x, labels, ignore_index=2, reduction="mean"),
        "entmax_jacobian": lambda x: jaxsoft.entmax_jacobian(x, 1.3).trace().sum(),
        "segment_softmax": lambda x: (jaxsoft.segment_softmax(x, labels, 3) ** 2).sum(),
        "segment_logsumexp": lambda x: (jaxsoft.segment_logsumexp(x, labels % 3, 3) ** 2).sum(),
    }
    return {name: jax.value_and_grad(fun)(x) for name, fun in scalars.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["b, 6", "6, n", "b, n"])
def test_every_function_is_exported_with_symbolic_sizes(unchecked, sizes):
    constraints = ["n >= 4"] if "n" in sizes else []
    b, n = jax.export.symbolic_shape(sizes, constraints=constraints)
    shapes = ((b, n), jnp.float64), ((n, n), jnp.float64), ((b,), jnp.int64)
    exported = jax.export.export(jax.jit(of_everything))(
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    )
    rng = np.random.default_rng(7)
    x, w, labels = rng.normal(size=(6, 6)), rng.normal(size=(6, 6)), rng.integers(0, 4, 6)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    jax.tree.map(same, exported.call(x, w, labels), jax.jit(of_everything)(x, w, labels))


# --------------------------------------------------------------------------- jax_debug_nans


@pytest.mark.slow
@pytest.mark.parametrize("off", [True, False])
def test_no_nan_on_valid_input(off):
    x = jnp.array([[1.0, 2.0, 0.5], [0.1, -INF, 0.3], [-INF, -INF, -INF]])
    where, masked = jnp.array([True, True, False]), jnp.array([[True], [False], [True]])
    labels, t = jnp.array([0, 2, 1]), jnp.full((3, 1), 0.5)
    target = jnp.array([[0.2, 0.8, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])
    eye, bias = jnp.eye(3), jnp.array([0.0, -INF, 1.0])
    finite = jnp.array([[1.0, 2.0, 0.5], [0.1, 3.0, 0.3]])
    calls = [
        lambda x: jaxsoft.softmax(x, where=masked, temperature=t, sink=t) ** 2,
        lambda x: jaxsoft.log_softmax(jnp.where(x == -INF, -1e9, x), temperature=t, sink=t),
        lambda x: jaxsoft.logsumexp(x, -1, where=masked),
        lambda x: jaxsoft.logsumexp(x, -1, b=t),
        lambda x: jaxsoft.sparsemax(x, where=masked, temperature=t) ** 2,
        lambda x: jaxsoft.entmax(x, 1.3, where=masked) ** 2,
        lambda x: jaxsoft.entmax(x, 1 + t, where=masked) ** 2,
        lambda x: jaxsoft.entmax_loss(x, labels, where=masked, temperature=t),
        lambda x: jaxsoft.entmax_loss(x, target, 1.3, where=masked),
        lambda x: jaxsoft.entmax_jacobian(x, where=masked).trace(),
        lambda x: jaxsoft.entropy(x, where=where, temperature=t),
        lambda x: jaxsoft.kl_divergence(x, x, where=masked, temperature=t),
        lambda x: jaxsoft.cross_entropy(
            x,
            labels,
            where=jnp.logical_or(where[None], masked),
            temperature=t,
            z_loss=jnp.asarray(0.1),
            softcap=jnp.asarray(30.0),
            label_smoothing=jnp.asarray(0.1),
            class_weights=t[:, 0],
        )[0],
        lambda x: jaxsoft.cross_entropy(
            x, labels, ignore_index=1, weights=t[:, 0], where=jnp.ones(3, bool), reduction="mean"
        ),
        lambda x: jaxsoft.cross_entropy(x, target, where=where),
        lambda x: (
            jaxsoft.linear_cross_entropy(
                finite,
                eye,
                labels[:2],
                bias=bias,
                temperature=t[:2],
                z_loss=jnp.asarray(0.1),
                label_smoothing=jnp.asarray(0.1),
                softcap=jnp.asarray(30.0),
            )
            + 0 * x[0, 0]
        ),
        lambda x: (
            jaxsoft.linear_log_probs(finite, eye, labels[:2], bias=bias, temperature=t[:2]).entropy
            + 0 * x[0, 0]
        ),
        lambda x: (
            jaxsoft.linear_kl_divergence(
                finite, eye, finite[::-1], eye, bias=bias, teacher_bias=bias, temperature=t[:2]
            )
            + 0 * x[0, 0]
        ),
        lambda x: jaxsoft.segment_softmax(x, np.array([0, 0, -1]), 2, temperature=0.5) ** 2,
    ]
    jax.clear_caches()
    with jax.debug_nans(True), jax.disable_jit(off):
        for i, fun in enumerate(calls):
            total = lambda x, fun=fun: jnp.sum(jnp.where(jnp.isinf(out := fun(x)), 0, out))
            value, gradient = jax.value_and_grad(total)(x)
            assert np.isfinite(value), i
            assert np.all(np.isfinite(gradient)), i
        by_w = jax.grad(jaxsoft.linear_cross_entropy, 1)(finite, eye, labels[:2], bias=bias)
        assert np.all(np.isfinite(by_w))


# --------------------------------------------------- cotangents of classes that are out


SINKS = (None, 0.5)


def pullbacks(x, where, g, temperature):
    """By softmax and log_softmax, without and with a sink."""
    return [
        jax.vjp(lambda x: fun(x, where=where, sink=sink, temperature=temperature), x)[1](g)[0]  # noqa: B023
        for fun in (jaxsoft.softmax, jaxsoft.log_softmax)
        for sink in SINKS
    ]


@functools.cache
def of_rows(temperature):
    return jax.jit(jax.vmap(functools.partial(pullbacks, temperature=temperature)))


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize(
    ("temperature", "dtype"), [(1.0, "float32"), (0.5, "float64"), (2.0, "bfloat16")]
)
def test_the_cotangent_of_a_class_that_is_out_has_no_influence(temperature, dtype, n):
    rng = np.random.default_rng(n)
    x, g = (rng.normal(size=n).astype(DTYPES[dtype]) for _ in range(2))
    second = np.arange(n) == 1
    bad = [0, NAN, INF, -INF, float(jnp.finfo(dtype).max)]
    for given, mask in ((x, ~second), (np.where(second, x.dtype.type(-INF), x), second | True)):
        rows = [np.where(second, x.dtype.type(cotangent), g) for cotangent in bad]
        repeated = (np.stack([row] * len(bad)) for row in (given, mask))
        jitted = of_rows(temperature)(*repeated, np.stack(rows))
        for wanted, *others in jitted:
            assert np.all(np.isfinite(np.asarray(wanted, float)))
            assert wanted[1] == 0
            for got in others:
                np.testing.assert_array_equal(got, wanted)
        if n == 3 and dtype == "float32":
            for got, (wanted, *_) in zip(
                pullbacks(given, mask, rows[1], temperature), jitted, strict=True
            ):
                close(got, wanted, dtype, size=1)


# -------------------------------------------------------- options that are wrapped arrays


def test_options_with_a_jax_array_of_their_own(unchecked):
    x, y = jnp.array([[1.0, 2, 0.5], [0.1, 0.2, 0.3]]), jnp.array([[0.0, 1, 2], [1, 0, 1]])
    labels, row = jnp.array([0, 2]), jnp.array([[0.5], [2.0]])
    where, eye = jnp.array([[True, True, False], [True, True, True]]), jnp.eye(3)
    number, classes, weights = jnp.asarray(0.1), jnp.array([1.0, 2, 0.5]), jnp.array([1.0, 3])
    of_loss = {
        "class_weights": classes,
        "weights": weights,
        "label_smoothing": number,
        "z_loss": number,
        "softcap": jnp.asarray(5.0),
        "temperature": row,
    }
    calls = [
        (jaxsoft.softmax, (x,), {"where": where, "temperature": row, "sink": row}),
        (jaxsoft.log_softmax, (x,), {"where": where, "temperature": row, "sink": row}),
        (jaxsoft.logsumexp, (x, -1), {"b": y, "where": where}),
        (jaxsoft.entropy, (x,), {"where": where, "temperature": row}),
        (jaxsoft.kl_divergence, (x, y), {"where": where, "temperature": row}),
        (jaxsoft.cross_entropy, (x, labels), {"where": where[1], **of_loss}),
        (jaxsoft.cross_entropy, (x, y), {"where": where, **of_loss}),
        (jaxsoft.linear_cross_entropy, (x, eye, labels), {"bias": classes, **of_loss}),
        (jaxsoft.softmax_jvp, (x, y), {}),
        (jaxsoft.softmax_vjp, (x, y), {}),
        (jaxsoft.softmax_derivative, (x, labels, labels), {}),
    ]

    def parameter(value):
        return Parameter(value) if isinstance(value, jax.Array) else value

    traced = jax.jit(
        lambda options: [
            fun(*args, **{name: Parameter(value) for name, value in of.items()})
            for (fun, args, _), of in zip(calls, options, strict=True)
        ]
    )([options for *_, options in calls])
    for (fun, args, options), jitted in zip(calls, traced, strict=True):
        wanted = fun(*args, **options)
        wrapped = map(parameter, args), {k: parameter(v) for k, v in options.items()}
        got = fun(*wrapped[0], **wrapped[1])
        np.testing.assert_array_equal(got, wanted, err_msg=fun.__name__)
        assert np.all(np.isfinite(np.where(np.asarray(wanted) == -INF, 0, wanted)))
        np.testing.assert_allclose(jitted, wanted, rtol=1e-14, err_msg=fun.__name__)
    weights = jaxsoft.softmax_jacobian(Parameter(x), temperature=Parameter(row)).weights
    np.testing.assert_array_equal(weights, jaxsoft.softmax_jacobian(x, temperature=row).weights)
    # Differentiable by the wrapped array.
    by = jax.grad(lambda t: jaxsoft.softmax(x, temperature=Parameter(t))[0, 0])
    np.testing.assert_array_equal(
        by(row), jax.grad(lambda t: jaxsoft.softmax(x, temperature=t)[0, 0])(row)
    )


# Temperatures of all rows, and of each row.
TEMPERATURES = np.array(2.0), np.array([[0.5], [4.0]])


def of_temperatures(fun, modes, x, y, ts):
    """For each temperature the value and the Jacobians; in float32 and wider ∂²/∂t² as well."""
    return [
        (
            fun(x, y, t),
            [derive(fun, (0, 1, 2))(x, y, t) for derive in modes],
            [] if t.dtype.itemsize == 2 else jax.hessian(lambda t: fun(x, y, t).sum())(t),
        )
        for t in ts
    ]


@functools.cache
def divided():
    """In float64, of logits divided by the temperature."""
    fun = lambda x, y, t: jaxsoft.kl_divergence(x / t, y / t)
    return jax.jit(lambda *args: of_temperatures(fun, [jax.jacrev], *args))


@pytest.mark.parametrize("dtype", [*SECOND_SLOW, slow("bfloat16")])
def test_kl_divergence_at_a_temperature(dtype):
    rows = np.array([[1, 2, 0.5], [4, -2, 0]]), np.array([[0, 1, 2], [1, 0, 1]], float)
    x, y, *ts = (jnp.array(a, dtype) for a in (*rows, *TEMPERATURES))
    out = "float64" if dtype == "float64" else "float32"
    at = lambda x, y, t: jaxsoft.kl_divergence(x, y, temperature=t)
    found = jax.jit(lambda *args: of_temperatures(at, MODES.values(), *args))(x, y, ts)
    rights = divided()(*rows, TEMPERATURES)
    for t, (value, jacobians, hessian), right in zip(ts, found, rights, strict=True):
        for got in (value, at(x, y, t)):
            close(got, right[0], out, size=1)
        for by in jacobians:
            for one, other in zip(by, right[1][0], strict=True):
                close(one, other, one.dtype.name, 16, size=2)
        if dtype in WIDE:
            close(hessian, right[2], out, 64, size=4)
    np.testing.assert_array_equal(at(x, y, 2.0), at(x, y, ts[0]))


def test_shapes_broadcast_as_in_jax():
    rng = np.random.default_rng(8)
    x, y, where = (
        rng.normal(size=(2, 3, 4)),
        rng.normal(size=4),
        np.array([True, True, False, True]),
    )
    full, mask = np.broadcast_to(y, x.shape), np.broadcast_to(where, x.shape)
    target, column = np.exp(y) / np.exp(y).sum(), np.array([[0.25], [0.5], [1.0]])
    kl, cross_entropy = jaxsoft.kl_divergence, jaxsoft.cross_entropy

    def pairs():
        """What is equal if the shapes are broadcast."""
        return [
            (kl(x, y), kl(x, full)),
            (kl(y, x), kl(full, x)),
            (kl(x, y, where=where), kl(x, full, where=mask)),
            (kl(x[:, :1], x[:1]), kl(*np.broadcast_arrays(x[:, :1], x[:1]))),
            *(
                (cross_entropy(x, of), cross_entropy(x, np.broadcast_to(of, shape)))
                for of, shape in ((target, x.shape), (column, (3, 4)))
            ),
        ]

    for got in (pairs(), jax.jit(pairs)()):
        for one, other in got:
            np.testing.assert_array_equal(one, other)
    by, whole = jax.jit(jax.grad(lambda y, full: kl(x, y).sum() + kl(x, full).sum(), (0, 1)))(
        y, full
    )
    np.testing.assert_allclose(by, whole.sum((0, 1)), rtol=1e-13, atol=1e-14)
    # A mask of more rows than the logits gives a result for each of them.
    rows = np.stack([mask[0, 0], ~mask[0, 0]])
    for mine, peer in (
        (jaxsoft.softmax, jax.nn.softmax),
        (jaxsoft.log_softmax, jax.nn.log_softmax),
        (
            functools.partial(jaxsoft.logsumexp, axis=-1),
            functools.partial(jax.nn.logsumexp, axis=-1),
        ),
    ):
        got = mine(y, where=rows)
        wanted = peer(np.broadcast_to(y, rows.shape), where=rows)
        np.testing.assert_allclose(got, np.where(np.isnan(wanted), -INF, wanted), rtol=1e-14)
    entropies = jaxsoft.entropy(y, where=rows)
    np.testing.assert_array_equal(entropies[1], 0)
    by = jax.grad(lambda q: cross_entropy(x, q).sum())(target)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    np.testing.assert_allclose(by, -log_p.sum((0, 1)), rtol=1e-13)
