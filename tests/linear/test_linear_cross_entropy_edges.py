"""The table of edge cases of linear_cross_entropy: values, and derivatives forward and reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

INF, NAN = np.inf, np.nan
TOKENS, D, N = 4, 3, 5
RNG = np.random.default_rng(0)
GIVEN = {
    "x": RNG.normal(size=(TOKENS, D)),
    "w": RNG.normal(size=(D, N)),
    "bias": RNG.normal(size=N),
    "weights": np.array([1.0, 0.5, 2.0, 1.5]),
}
LABELS = np.array([4, 1, 0, 2])
IGNORED = -100


@functools.cache
def program(reduction, chunks, ignore_index=None):
    """The value and the Jacobians by all arguments, reverse and forward, in one program."""

    def call(arguments, labels):
        return jaxsoft.linear_cross_entropy(
            **arguments,
            labels=labels,
            ignore_index=ignore_index,
            reduction=reduction,
            token_chunk=chunks and chunks[0],
            vocab_chunk=chunks and chunks[1],
        )

    def all_of_it(arguments, labels):
        blocks = [derivative(call)(arguments, labels) for derivative in (jax.jacrev, jax.jacfwd)]
        return call(arguments, labels), *blocks

    return jax.jit(all_of_it)


# A chunk of both that does not divide, and everything at once.
CHUNKS = [(3, 2), None]
chunked = pytest.mark.parametrize("chunks", CHUNKS)


def with_row(row, **changes):
    """The arguments with another first row of x, and other arguments."""
    x = GIVEN["x"].copy()
    x[0] = row
    return GIVEN | {"x": x} | changes


def labelled(label):
    labels = LABELS.copy()
    labels[0] = label
    return labels


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ------------------------------------------------------------------- what does not count


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e4])
def test_everything_ignored(bad):
    arguments = with_row(bad)
    for reduction in ("mean", "none"):
        out, *blocks = program(reduction, CHUNKS[0], IGNORED)(arguments, np.full(4, IGNORED))
        assert not np.any(out)
        for block in blocks:
            assert not any(np.any(leaf) for leaf in block.values())


@pytest.mark.parametrize("bad", [NAN, INF, 1e4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_token_has_no_influence(reduction, bad):
    run = program(reduction, CHUNKS[0], IGNORED)
    labels = labelled(IGNORED)
    out, *blocks = run(with_row(bad), labels)
    same((out, *blocks), run(GIVEN, labels))
    assert np.all(np.isfinite(out))
    for block in blocks:
        assert all(np.all(np.isfinite(leaf)) for leaf in block.values())
        assert not np.any(block["x"][..., 0, :])
        assert not np.any(block["weights"][..., 0])
    if reduction == "mean":  # it is not counted either
        rest = {k: v[1:] if k in ("x", "weights") else v for k, v in GIVEN.items()}
        expected = jaxsoft.linear_cross_entropy(labels=LABELS[1:], **rest)
        np.testing.assert_allclose(out, expected, rtol=1e-15)


@chunked
@pytest.mark.parametrize(
    ("bad", "label"), [(NAN, 4), (INF, 4), (0.5, -1), (0.5, N), (NAN, 2**31 - 1)]
)
def test_a_token_of_weight_zero_has_no_influence(bad, label, chunks):
    weights = np.array([0.0, 0.5, 2.0, 1.5])
    run = program("none", chunks)
    out, *blocks = run(with_row(bad, weights=weights), labelled(label))
    sound, *sound_blocks = run(GIVEN | {"weights": weights}, LABELS)
    same(out, sound)
    for block, expected in zip(blocks, sound_blocks, strict=True):
        assert not np.any(block["weights"][..., 0])  # its loss cannot be computed
        same(block["weights"][1:], expected["weights"][1:])
        for name in ("x", "w", "bias"):
            np.testing.assert_array_equal(block[name], expected[name])


def test_the_derivative_by_a_weight_of_zero():
    weights = np.array([0.0, 0.5, 2.0, 1.5])
    out, *blocks = program("mean", CHUNKS[0], IGNORED)(GIVEN | {"weights": weights}, LABELS)
    losses = np.array(jaxsoft.cross_entropy(GIVEN["x"] @ GIVEN["w"] + GIVEN["bias"], LABELS))
    np.testing.assert_allclose(out, (weights @ losses) / 4, rtol=1e-15)
    for block in blocks:
        np.testing.assert_allclose(block["weights"], (losses - out) / 4, rtol=1e-13)
        assert not np.any(block["x"][0])
    out, *blocks = program("none", CHUNKS[0])(GIVEN | {"weights": weights}, LABELS)
    for block in blocks:
        np.testing.assert_allclose(block["weights"], np.diag(losses), rtol=1e-14)


def test_weights_that_add_up_to_zero():
    arguments = GIVEN | {"weights": np.zeros(TOKENS)}
    out, *blocks = program("mean", CHUNKS[0], IGNORED)(arguments, LABELS)
    assert out == 0
    for block in blocks:
        assert not any(np.any(leaf) for leaf in block.values())


# ---------------------------------------------------------------- what spoils one token alone


def spoils_the_first_alone(result, expected):
    """The first loss and its derivatives are NaN, and the others are untouched."""
    out, *blocks = result
    good, *good_blocks = expected
    assert np.isnan(out[0])
    same(out[1:], good[1:])
    for block, of_good in zip(blocks, good_blocks, strict=True):
        for name in ("x", "weights"):
            assert np.all(np.isnan(block[name][0, 0])), name
            same(block[name][1:, 1:], of_good[name][1:, 1:])
    # What the tokens share: in reverse mode their gradients are added up, with a NaN among them.
    forward, of_good = blocks[1], good_blocks[1]
    for name in ("w", "bias"):
        assert all(np.all(np.isnan(block[name][0])) for block in blocks), name
        same(forward[name][1:], of_good[name][1:])


@chunked
@pytest.mark.parametrize("label", [-1, -N, N, 100, -(2**31), 2**40])
def test_a_label_out_of_range(label, chunks):
    run = program("none", chunks)
    spoils_the_first_alone(run(GIVEN, labelled(label)), run(GIVEN, LABELS))
    out, *blocks = program("mean", CHUNKS[0], IGNORED)(GIVEN, labelled(label))
    assert np.isnan(out)
    assert all(np.all(np.isnan(block["w"])) for block in blocks)


@pytest.mark.parametrize(
    ("dtype", "wrong"), [("int8", -1), ("uint8", 255), ("uint32", 2**32 - 1), ("int64", 2**32 + 1)]
)
def test_labels_of_any_integer_type(dtype, wrong):
    # Chunks of classes begin beyond what int8 holds.
    x, w = np.ones((2, 1)), np.linspace(0, 1, 200)[None]
    call = functools.partial(
        jaxsoft.linear_cross_entropy, x, w, reduction="none", token_chunk=1, vocab_chunk=60
    )
    losses = call(np.array([100, 127], dtype))
    np.testing.assert_array_equal(losses, call(np.array([100, 127])))
    np.testing.assert_allclose(losses, jaxsoft.cross_entropy(x @ w, np.array([100, 127])))
    spoilt = call(np.array([wrong, 127], dtype))
    assert np.isnan(spoilt[0])
    assert spoilt[1] == losses[1]


@chunked
@pytest.mark.parametrize("bad", [(NAN, 0.0, 0.0), (1.0, INF, 1.0), (1.0, 1.0, -INF)])
def test_a_bad_entry_of_x_spoils_its_token_alone(bad, chunks):
    run = program("none", chunks)
    spoils_the_first_alone(run(with_row(np.array(bad)), LABELS), run(GIVEN, LABELS))


# ------------------------------------------------------------------------ classes taken out


UNWEIGHTED = {name: GIVEN[name] for name in ("x", "w", "bias")}


@functools.cache
def unfused():
    def call(arguments, labels):
        logits = arguments["x"] @ arguments["w"] + arguments["bias"][None]
        return jaxsoft.cross_entropy(logits, labels)

    return jax.jit(lambda *args: (call(*args), jax.jacrev(call)(*args)))


@chunked
@pytest.mark.parametrize("label", [4, 3])
def test_a_bias_of_minus_infinity_takes_a_class_out(label, chunks):
    arguments = UNWEIGHTED | {"bias": np.where(np.arange(N) == 3, -INF, GIVEN["bias"])}
    labels = np.array([label, 1, 0, 2])
    out, *blocks = program("none", chunks)(arguments, labels)
    expected, of_logits = unfused()(arguments, labels)
    assert (out[0] == INF) == (label == 3)  # without a probability it costs infinity
    assert np.all(np.isfinite(out[1:]))
    np.testing.assert_allclose(out, expected, rtol=1e-14)
    for block in blocks:
        assert not np.any(block["bias"][..., 3])
        assert not np.any(block["w"][..., 3])
        for name, leaf in block.items():
            np.testing.assert_allclose(leaf, of_logits[name], rtol=1e-13, atol=1e-15)


@chunked
def test_no_class_has_a_probability(chunks):
    run = program("none", chunks)
    out, *blocks = run(UNWEIGHTED | {"bias": np.full(N, -INF)}, LABELS)
    np.testing.assert_array_equal(out, INF)
    for block in blocks:
        assert not any(np.any(leaf) for leaf in block.values())


def test_smoothing_over_a_class_taken_out():
    """It has no part of the smoothed target, whatever its weight."""
    bias = np.array([0.0, -INF, 1.0, 0.5, 0.2])
    labels, kept = LABELS[[0, 0, 2, 3]], bias > -INF
    out = functools.partial(
        jaxsoft.linear_cross_entropy,
        GIVEN["x"],
        GIVEN["w"],
        labels,
        label_smoothing=0.1,
        token_chunk=3,
        vocab_chunk=2,
    )
    alone = functools.partial(
        jaxsoft.linear_cross_entropy,
        GIVEN["x"],
        GIVEN["w"][:, kept],
        np.cumsum(kept)[labels] - 1,
        label_smoothing=0.1,
    )
    whole, part = (
        jax.value_and_grad(lambda b, w, f=f: f(bias=b, class_weights=w)) for f in (out, alone)
    )
    for weights in (
        np.ones(N),
        np.array([1.0, 0.0, 1.0, 1.0, 1.0]),
        np.array([1.0, 2.0, 0.5, 1.0, 3.0]),
    ):
        loss, gradient = whole(bias, weights)
        wanted, by = part(bias[kept], weights[kept])
        np.testing.assert_allclose(loss, wanted, rtol=1e-14)
        np.testing.assert_allclose(gradient[kept], by, rtol=1e-13, atol=1e-15)
        assert gradient[1] == 0


# --------------------------------------------------------------------------- empty and single


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("tokens", "d", "n", "loss"),
    [(3, 2, 1, 0.0), (3, 0, 7, np.log(7)), (3, 2, 0, NAN), (0, 2, 7, 0.0), (0, 2, 0, 0.0)],
)
def test_empty_axes_and_one_class(tokens, d, n, loss, reduction):
    x, w = np.ones((tokens, d)), np.ones((d, n))
    labels = np.zeros(tokens, int)
    call = lambda x, w: jaxsoft.linear_cross_entropy(x, w, labels, reduction=reduction)
    out, pullback = jax.vjp(call, x, w)
    assert out.shape == (() if reduction == "mean" else (tokens,))
    np.testing.assert_allclose(out, np.full(out.shape, loss), rtol=1e-15)
    bars = pullback(jnp.ones_like(out))
    assert [bar.shape for bar in bars] == [x.shape, w.shape]
    assert not any(np.any(bar) for bar in bars)
    tangent = jax.jvp(call, (x, w), (x, w))[1]
    assert tangent.shape == out.shape
    assert not np.any(tangent)


def test_no_class_and_everything_ignored():
    x, w, labels = np.ones((3, 2)), np.ones((2, 0)), np.full(3, IGNORED)
    assert jaxsoft.linear_cross_entropy(x, w, labels, ignore_index=IGNORED) == 0
    assert np.isnan(jaxsoft.linear_cross_entropy(x, w, labels))
