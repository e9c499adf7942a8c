"""linear_log_probs, linear_kl_divergence and has_aux against the plain form, in float64."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.testing import error_in_eps
from tests.unfused import IGNORED

LIMIT = 1  # eps of what the rounding of the logits leaves; the largest error found is 0.27
LOG_PROBS = ("bias", "temperature", "softcap", "ignored", "several")
KL = ("bias", "temperature", "softcap", "weights", "teacher_bias", "teacher_softcap")


# ------------------------------------------------------------------------ the plain form


def problem(function, size, names, dtype):
    """The arguments of a function, and labels."""
    tokens, d, n = size
    rng = np.random.default_rng(n)
    given = {
        "x": 3 * rng.normal(size=(tokens, d)),
        "w": rng.normal(size=(d, n)) / d**0.5,
        "bias": rng.normal(size=n),
        "temperature": rng.uniform(0.5, 2, size=(tokens, 1)),
        "softcap": np.array(5.0),
        "weights": rng.uniform(0.5, 2, size=tokens),
        "teacher_x": 2 * rng.normal(size=(tokens, d + 1)),
        "teacher_w": rng.normal(size=(d + 1, n)) / d**0.5,
        "teacher_bias": rng.normal(size=n),
        "teacher_softcap": np.array(4.0),
    }
    models = ("x", "w") if function == "log_probs" else ("x", "w", "teacher_x", "teacher_w")
    arguments = {k: given[k].astype(dtype) for k in given if k in names or k in models}
    labels = rng.integers(n, size=(tokens, 3) if "several" in names else (tokens,))
    if "ignored" in names:
        labels[1::5] = IGNORED
    return arguments, labels


def cotangents(out):
    """Of results: numbers of both signs."""
    wave = lambda a: jnp.sin(1 + jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)
    return jax.tree.map(wave, out)


def differentiable(function, labels, options):
    """The results of a function that have derivatives, of a dictionary of arrays."""
    if function == "log_probs":
        options = {"ignore_index": IGNORED, **options}
        return lambda a: jaxsoft.linear_log_probs(labels=labels, **a, **options)[:3]
    return lambda a: jaxsoft.linear_kl_divergence(**a, **options)


@functools.cache
def fused(function, **options):
    """The results and the gradients by all arguments."""

    def both(arguments, labels):
        out, pullback = jax.vjp(differentiable(function, labels, options), arguments)
        return out, pullback(cotangents(out))[0]

    return jax.jit(both)


def scaled(x, w, bias, softcap, temperature):
    u = x @ w + bias[None]
    capped = softcap < np.inf
    c = jnp.where(capped, softcap, 1)
    return jnp.where(capped, c * jnp.tanh(u / c), u) / temperature


def plain(function, arguments, labels, **options):
    """In float64; with neutral numbers for what is not there."""
    a = {k: jnp.asarray(v, jnp.float64) for k, v in arguments.items()}
    n, tokens = a["w"].shape[1], a["x"].shape[0]
    none = {"bias": jnp.zeros(n), "softcap": np.inf, "weights": jnp.ones(tokens)}
    none |= {"temperature": jnp.ones((tokens, 1))} | {f"teacher_{k}": v for k, v in none.items()}
    a = SimpleNamespace(**(none | a))
    z = scaled(a.x, a.w, a.bias, a.softcap, a.temperature)
    if function == "log_probs":
        log_p = jax.nn.log_softmax(z)
        of_labels = jnp.take_along_axis(log_p, labels.reshape(tokens, -1), 1).reshape(labels.shape)
        entropy = -(jnp.exp(log_p) * log_p).sum(1)
        of_labels = jnp.where(labels == IGNORED, 0, of_labels)
        return of_labels, entropy, jax.nn.logsumexp(z, 1)
    t = scaled(a.teacher_x, a.teacher_w, a.teacher_bias, a.teacher_softcap, a.temperature)
    p, q = map(jax.nn.log_softmax, (z, t) if options.get("reverse") else (t, z))
    out = a.weights * (jnp.exp(p) * (p - q)).sum(1)
    if options["reduction"] != "none":
        out = out.sum() / (a.weights.sum() if options["reduction"] == "mean" else 1)
    return out


def rounding(arguments):
    """The largest logit, in absolute terms of the products that it is a sum of: what is rounded."""
    size = 1.0
    for model in ("", "teacher_"):
        if f"{model}x" in arguments:
            bias = arguments.get(f"{model}bias", np.zeros(1))
            products = np.abs(arguments[f"{model}x"]) @ np.abs(arguments[f"{model}w"])
            size = max(size, (products + np.abs(bias)).max())
    return float(size / arguments.get("temperature", np.ones(1)).min())


def check(function, size, names, dtype, **options):
    """Values and gradients are those of the plain form, to what the rounding of logits leaves."""
    arguments, labels = problem(function, size, names, dtype)
    out, gradients = fused(function, **options)(arguments, labels)
    of_loss = {k: v for k, v in options.items() if k in ("reverse", "reduction")}
    wide = {k: v.astype(np.float64) for k, v in arguments.items()}
    wanted, exact = plain_gradients(function, **of_loss)(wide, labels)
    scale = rounding(wide) * (1 + np.log(size[2]))
    errors = {}
    both = zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True)
    for i, (one, other) in enumerate(both):
        assert one.dtype == dtype
        largest = 1 + np.abs(other).max()
        errors[f"result {i}"] = np.max(error_in_eps(one, other, scale=scale * largest))
    assert gradients.keys() == arguments.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        largest = np.abs(exact[name]).max() + 1e-3
        errors[name] = np.max(error_in_eps(gradient, exact[name], scale=scale * largest))
    assert max(errors.values()) <= LIMIT, errors
    return errors


@functools.cache
def plain_gradients(function, **options):
    def both(arguments, labels):
        out, pullback = jax.vjp(lambda a: plain(function, a, labels, **options), arguments)
        return out, pullback(cotangents(out))[0]

    return jax.jit(both)


# Every option, reduction and kind of chunk: none, those that do not divide, of one, and larger than
# the axis.
CASES = [
    ("log_probs", (252, 128, 507), (), "float32", {}),
    ("log_probs", (252, 123, 507), LOG_PROBS, "float32", {"token_chunk": 64, "vocab_chunk": 100}),
    ("log_probs", (188, 31, 123), ("bias", "ignored"), "float64", {"token_chunk": 50}),
    ("log_probs", (188, 31, 123), ("temperature",), "float32", {"vocab_chunk": 1}),
    ("log_probs", (188, 31, 123), ("softcap", "several"), "float64", {"token_chunk": 1000}),
    ("log_probs", (30, 8, 1), LOG_PROBS, "float64", {"token_chunk": 7, "vocab_chunk": 5}),
    ("log_probs", (13, 5, 30), LOG_PROBS, "float64", {"token_chunk": 1, "vocab_chunk": 7}),
    ("kl", (252, 128, 507), (), "float32", {"reduction": "mean"}),
    ("kl", (252, 123, 507), KL, "float32", {"reduction": "none", "vocab_chunk": 100}),
    ("kl", (188, 31, 123), KL, "float64", {"reduction": "mean", "token_chunk": 50}),
    ("kl", (188, 31, 123), KL, "float64", {"reduction": "sum", "reverse": True, "vocab_chunk": 50}),
    ("kl", (30, 8, 1), KL, "float64", {"reduction": "mean", "token_chunk": 7, "vocab_chunk": 5}),
    ("kl", (13, 5, 30), KL, "float64", {"reduction": "none", "reverse": True, "token_chunk": 1}),
]


@pytest.mark.parametrize(("function", "size", "names", "dtype", "options"), CASES)
def test_equals_the_plain_form(function, size, names, dtype, options):
    check(function, size, names, np.dtype(dtype), **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [{}, {"token_chunk": 5, "vocab_chunk": 7}])
def test_the_statistics_of_a_loss(reduction, chunks):
    arguments, labels = problem("log_probs", (13, 5, 30), ("bias", "temperature", "ignored"), float)
    counts = labels != IGNORED

    def call(a, has_aux):
        options = {"ignore_index": IGNORED, "reduction": reduction, **chunks}
        return jaxsoft.linear_cross_entropy(labels=labels, **a, has_aux=has_aux, **options)

    def of_logits(a):
        z = scaled(a["x"], a["w"], a["bias"], np.inf, a["temperature"])
        return jnp.where(counts, jax.nn.logsumexp(z, 1), 0), counts & (z.argmax(1) == labels)

    loss, found = call(arguments, has_aux=True)
    np.testing.assert_array_equal(loss, call(arguments, has_aux=False))
    log_partition, correct = of_logits(arguments)
    np.testing.assert_allclose(found.log_partition, log_partition, rtol=1e-14)
    np.testing.assert_array_equal(found.correct, correct)
    assert 0 < correct.sum() < counts.sum()
    # A z-loss of one's own, beside the loss.
    with_log = lambda fun: lambda a: sum(map(jnp.sum, fun(a)))
    own = lambda a: (call(a, True)[0], call(a, True)[1].log_partition ** 2)
    wanted = lambda a: (call(a, False), of_logits(a)[0] ** 2)
    got, right = jax.jit(lambda a: (jax.grad(with_log(own))(a), jax.grad(with_log(wanted))(a)))(
        arguments
    )
    for name, gradient in got.items():
        np.testing.assert_allclose(gradient, right[name], rtol=1e-12, atol=1e-13)


def test_a_tie_is_correct_and_the_first_of_it_the_largest():
    x, w = np.ones((1, 1)), np.array([[0.5, 2.0, 2.0, 1.0]])
    for label, correct in [(0, False), (1, True), (2, True)]:
        for chunk in (None, 1, 2):
            options = {"has_aux": True, "vocab_chunk": chunk}
            _, found = jaxsoft.linear_cross_entropy(x, w, np.array([label]), **options)
            assert found.correct[0] == correct
            found = jaxsoft.linear_log_probs(x, w, np.array([label]), vocab_chunk=chunk)
            assert found.argmax[0] == 1


@pytest.mark.parametrize("n", [5, 127, 128, 200, 1000])
def test_the_class_with_the_largest_logit(n):
    rng = np.random.default_rng(n)
    w = rng.integers(0, 5, size=(50, n)).astype(float)  # with many ties
    found = jax.jit(lambda w: jaxsoft.linear_log_probs(np.eye(50), w, np.zeros(50, int)).argmax)(w)
    np.testing.assert_array_equal(found, np.argmax(w, 1))
