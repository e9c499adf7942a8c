"""The functions of x @ w of confident tokens, against 50-digit arithmetic, and of 16-bit types."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxsoft
from jaxsoft.testing import error_in_eps
from tests.exact import DTYPES, Exact
from tests.unfused import LIMIT, filled, fused, magnitudes, plain, problem

pytestmark = pytest.mark.optimised

# ------------------------------------------------------------------------------ exactness

CLASSES, PLACES = 11, (0, 5, 8, 10)  # in chunks of 4: the last begins at 7 and counts from 8 on


def confident_rows():
    """Rows of logits, and their labels: the largest for most."""
    rng = np.random.default_rng(0)
    for offset in (0.0, 1e4):
        for gap in (17, 30, 80):
            for place in PLACES:
                row = rng.normal(size=CLASSES) - 2
                row[place] = gap
                yield offset + row, place
        for label in PLACES:  # and a label that is far from the largest, or near it
            row = rng.normal(size=CLASSES)
            row[2] = 25
            yield offset + row, label
            yield offset + row[::-1].copy() / 10, label
    yield np.full(CLASSES, 3.0), 10


@pytest.mark.parametrize(
    ("reduction", "token_chunk", "vocab_chunk", "temperature"),
    [
        ("none", None, None, None),
        pytest.param("sum", None, None, None, marks=pytest.mark.slow),
        pytest.param("none", None, 4, None, marks=pytest.mark.slow),
        ("sum", 3, 4, None),
        ("none", 3, None, 0.7),
        pytest.param("sum", None, 4, 0.7, marks=pytest.mark.slow),
    ],
)
def test_confident_tokens(reduction, token_chunk, vocab_chunk, temperature):
    """The losses and gradients of single tokens, within the contract of cross_entropy."""
    rows, labels = map(np.array, zip(*confident_rows(), strict=True))
    logits = rows.astype(np.float32)
    options = {}
    if temperature is not None:
        temperature = np.float32(temperature)
        options["temperature"] = np.full((labels.size, 1), temperature)
    # With the identity for x the logits are w, and so is the gradient.
    arguments = {"x": np.eye(labels.size, dtype=np.float32), "w": logits, **options}
    cotangent = np.ones(labels.size, np.float32) if reduction == "none" else np.float32(1)
    gradients, losses = fused(reduction, token_chunk, vocab_chunk)(arguments, labels, cotangent)
    scale = np.float64(1 if temperature is None else temperature)
    worst = {"loss": -np.inf, "gradient": -np.inf}
    total = 0.0
    for i, label in enumerate(labels):
        exact = Exact(logits[i].astype(np.float64) / scale)
        # The division by the temperature rounds the gap once more.
        gaps = exact.gaps / 2 if temperature is None else exact.gaps
        expected = list(exact.p)
        expected[label] = -sum(p for j, p in enumerate(exact.p) if j != label)
        expected = [p / scale for p in expected]
        error = error_in_eps(gradients["w"][i], expected)
        limit = gaps.copy()
        limit[label] = gaps.max()
        worst["gradient"] = max(worst["gradient"], np.max(error - limit))
        if reduction == "none":
            error = error_in_eps(losses[i], -exact.log_p[label])
            worst["loss"] = max(worst["loss"], float(error - gaps.max()))
        total += -exact.log_p[label]
    assert worst["loss"] <= 6
    assert worst["gradient"] <= 8
    if reduction == "sum":
        assert error_in_eps(losses, total) <= 6


def beyond(found, exact, scale, gap, least=0.0):
    """The largest error in eps beyond gap / 2; a scale below `least` is taken for it."""
    error = error_in_eps(found, exact, scale=np.maximum(scale, least))
    return float(np.max(error - gap / 2))


@pytest.mark.parametrize("chunks", [{}, {"token_chunk": 3, "vocab_chunk": 4}])
def test_statistics_of_confident_tokens(chunks):
    """Log-probabilities, entropies and their gradients, within the contract of cross_entropy."""
    rows, labels = map(np.array, zip(*confident_rows(), strict=True))
    logits, x = rows.astype(np.float32), np.eye(labels.size, dtype=np.float32)

    def call(w):
        found = jaxsoft.linear_log_probs(x, w, labels, **chunks)
        return found.log_probs, found.entropy, found.log_partition

    out, pullback = jax.vjp(call, logits)
    none, ones = np.zeros(labels.size, np.float32), np.ones(labels.size, np.float32)
    by_log_prob, by_entropy = (
        pullback(bars)[0] for bars in ((ones, none, none), (none, ones, none))
    )
    limits = {"log_prob": 6, "entropy": 6, "log_partition": 3, "by_log_prob": 8, "by_entropy": 8}
    worst = dict.fromkeys(limits, 0.0)
    for i, label in enumerate(labels):
        exact = Exact(logits[i])
        gap, log_p = exact.gaps.max(), exact.log_p
        entropy = -mpmath.fsum(p * a for p, a in zip(exact.p, log_p, strict=True))
        terms = [p * abs(a) for p, a in zip(exact.p, exact.x, strict=True)]
        size = max(abs(exact.logsumexp), mpmath.fsum(terms))
        by_label = [-p for p in exact.p]
        by_label[label] = mpmath.fsum(p for j, p in enumerate(exact.p) if j != label)
        by_logits, spread = exact.jacobian_product(-logits[i].astype(np.float64))
        errors = {
            "log_prob": beyond(out[0][i], log_p[label], float(-log_p[label]), gap),
            "entropy": beyond(out[1][i], entropy, float(entropy), gap),
            "log_partition": beyond(out[2][i], exact.logsumexp, float(size), 0),
            "by_log_prob": beyond(by_log_prob[i], by_label, np.abs(np.array(by_label, float)), gap),
            "by_entropy": beyond(by_entropy[i], by_logits, spread, gap),
        }
        worst = {name: max(error, errors[name]) for name, error in worst.items()}
    assert all(worst[name] <= limit for name, limit in limits.items()), worst


@pytest.mark.parametrize("distance", [1e-4, 1.0])
@pytest.mark.parametrize("chunks", [{}, {"token_chunk": 3, "vocab_chunk": 4}])
def test_the_divergence_of_confident_tokens(chunks, distance):
    """Of a teacher whose logits differ by the distance; with the gradients by both."""
    rows, _ = map(np.array, zip(*confident_rows(), strict=True))
    teacher, x = rows.astype(np.float32), np.eye(len(rows), dtype=np.float32)
    noise = np.random.default_rng(1).normal(size=rows.shape)
    student = (teacher + distance * noise).astype(np.float32)

    def call(student, teacher):
        return jaxsoft.linear_kl_divergence(x, student, x, teacher, reduction="none", **chunks)

    out, pullback = jax.vjp(call, student, teacher)
    by_student, by_teacher = pullback(np.ones(len(rows), np.float32))
    limits = {"value": 8, "by_student": 8, "by_teacher": 8}
    worst = dict.fromkeys(limits, 0.0)
    # A term below the smallest normal number may be lost.
    finfo = jnp.finfo("float32")
    least = CLASSES * float(finfo.tiny) / float(finfo.eps)
    for i in range(len(rows)):
        p, q = Exact(teacher[i]), Exact(student[i])
        gap = max(p.gaps.max(), q.gaps.max())
        d = [b - a for a, b in zip(p.log_p, q.log_p, strict=True)]
        value = -mpmath.fsum(a * b for a, b in zip(p.p, d, strict=True))
        difference = [b - a for a, b in zip(p.p, q.p, strict=True)]
        by_logits, spread = p.jacobian_product(-np.array(d, np.float64))
        of_both = np.maximum(spread, np.abs(np.array(difference, float)))
        errors = {
            "value": beyond(out[i], value, float(value), gap, least),
            "by_student": beyond(by_student[i], difference, of_both, gap, least),
            "by_teacher": beyond(by_teacher[i], by_logits, spread, gap, least),
        }
        worst = {name: max(error, errors[name]) for name, error in worst.items()}
    assert all(worst[name] <= limit for name, limit in limits.items()), worst


# ------------------------------------------------------------------------------ 16 bits


@pytest.mark.parametrize(
    ("dtype", "reduction", "vocab_chunk"),
    [
        ("bfloat16", "mean", 100),
        pytest.param("bfloat16", "none", None, marks=pytest.mark.slow),
        ("float16", "mean", 100),
        pytest.param("float16", "none", None, marks=pytest.mark.slow),
    ],
)
def test_16_bits_are_computed_in_float32(dtype, reduction, vocab_chunk):
    arguments, labels, cotangent = problem((40, 24, 130), ("bias",), DTYPES[dtype])
    wide = filled(arguments)
    cotangent = cotangent.astype(np.float32)
    if reduction != "none":
        cotangent = np.full_like(cotangent, cotangent[0])
    given = cotangent if reduction == "none" else cotangent[0]
    gradients, out = fused(reduction, 15, vocab_chunk)(arguments, labels, given)
    cotangent = cotangent.astype(np.float64)
    exact, exact_out = plain(wide, labels, cotangent, reduction == "mean")
    scale, scales = magnitudes(wide, labels, cotangent, reduction)
    assert out.dtype == np.float32
    exact_out = exact_out if reduction == "none" else exact_out.sum()
    assert np.max(error_in_eps(out, exact_out, scale=scale)) <= LIMIT
    # The gradients are rounded at the end, and p - y of bfloat16 before the products with x and w.
    eps = {name: float(jnp.finfo(name).eps) for name in ("float32", dtype)}
    _, products = magnitudes(wide, labels, cotangent, reduction, logits=False)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        size = np.maximum(np.abs(exact[name]), float(jnp.finfo(dtype).tiny))
        limit = eps["float32"] * LIMIT * scales[name] + eps[dtype] * 0.51 * size
        if dtype == "bfloat16" and name in ("x", "w"):
            limit += eps[dtype] * 0.51 * products[name]
        assert np.all(np.abs(np.asarray(gradient, np.float64) - exact[name]) <= limit), name


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_gradients_add_up_in_float32(dtype):
    # A sum of this many equal numbers would stop growing at 1 / eps of them in the dtype itself.
    tokens, n = 3000, 4
    x, w = jnp.ones((tokens, 2), dtype), jnp.zeros((2, n), dtype)
    arguments = {"x": x, "w": w, "bias": jnp.zeros(n, dtype)}
    gradients, loss = fused("sum", 1, 3)(arguments, jnp.zeros(tokens, int), np.float32(1))
    expected = tokens * (np.full(n, 0.25) - np.eye(n)[0])
    assert np.max(error_in_eps(gradients["w"], np.stack([expected, expected]))) <= 0.5
    assert np.max(error_in_eps(gradients["bias"], expected)) <= 0.5
    assert error_in_eps(loss, tokens * np.log(n)) <= 8


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_scale_saves_the_gradients_of_float16(reduction):
    tokens = 4
    w = np.array([[2.0, -20, -19, -17, -18, -16]] * tokens, np.float16)
    arguments = {"x": np.eye(tokens, dtype=np.float16), "w": w}
    labels, scale = np.zeros(tokens, int), 2.0**15
    share = np.float32(scale if reduction == "mean" else scale / tokens)
    cotangent = share if reduction == "mean" else np.full(tokens, share)
    gradients, _ = fused(reduction)(arguments, labels, cotangent)
    # All of them are below the smallest number of float16 without the scale.
    p = np.array(Exact(w[0]).p, float)
    expected = np.array([-p[1:].sum(), *p[1:]]) * scale / tokens
    assert np.max(np.abs(expected)) / scale < float(jnp.finfo("float16").smallest_subnormal)
    spacing = np.spacing(expected.astype(np.float16)).astype(float)
    assert np.all(np.abs(np.asarray(gradients["w"], float) - expected) <= 0.51 * np.abs(spacing))
