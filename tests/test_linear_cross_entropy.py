"""linear_cross_entropy against the loss with the logits, written out in float64."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.testing import error_in_eps
from tests.exact import DTYPES, Exact

IGNORED = -100
# Arguments besides x and w; "ignored" stands for labels that are.
OPTIONS = ("bias", "weights", "class_weights", "label_smoothing", "z_loss", "temperature")
ALL = (*OPTIONS, "softcap", "ignored")


def problem(size, names, dtype):
    """The arguments named, x and w; the labels; and a cotangent for each token."""
    tokens, d, n = size
    rng = np.random.default_rng(n)
    options = {
        "bias": rng.normal(size=n),
        "weights": rng.uniform(0.5, 2, size=tokens),
        "class_weights": rng.uniform(0.5, 2, size=n),
        "label_smoothing": np.array(0.1),
        "z_loss": np.array(0.01),
        "temperature": rng.uniform(0.5, 2, size=(tokens, 1)),
        "softcap": np.array(5.0),
    }
    arguments = {"x": 3 * rng.normal(size=(tokens, d)), "w": rng.normal(size=(d, n)) / d**0.5}
    arguments |= {name: options[name] for name in names if name != "ignored"}
    labels = rng.integers(n, size=tokens)
    if "ignored" in names:
        labels[1::5] = IGNORED
    cotangent = rng.normal(size=tokens)
    return {k: v.astype(dtype) for k, v in arguments.items()}, labels, cotangent.astype(dtype)


@functools.cache
def fused(reduction, token_chunk=None, vocab_chunk=None, ignore_index=IGNORED):
    """Σ cotangent · out, its gradients by all arguments, and the result itself."""

    def total(arguments, labels, cotangent):
        out = jaxsoft.linear_cross_entropy(
            **arguments,
            labels=labels,
            ignore_index=ignore_index,
            reduction=reduction,
            token_chunk=token_chunk,
            vocab_chunk=vocab_chunk,
        )
        return jnp.sum(cotangent * out), out

    return jax.jit(jax.grad(total, has_aux=True))


# ------------------------------------------------------------------------------ the reference


def plain_losses(a, labels):
    u = a.x @ a.w + a.bias[None]
    capped = a.softcap < np.inf
    c = jnp.where(capped, a.softcap, 1)
    z = jnp.where(capped, c * jnp.tanh(u / c), u) / a.temperature
    top = z.max(1)
    log_total = top + jnp.log(jnp.exp(z - top[:, None]).sum(1))
    losses = log_total[:, None] - z
    hot = labels[:, None] == jnp.arange(z.shape[1])[None]
    even = (a.class_weights[None] * losses).mean(1)
    own = jnp.where(hot, a.class_weights[None] * losses, 0).sum(1)
    loss = (1 - a.label_smoothing) * own + a.label_smoothing * even + a.z_loss * log_total**2
    return jnp.where(labels == IGNORED, 0, a.weights * loss)


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def plain(arguments, labels, cotangent, is_mean):
    """Σ cotangent_i loss_i, for the mean divided by the total weight; one program for a size."""
    a = SimpleNamespace(**arguments)
    losses = plain_losses(a, labels)
    total = jnp.where(is_mean, jnp.where(labels == IGNORED, 0, a.weights).sum(), 1)
    return (cotangent * losses).sum() / total, losses / total


def filled(arguments):
    """In float64, with numbers that change nothing for what is not there."""
    tokens, n = arguments["x"].shape[0], arguments["w"].shape[1]
    neutral = {
        "bias": np.zeros(n),
        "weights": np.ones(tokens),
        "class_weights": np.ones(n),
        "label_smoothing": np.zeros(()),
        "z_loss": np.zeros(()),
        "temperature": np.ones((tokens, 1)),
        "softcap": np.array(np.inf),
    }
    return neutral | {name: np.asarray(v, np.float64) for name, v in arguments.items()}


def magnitudes(wide, labels, cotangent, reduction, logits=True):
    """What the rounding errors of the result and of each gradient are multiples of.

    A logit of size up to S, the sum of |x||w|, is rounded by so many eps of S, and an exponential
    of it by 1 + S relative to itself; the terms of the gradient by the logits, p and y, add up
    without a sign. Without `logits`, what comes of a rounding of these terms alone.
    """
    a = SimpleNamespace(**wide)
    s = (np.abs(a.x) @ np.abs(a.w) + np.abs(a.bias)).max(1) / a.temperature[:, 0]
    s = s if logits else 0 * s
    u = a.x @ a.w + a.bias
    z = (u if np.isinf(a.softcap) else a.softcap * np.tanh(u / a.softcap)) / a.temperature
    log_total = np.log(np.exp(z).sum(1))
    p, n = np.exp(z - log_total[:, None]), z.shape[1]
    alpha = a.label_smoothing
    y = a.class_weights * ((1 - alpha) * (labels[:, None] == np.arange(n)) + alpha / n)
    mass = y.sum(1) + 2 * a.z_loss * np.abs(log_total)
    loss = (1 + s + np.log(n)) * mass + a.z_loss * log_total**2
    by_token = (1 + s) * np.abs(cotangent) * (labels != IGNORED)
    out = (loss * a.weights) * (labels != IGNORED)
    by_weight = np.abs(cotangent) * loss * (labels != IGNORED)
    if reduction != "none":
        out = out.sum()
    if reduction == "mean":
        total = (a.weights * (labels != IGNORED)).sum()
        by_token, out = by_token / total, out / total
        by_weight = (by_weight + np.abs(cotangent) * out) / total
    f = by_token * a.weights
    g = f[:, None] * (mass[:, None] * p + y) / a.temperature
    by_loss = f * (1 + np.log(n))
    return out, {
        "x": g @ np.abs(a.w).T,
        "w": np.abs(a.x).T @ g,
        "bias": g.sum(0),
        "weights": by_weight,
        "class_weights": by_loss @ (labels[:, None] == np.arange(n)) + alpha * by_loss.mean(),
        "label_smoothing": (by_loss * (y.sum(1) + a.class_weights.max())).sum(),
        "z_loss": (f * (log_total**2 + 2 * np.abs(log_total))).sum(),
        "temperature": (g.sum(1) * s)[:, None],
        "softcap": g.sum(),
    }


def check(size, names, reduction, token_chunk, vocab_chunk, dtype):
    arguments, labels, cotangent = problem(size, names, dtype)
    if reduction != "none":
        cotangent = np.full_like(cotangent, cotangent[0])
    given = cotangent if reduction == "none" else cotangent[0]
    gradients, out = fused(reduction, token_chunk, vocab_chunk)(arguments, labels, given)
    wide, cotangent = filled(arguments), np.asarray(cotangent, np.float64)
    exact, exact_out = plain(wide, labels, cotangent, reduction == "mean")
    scale, scales = magnitudes(wide, labels, cotangent, reduction)
    exact_out = exact_out if reduction == "none" else exact_out.sum()
    errors = {"out": error_in_eps(out, exact_out, scale=scale)}
    assert out.dtype == dtype
    assert gradients.keys() == arguments.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        errors[name] = error_in_eps(gradient, exact[name], scale=scales[name])
    errors = {name: float(np.max(error)) for name, error in errors.items()}
    assert max(errors.values()) <= LIMIT, errors
    return errors


LIMIT = 2  # eps of what `magnitudes` returns; the largest error found is 1.03

# Every size, option, reduction and kind of chunk, in float32 or in float64: no chunks, those that
# do not divide, of one, and larger than the axis.
CASES = [
    ((252, 128, 507), (), "mean", None, None, "float32"),
    ((252, 128, 507), ALL, "mean", 100, 100, "float32"),
    ((252, 128, 507), (), "sum", None, 100, "float64"),
    ((252, 123, 507), ALL, "none", 64, None, "float32"),
    ((252, 123, 507), ("bias", "ignored"), "mean", 252, 507, "float64"),
    ((188, 31, 123), ("bias",), "sum", 50, None, "float32"),
    ((188, 31, 123), ("weights",), "mean", None, 50, "float64"),
    ((188, 31, 123), ("class_weights",), "none", 1000, 1000, "float32"),
    ((188, 31, 123), ("label_smoothing",), "mean", None, 1, "float32"),
    ((188, 31, 123), ("z_loss",), "none", 7, 50, "float64"),
    ((188, 31, 123), ("temperature",), "sum", None, 41, "float32"),
    ((188, 31, 123), ("softcap",), "mean", 1, None, "float64"),
    ((188, 31, 123), ("ignored",), "none", 50, 122, "float32"),
    ((1, 8, 30), ("weights", "temperature"), "mean", None, 7, "float32"),
    ((1, 8, 30), ("bias", "label_smoothing", "z_loss"), "none", 3, None, "float64"),
    ((30, 8, 1), ALL, "sum", 7, 5, "float32"),
    # So many classes are taken in two chunks by default, whose logits are kept.
    ((5, 3, 8195), ("label_smoothing", "temperature"), "mean", None, None, "float32"),
    ((5, 3, 8195), ("bias", "ignored"), "none", 2, None, "float64"),
    ((13, 5, 30), ALL, "none", 4, 7, "float64"),
    ((13, 5, 30), ALL, "mean", 1, 1, "float32"),
    ((13, 5, 30), ("class_weights", "label_smoothing"), "mean", 12, 29, "float32"),
    ((13, 5, 30), ("temperature", "softcap", "weights"), "sum", None, 30, "float64"),
]


@pytest.mark.parametrize(
    ("size", "names", "reduction", "token_chunk", "vocab_chunk", "dtype"), CASES
)
def test_equals_the_loss_with_the_logits(size, names, reduction, token_chunk, vocab_chunk, dtype):
    check(size, names, reduction, token_chunk, vocab_chunk, np.dtype(dtype))


# ---------------------------------------------------------------------- shapes and cotangents


def test_equals_cross_entropy_of_the_logits():
    arguments, labels, cotangent = problem((13, 5, 30), ALL, np.float64)

    def unfused(arguments):
        options = dict(arguments)
        logits = options.pop("x") @ options.pop("w") + options.pop("bias")[None]
        weights = options.pop("weights")
        out = weights * jaxsoft.cross_entropy(logits, labels, ignore_index=IGNORED, **options)
        return jnp.sum(cotangent * out), out

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-14),
        fused("none", 4, 7)(arguments, labels, cotangent),
        jax.jit(jax.grad(unfused, has_aux=True))(arguments),
    )


def test_a_cotangent_of_zero():
    arguments, labels, cotangent = problem((13, 5, 30), ALL, np.float64)
    program = fused("none", 4, 7)
    cotangent[3:] = 0
    gradients, _ = program(arguments, labels, cotangent)
    for name in ("x", "weights", "temperature"):
        assert not np.any(gradients[name][3:])
    # The rest of the tokens may as well be others.
    other = arguments | {"x": arguments["x"].copy()}
    other["x"][3:] = 1
    others, _ = program(other, labels, cotangent)
    jax.tree.map(np.testing.assert_array_equal, gradients, others)
    nothing, _ = program(arguments, labels, np.zeros_like(cotangent))
    assert not any(np.any(gradient) for gradient in nothing.values())


def test_any_leading_shape():
    arguments, labels, cotangent = problem((6, 4, 7), ("temperature",), np.float64)
    of_token = [*arguments.keys() - {"w"}]

    def run(shape, token=slice(None)):
        reshaped = lambda leaf: leaf[token].reshape((*shape, *leaf.shape[1:]))
        given = arguments | {name: reshaped(arguments[name]) for name in of_token}
        gradients, out = fused("none", 4, 4)(given, reshaped(labels), reshaped(cotangent))
        assert {k: v.shape for k, v in gradients.items()} == {k: v.shape for k, v in given.items()}
        assert out.shape == shape
        return {"out": out, **gradients}

    flat, stacked = run((6,)), run((2, 3))
    for name, leaf in stacked.items():
        np.testing.assert_array_equal(leaf.reshape(flat[name].shape), flat[name])
    alone = run((), 5)
    for name in ("out", *of_token):
        np.testing.assert_allclose(alone[name], flat[name][5], rtol=1e-14)
    assert not np.any(run((2, 0), slice(0))["w"])


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
        ("sum", None, None, None),
        ("none", None, 4, None),
        ("sum", 3, 4, None),
        ("none", 3, None, 0.7),
        ("sum", None, 4, 0.7),
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
        exact = Exact(logits[i] / scale)
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


# ------------------------------------------------------------------------------ 16 bits

HALVES = ("bfloat16", "float16")


@pytest.mark.parametrize(("reduction", "vocab_chunk"), [("mean", 100), ("none", None)])
@pytest.mark.parametrize("dtype", HALVES)
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


@pytest.mark.parametrize("dtype", HALVES)
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
