"""The largest eigenvalue on adversarial rows, against the secular equation in 40 digits."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from jaxsoft import SimplexJacobian

# The size, and the share of the sink: with a large one, and near ties, the iterates climb longest.
CASES = [(n, share) for n in (2, 3, 10, 300, 20_000) for share in (0.0, 0.2)] + [
    (10, 0.9),
    (3, 0.97),
]


def adversarial(n):
    """Weights that are hard: ties, one-hot, Zipf, geometric, a bulk with a spike."""
    rng = np.random.default_rng(n)
    ramp = np.arange(n)
    yield "tied", np.ones(n)
    yield "random", rng.dirichlet(np.ones(n))
    yield "Zipf", 1.0 / (1 + ramp)
    yield "geometric", np.maximum(0.5**ramp, 1e-30)
    yield "slow geometric", 0.999**ramp
    yield "bulk and spike", np.where(ramp == 0, 0.3 * n, 1.0)
    yield "bulk and small spike", np.where(ramp == 0, 1.001, 1.0)
    yield "bulk just below the top", 1 - 1e-6 * np.sqrt(ramp / n)
    yield "two tops", np.where(ramp < 2, 1.0, 1e-3)
    yield "three tops", np.where(ramp < 3, 1.0134 - 0.0134 * (ramp > 0) - 1e-6 * (ramp > 1), 1e-3)
    yield "nearly one-hot", np.where(ramp == 0, 1.0, 1e-9 * rng.uniform(size=n))
    yield "one-hot", np.where(ramp == 0, 1.0, 0.0)


def largest_eigenvalue(s, s0):
    """By Newton's method on 1 / R: in 64 bits, and from there in 40 digits if that is soon done."""
    order = np.sort(np.asarray(s, np.float64))[::-1]
    values, counts = np.unique(order[1:], return_counts=True)
    numbers = [np.longdouble, mpmath.mpf]
    if order.size > 1000 and np.finfo(np.longdouble).nmant >= 63:
        numbers.pop()
    with mpmath.workdps(40):
        value = None
        for number in numbers:
            convert = lambda array, number=number: np.array([number(float(a)) for a in array])
            value = newton(*map(convert, (order[:1], values, counts, [float(s0)])), value)
        return value


def newton(top, poles, counts, sink, value):
    """1 / R is concave: from below the iterates climb."""
    (top,), (sink,) = top, sink
    total = top + (poles * counts).sum() + sink
    second = poles.max()
    weights = np.append(counts * poles * -(poles - top), sink * top) / total
    poles = np.append(poles, 0 * top)[weights > 0]
    weights = weights[weights > 0]
    if not weights.size:
        return second
    pole = poles.max()
    below = top * (total - top + second) / total
    value = below if value is None or not pole < value < top else top * 0 + value
    for _ in range(200):
        terms = weights / -(poles - value)
        r, slope = terms.sum(), (terms**2 / weights).sum()
        step = value + (r - 1) * r / slope
        step = step if step > pole else (value + pole) / 2
        if abs(step - value) <= 1e-17 * value:  # as exact as the square of that
            # Weights that tie for the largest have no pole, and one eigenvalue is theirs.
            return max(step, second)
        value = step
    raise AssertionError("Newton's method did not converge")


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-7), ("float64", 2e-15)])
@pytest.mark.parametrize(("n", "share"), CASES)
def test_the_largest_eigenvalue(n, share, dtype, bound):
    for name, weights in adversarial(n):
        s = (weights / weights.sum() * (1 - share)).astype(dtype)
        jacobian = SimplexJacobian(jnp.asarray(s), jnp.asarray(share, dtype))
        exact = largest_eigenvalue(s, np.asarray(share, dtype))
        value = float(jacobian.norm(2))
        error = abs(value - exact) / exact if exact else mpmath.mpf(abs(value))
        assert error <= bound, (name, float(error))


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_reference_is_the_largest_eigenvalue(share):
    for _, weights in adversarial(10):
        s = weights / weights.sum() * (1 - share)
        matrix = np.diag(s) - np.outer(s, s) / (s.sum() + share)
        expected = np.linalg.eigvalsh(matrix)[-1]
        np.testing.assert_allclose(float(largest_eigenvalue(s, share)), expected, atol=1e-15)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_its_gradient(share):
    weights = np.array([0.3, 0.25, 0.2, 0.15, 0.1]) * (1 - share)
    f = lambda s, s0: SimplexJacobian(jnp.asarray(s), jnp.asarray(s0)).norm(2)
    step = 1e-6
    expected = [
        (f(weights + step * e, share) - f(weights - step * e, share)) / (2 * step)
        for e in np.eye(5)
    ]
    gradient, of_sink = jax.grad(f, (0, 1))(jnp.asarray(weights), jnp.asarray(share))
    np.testing.assert_allclose(gradient, np.array(expected), rtol=1e-8, atol=1e-9)
    slope = (f(weights, share + step) - f(weights, share)) / step
    np.testing.assert_allclose(of_sink, slope, rtol=1e-4, atol=1e-5)
