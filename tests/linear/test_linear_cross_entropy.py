"""linear_cross_entropy against the loss with the logits, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.testing import error_in_eps
from tests.unfused import ALL, IGNORED, LIMIT, filled, fused, magnitudes, plain, problem


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


# Every size, option, reduction and kind of chunk, in float32 or in float64: no chunks, those that
# do not divide, of one, and larger than the axis.
CASES = [
    ((252, 128, 507), (), "mean", None, None, "float32"),
    ((252, 128, 507), ALL, "mean", 100, 100, "float32"),
    ((252, 123, 507), ALL, "none", 64, None, "float32"),
    ((188, 31, 123), ("bias",), "sum", 50, None, "float32"),
    ((188, 31, 123), ("weights",), "mean", None, 50, "float64"),
    ((188, 31, 123), ("class_weights",), "none", 1000, 1000, "float32"),
    ((188, 31, 123), ("label_smoothing",), "mean", None, 1, "float32"),
    ((188, 31, 123), ("z_loss",), "none", 7, 50, "float64"),
    ((188, 31, 123), ("temperature",), "sum", None, 41, "float32"),
    ((188, 31, 123), ("softcap",), "mean", 1, None, "float64"),
    ((188, 31, 123), ("ignored",), "none", 50, 122, "float32"),
    ((30, 8, 1), ALL, "sum", 7, 5, "float32"),
    # So many classes are taken in two chunks by default, whose logits are kept.
    ((5, 3, 8195), ("label_smoothing", "temperature"), "mean", None, None, "float32"),
]
# More of the same.
SLOW = [
    ((252, 123, 507), ("bias", "ignored"), "mean", 252, 507, "float64"),
    ((5, 3, 8195), ("bias", "ignored"), "none", 2, None, "float64"),
    ((13, 5, 30), ALL, "none", 4, 7, "float64"),
    ((252, 128, 507), (), "sum", None, 100, "float64"),
    ((1, 8, 30), ("weights", "temperature"), "mean", None, 7, "float32"),
    ((1, 8, 30), ("bias", "label_smoothing", "z_loss"), "none", 3, None, "float64"),
    ((13, 5, 30), ALL, "mean", 1, 1, "float32"),
    ((13, 5, 30), ("class_weights", "label_smoothing"), "mean", 12, 29, "float32"),
    ((13, 5, 30), ("temperature", "softcap", "weights"), "sum", None, 30, "float64"),
]


@pytest.mark.parametrize(
    ("size", "names", "reduction", "token_chunk", "vocab_chunk", "dtype"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
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
