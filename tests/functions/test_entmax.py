"""sparsemax, entmax, their Jacobian and their loss: digits, derivatives, sizes and edges."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jaxtyping import Array

import jaxsoft
from jaxsoft.testing import error_in_eps
from tests.exact import DTYPES, EPS
from tests.exact_entmax import Row, rows, sparsemax

OFFSETS = 0.0, 1e4, 1e6
LENGTHS = 1, 2, 3, 10, 100
ALPHAS = 1.0, 1.05, 1.25, 1.5, 1.75, 2.0, 2.5, 4.0
# Few programs: the rows of all lengths are one array, filled up with -inf.
WIDTH = 320

RNG = np.random.default_rng(0)
X, V = (jnp.asarray(RNG.normal(size=(4, 6))) for _ in range(2))
LABELS, TARGETS = jnp.arange(4), jnp.asarray(RNG.dirichlet(np.ones(6), size=4))


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@functools.cache
def entmax(alpha):
    return jax.jit(lambda x: jaxsoft.entmax(x, alpha))


def table(dtype, alpha):
    """Rows by their names, as the dtype has them."""
    return {
        f"{name}, n={n}, {offset:g}": (row + offset).astype(dtype)
        for n in LENGTHS
        for name, row in rows(n, alpha).items()
        for offset in OFFSETS
    }


def filled(given):
    return np.stack([np.pad(x, (0, WIDTH - x.size), constant_values=-np.inf) for x in given])


def assert_close(p, exact, eps, name):
    """Entries and their sum within an eps of 1."""
    error = max(abs(float(mpmath.mpf(float(a)) - b)) for a, b in zip(p, exact, strict=True))
    assert error <= eps, f"{name}: {error / eps:.3g} eps"
    total = mpmath.fsum(float(a) for a in p) - 1
    assert abs(float(total)) <= eps, f"{name}: the sum is off by {float(total) / eps:.3g} eps"


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", slow("float64")])
@pytest.mark.parametrize("alpha", [a if a in (1.0, 1.5, 2.0, 4.0) else slow(a) for a in ALPHAS])
def test_entries_and_sums(alpha, dtype):
    given = table(DTYPES[dtype], alpha)
    found = np.asarray(entmax(alpha)(filled(given.values())))
    for (name, row), p in zip(given.items(), found, strict=True):
        assert not np.any(p[row.size :])
        eps = EPS[dtype] if alpha <= 2 else 2 * EPS[dtype]
        assert_close(p[: row.size], Row(row, alpha).p, eps, name)


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sparsemax_is_that_of_rational_arithmetic(dtype):
    given = table(DTYPES[dtype], 2.0)
    found = np.asarray(entmax(2.0)(filled(given.values())))
    for (name, row), p in zip(given.items(), found, strict=True):
        exact, entries = sparsemax(row), p[: row.size]
        pairs = zip(entries, exact, strict=True)
        errors = [float(Fraction(float(a)) - max(b, 0)) for a, b in pairs]
        assert np.abs(errors).max() <= EPS[dtype], name
        clear = np.array([abs(b) > 8 * EPS[dtype] for b in exact])
        support = np.array([b > 0 for b in exact])
        np.testing.assert_array_equal((entries > 0)[clear], support[clear], err_msg=name)
    np.testing.assert_array_equal(jaxsoft.sparsemax(X), entmax(2.0)(X))


@pytest.mark.optimised
@pytest.mark.parametrize("alpha", [slow(1.05), 1.5, 2.0])
def test_long_rows(alpha):
    n, eps = 50_000, EPS["float32"]
    names = "random", "tied", "dense at the top", "dense at the edge", "harmonic"
    given = {name: rows(n, alpha)[name].astype(np.float32) for name in names}
    found = np.asarray(jax.jit(lambda x: jaxsoft.entmax(x, alpha))(np.stack(list(given.values()))))
    a = np.longdouble(np.float32(alpha)) - 1
    for (name, row), p in zip(given.items(), found, strict=True):
        z = row.astype(np.longdouble) - row.max()
        at = lambda level, z=z: np.maximum(1 + a * (z - level), 0) ** (1 / a)
        low = np.longdouble(0)
        for _ in range(25):  # from below Newton's method climbs
            exact = at(low)
            low += (exact.sum() - 1) / (exact[exact > 0] ** (1 - a)).sum()
        error = np.abs(p - at(low)).max()
        assert error <= eps, f"{name}: {error / eps:.3g} eps"
        assert abs(p.astype(np.longdouble).sum() - 1) <= eps, name


def test_alpha_may_be_an_array_one_for_each_row():
    alphas = np.array([1.0, 1.3, 2.0, 3.0])
    one_by_one = [jaxsoft.entmax(x, alpha) for x, alpha in zip(X, alphas.tolist(), strict=True)]
    np.testing.assert_allclose(jaxsoft.entmax(X, alphas[:, None]), one_by_one, atol=1e-15)
    np.testing.assert_allclose(jaxsoft.entmax(X, 1), jaxsoft.softmax(X), atol=1e-15)
    wrong = jaxsoft.entmax(X, np.array([1.0, 0.9, np.nan, np.inf])[:, None])
    np.testing.assert_array_equal(np.isnan(wrong).all(1), [False, True, True, True])
    # Close to 1 it is softmax, whatever of α - 1 is left.
    nearly = jaxsoft.entmax(X.astype("float32"), np.nextafter(np.float32(1), np.float32(2)))
    np.testing.assert_allclose(nearly, jaxsoft.softmax(X), atol=3 * EPS["float32"])


@pytest.mark.parametrize("alpha", [1.0, 1.05, 1.5, 2.0, 3.0])
def test_derivatives_by_logits_alpha_and_temperature(alpha):
    def fun(given):
        return jaxsoft.entmax(given["x"], given["alpha"], temperature=given["temperature"])

    def moved(by, order):
        # α may not go below 1: differences to one side.
        weights = {2: (-1.5, 2, -0.5)}[order]
        step = lambda k: jax.tree.map(lambda a, d: a + 1e-5 * k * d, given, by)
        return sum(w * fun(step(k)) for k, w in enumerate(weights)) / 1e-5

    given = {"x": X, "alpha": jnp.full((4, 1), alpha), "temperature": jnp.full((4, 1), 0.8)}
    zeros = jax.tree.map(jnp.zeros_like, given)
    for name in given:
        by = zeros | {name: V if name == "x" else jnp.ones((4, 1))}
        found = jax.jvp(fun, (given,), (by,))[1]
        np.testing.assert_allclose(found, moved(by, 2), atol=1e-7)
        back = jax.vjp(fun, given)[1](V)[0][name]
        np.testing.assert_allclose((back * by[name]).sum(), (found * V).sum(), atol=1e-13)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 2.5])
def test_the_jacobian_is_that_of_jacfwd(alpha):
    where = RNG.uniform(size=X.shape) > 0.2
    options = {"where": where, "temperature": np.array([0.5, 1.0, 2.0, 0.9])[:, None]}
    jacobian = jaxsoft.entmax_jacobian(X, alpha, **options)
    dense = jax.jacfwd(lambda x: jaxsoft.entmax(x, alpha, **options))(X)
    dense = jnp.stack([dense[i, :, i] for i in range(4)])
    np.testing.assert_allclose(jacobian.as_matrix(), dense, atol=1e-14)
    eigenvalues = np.linalg.eigvalsh(dense)
    np.testing.assert_allclose(jacobian.eigvalsh(), eigenvalues, atol=1e-14)
    np.testing.assert_allclose(jacobian.norm(2), eigenvalues[:, -1], atol=1e-14)
    support = (jaxsoft.entmax(X, alpha, **options) > 0).sum(1)
    np.testing.assert_array_equal((eigenvalues > 1e-12).sum(1), support - 1)
    inside = (jaxsoft.entmax(X, alpha, **options) > 0).astype(float)
    mean = (inside * V).sum(1, keepdims=True) / inside.sum(1, keepdims=True)
    np.testing.assert_allclose(jacobian.solve(jacobian.mv(V)), inside * (V - mean), atol=1e-12)
    rows = jaxsoft.entmax_jacobian(X.T, alpha, axis=0)
    weights = jaxsoft.entmax_jacobian(X, alpha).weights
    np.testing.assert_allclose(rows.weights, weights, rtol=1e-14, atol=1e-16)


def test_the_jacobian_of_rows_without_a_number():
    x = jnp.array(
        [[-jnp.inf, -jnp.inf], [jnp.nan, 0.0], [jnp.inf, 0.0], [0.0, -jnp.inf], [0.0, 0.0]]
    )
    for alpha in (1.5, 2.0):
        weights = jaxsoft.entmax_jacobian(x, alpha).weights
        top = 0.5 ** (2 - alpha)
        wanted = [[0, 0], [np.nan] * 2, [np.nan] * 2, [1, 0], [top, top]]
        np.testing.assert_allclose(weights, wanted, atol=1e-15)
    assert jaxsoft.entmax_jacobian(x[:, :0]).shape == (5, 0, 0)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("labels", [LABELS, TARGETS], ids=["class ids", "targets"])
def test_the_hessian_of_the_loss_is_the_jacobian(labels, alpha):
    loss = lambda x: jaxsoft.entmax_loss(x, labels, alpha, reduction="sum")
    gradient, product = jax.jvp(jax.grad(loss), (X,), (V,))
    target = labels if labels.ndim == 2 else jax.nn.one_hot(labels, 6)
    np.testing.assert_allclose(gradient, jaxsoft.entmax(X, alpha) - target, atol=1e-15)
    np.testing.assert_allclose(product, jaxsoft.entmax_jacobian(X, alpha).mv(V), atol=1e-15)


# -------------------------------------------------------------------------------------- the loss


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", slow("float64")])
@pytest.mark.parametrize("alpha", [1.0, 1.05, 1.3, 1.5, 1.75, 2.0, slow(2.5), 4.0])
def test_the_loss_keeps_its_digits_down_to_its_margin(alpha, dtype):
    alpha = float(DTYPES[dtype](alpha))
    edge = 1 / max(alpha - 1, 1 / 32)
    short = [2.0**-k for k in range(-3, 26, 2)] if alpha >= 1.25 else np.arange(1.0, 30, 3)
    tops = [(offset, offset - edge + d) for offset in (0.0, 1e4) for d in short if d < edge]
    given = [
        np.array([top, second, second - 2.5, second - tail]).astype(DTYPES[dtype])
        for top, second in tops
        for tail in (3.0, 1e3)
    ]
    losses, gradients = jax.jit(
        jax.vmap(jax.value_and_grad(lambda x: jaxsoft.entmax_loss(x, 0, alpha)))
    )(np.stack(given))
    for x, loss, gradient in zip(given, np.asarray(losses), np.asarray(gradients), strict=True):
        row = Row(x, alpha)
        exact, gap = row.loss(0), float(max(row.z[0] - v for v in row.z if v > -edge))
        if exact < 1e-12:
            continue
        bound = 8 + (gap / 2 if alpha == 1 else 0)
        error = abs(float((mpmath.mpf(float(loss)) - exact) / exact))
        assert error <= bound * EPS[dtype], f"{x}: {error / EPS[dtype]:.3g} eps of {exact}"
        wanted = [row.p[0] - 1, *row.p[1:]]
        errors = [
            abs(float((mpmath.mpf(float(a)) - b) / b))
            for a, b in zip(gradient, wanted, strict=True)
            if abs(b) > 1e-30
        ]
        assert max(errors) <= bound * EPS[dtype], f"{x}: {max(errors) / EPS[dtype]:.3g} eps"


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_beyond_its_margin_the_loss_is_exactly_0(alpha):
    for gap in (1 / (alpha - 1), 1 / (alpha - 1) + 0.5, 1e4, np.inf):
        x = jnp.array([0.0, gap, 0.0]) + 3.0 if gap < np.inf else jnp.array([-np.inf, 3, -np.inf])
        loss, gradient = jax.value_and_grad(jaxsoft.entmax_loss)(x, 1, alpha)
        assert loss == 0
        assert not np.any(gradient)
        np.testing.assert_array_equal(jaxsoft.entmax(x, alpha), [0, 1, 0])


@pytest.mark.parametrize("alpha", [10.0, 47.0])
def test_a_large_alpha_leaves_digits_to_the_loss(alpha):
    for x in ([0.0, 0.0], [1.0, 0.5, 1.0]):
        loss = jaxsoft.entmax_loss(jnp.array(x, "float32"), 0, alpha)
        exact = float(Row(np.array(x), alpha).loss(0))
        assert abs(loss - exact) <= 4 * alpha * EPS["float32"] * exact


@pytest.mark.optimised
def test_the_loss_is_never_negative():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(500, 5)) * 10.0 ** rng.uniform(-8, 3, (500, 1)), "float32")
    labels = jnp.asarray(rng.integers(5, size=500))
    for alpha in (1.3, 2.0):
        of_labels, of_targets = jax.jit(
            lambda x, alpha=alpha: (
                jaxsoft.entmax_loss(x, labels, alpha),
                jaxsoft.entmax_loss(x, jaxsoft.entmax(x, alpha), alpha),
            )
        )(x)
        assert np.all(of_labels >= 0)
        # The targets are the probabilities to their rounding.
        assert np.all((of_targets >= 0) & (of_targets < 1e-6))


def test_for_alpha_1_the_loss_is_cross_entropy():
    both = ((jaxsoft.entmax_loss, {"alpha": 1}), (jaxsoft.cross_entropy, {}))
    options = {"weights": jnp.array([1.0, 0.0, 2.0, 1.0]), "reduction": "mean"}
    for labels in (LABELS, jnp.array([0, 1, -1, 2])):
        more = options | ({"ignore_index": -1} if labels is not LABELS else {})
        found, wanted = jax.jit(
            lambda x, labels=labels, more=more: [
                jax.value_and_grad(f)(x, labels, **alpha, **more) for f, alpha in both
            ]
        )(X)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14), found, wanted)
    entropy = -(TARGETS * jnp.log(TARGETS)).sum(1)
    wanted = jaxsoft.cross_entropy(X, TARGETS) - entropy
    np.testing.assert_allclose(jaxsoft.entmax_loss(X, TARGETS, 1), wanted, rtol=1e-14)


def test_labels_that_do_not_exist_and_rows_that_are_ignored():
    labels = jnp.array([0, 6, -1, 2])
    loss, gradient = jax.vmap(
        jax.value_and_grad(lambda x, y: jaxsoft.entmax_loss(x, y, ignore_index=-1))
    )(X.at[2].set(jnp.nan), labels)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False, False])
    np.testing.assert_array_equal(np.isnan(gradient).any(1), [False, True, False, False])
    assert loss[2] == 0
    assert not np.any(gradient[2])
    assert jaxsoft.entmax_loss(X[:0], labels[:0], reduction="mean") == 0


# ------------------------------------------------------------------------------------ sizes, types


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("alpha", [1.3, 2.0])
def test_16_bit_logits_are_computed_in_float32_and_rounded_once(alpha, dtype):
    x = X.astype(dtype)
    p, pullback = jax.vjp(entmax(alpha), x)
    assert p.dtype == x.dtype
    wide, pullback_of_wide = jax.vjp(entmax(alpha), x.astype("float32"))
    assert np.all(error_in_eps(p, wide) <= 0.6)
    cotangent = V.astype(dtype)
    wanted = pullback_of_wide(cotangent.astype("float32"))[0]
    np.testing.assert_array_equal(pullback(cotangent)[0], wanted.astype(dtype))
    assert jaxsoft.entmax_loss(x, LABELS, alpha).dtype == np.float32
    assert jaxsoft.entmax_jacobian(x, alpha).dtype == np.float32


@pytest.mark.parametrize("fun", [jaxsoft.sparsemax, lambda x: jaxsoft.entmax(x, 1.3)])
def test_no_classes_one_class_integers(fun):
    assert fun(jnp.zeros((3, 0))).shape == (3, 0)
    np.testing.assert_array_equal(
        fun(jnp.array([[5.0], [-jnp.inf], [jnp.nan]])), [[1], [0], [np.nan]]
    )
    np.testing.assert_array_equal(fun(jnp.array([3, 0, 0])), fun(jnp.array([3.0, 0, 0])))
    np.testing.assert_array_equal(fun(jnp.array([3e38, -3e38, 0.0], "float32")), [1, 0, 0])
    assert fun(jnp.array([0.0])).sum() == 1


@pytest.mark.optimised
def test_a_long_row_needs_memory_in_proportion():
    x = jnp.zeros((2, 50_000), "float32")

    def both(x):
        p, pullback = jax.vjp(jaxsoft.sparsemax, x)
        return p, pullback(p)

    memory = jax.jit(both).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 10 * x.nbytes
    text = jax.jit(lambda x: jaxsoft.entmax(x, 1.3)).lower(x).as_text()
    assert "sort" not in text
    assert "top_k" not in text


def test_reverse_mode_keeps_the_probabilities():
    kept = jax.tree.leaves(jax.vjp(jaxsoft.entmax, X)[1])
    arrays = [a for a in kept if isinstance(a, Array) and a.shape == X.shape]
    assert len(arrays) == 1
