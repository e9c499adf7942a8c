"""The table of edge cases of linear_log_probs, linear_kl_divergence and has_aux."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
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
}
TEACHER = {
    "teacher_x": RNG.normal(size=(TOKENS, 2)),
    "teacher_w": RNG.normal(size=(2, N)),
    "teacher_bias": RNG.normal(size=N),
}
LABELS = np.array([4, 1, 0, 2])
IGNORED = -100
OUT = np.where(np.arange(N) == 3, -INF, GIVEN["bias"])  # class 3 is out
CHUNKS = [(3, 2), (None, None)]
chunked = pytest.mark.parametrize("chunks", CHUNKS)


@functools.cache
def program(chunks, ignore_index=None):
    """All statistics, and the Jacobians of those that have one, forward and reverse."""

    def call(arguments, labels):
        options = {"token_chunk": chunks[0], "vocab_chunk": chunks[1]}
        options["ignore_index"] = ignore_index
        found = jaxsoft.linear_log_probs(**arguments, labels=labels, **options)
        return found[:3], found

    def all_of_it(arguments, labels):
        derivatives = jax.jacrev, jax.jacfwd
        blocks = [derive(call, has_aux=True)(arguments, labels)[0] for derive in derivatives]
        return call(arguments, labels)[1], *blocks

    return jax.jit(all_of_it)


def with_row(row):
    x = GIVEN["x"].copy()
    x[0] = row
    return GIVEN | {"x": x}


def labelled(*labels):
    return np.array([*labels, *LABELS[len(labels) :]])


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def plain(arguments, labels):
    z = arguments["x"] @ arguments["w"] + arguments["bias"][None]
    log_probs = -jaxsoft.cross_entropy(z, labels)
    return log_probs, jaxsoft.entropy(z), jaxsoft.logsumexp(z, -1)


# ------------------------------------------------------------------------------------ labels


@chunked
def test_an_ignored_label(chunks):
    found, *blocks = program(chunks, IGNORED)(GIVEN, labelled(IGNORED))
    sound, *sound_blocks = program(chunks, IGNORED)(GIVEN, LABELS)
    assert found.log_probs[0] == 0
    same(found.log_probs[1:], sound.log_probs[1:])
    same(found[1:], sound[1:])
    for block, of_sound in zip(blocks, sound_blocks, strict=True):
        assert not any(np.any(leaf[0]) for leaf in block[0].values())
        same(block[1:], of_sound[1:])


@chunked
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_ignored_token_has_no_influence(bad, chunks):
    run = program(chunks, IGNORED)
    found, *blocks = run(with_row(bad), labelled(IGNORED))
    sound, *sound_blocks = run(GIVEN, labelled(IGNORED))
    assert [float(of_token[0]) for of_token in found] == [0] * 4
    same([a[1:] for a in found], [a[1:] for a in sound])
    for block, of_sound in zip(blocks, sound_blocks, strict=True):
        for one, other in zip(block, of_sound, strict=True):
            assert not any(np.any(leaf[0]) for leaf in one.values())
            same({k: v[1:] for k, v in one.items()}, {k: v[1:] for k, v in other.items()})


@chunked
@pytest.mark.parametrize("label", [-1, -N, N, 100, -(2**31), 2**40])
def test_a_label_out_of_range_is_nan_alone(label, chunks):
    found, *blocks = program(chunks)(GIVEN, labelled(label))
    sound, *sound_blocks = program(chunks)(GIVEN, LABELS)
    assert np.isnan(found.log_probs[0])
    same(found.log_probs[1:], sound.log_probs[1:])
    same(found[1:], sound[1:])
    for block, of_sound in zip(blocks, sound_blocks, strict=True):
        same(block[1:], of_sound[1:])
        same({k: v[1:] for k, v in block[0].items()}, {k: v[1:] for k, v in of_sound[0].items()})


@chunked
def test_several_labels_of_a_token(chunks):
    labels = np.stack([LABELS, LABELS, LABELS[::-1], labelled(IGNORED), labelled(N)], 1)
    found, *blocks = program(chunks, IGNORED)(GIVEN, labels)
    for k in range(labels.shape[1]):
        alone, *of_one = program(chunks, IGNORED)(GIVEN, labels[:, k])
        same(found.log_probs[:, k], alone.log_probs)
        same(found[1:], alone[1:])
        for block, of_label in zip(blocks, of_one, strict=True):
            for name, leaf in of_label[0].items():
                wanted = {"rtol": 1e-14, "atol": 1e-16}
                np.testing.assert_allclose(block[0][name][:, k], leaf, **wanted)


@chunked
def test_no_label_at_all(chunks):
    found, *blocks = program(chunks, IGNORED)(GIVEN, np.zeros((TOKENS, 0), int))
    sound, *sound_blocks = program(chunks, IGNORED)(GIVEN, LABELS)
    assert found.log_probs.shape == (TOKENS, 0)
    same(found[1:], sound[1:])
    for block, of_sound in zip(blocks, sound_blocks, strict=True):
        for one, other in zip(block[1:], of_sound[1:], strict=True):
            for name, leaf in other.items():
                np.testing.assert_allclose(one[name], leaf, rtol=1e-13, atol=1e-15)


# ----------------------------------------------------------------------------------- classes


@chunked
@pytest.mark.parametrize("label", [4, 3])
def test_a_bias_of_minus_infinity_takes_a_class_out(label, chunks):
    arguments, labels = GIVEN | {"bias": OUT}, labelled(label)
    found, *blocks = program(chunks)(arguments, labels)
    wanted, exact = jax.jit(lambda *a: (plain(*a), jax.jacrev(plain)(*a)))(arguments, labels)
    assert (found.log_probs[0] == -INF) == (label == 3)
    for i in range(3):
        np.testing.assert_allclose(found[i], wanted[i], rtol=1e-14)
        for block in blocks:
            assert not np.any(block[i]["bias"][:, 3])
            assert not np.any(block[i]["w"][..., 3])
            for name, leaf in block[i].items():
                np.testing.assert_allclose(leaf, exact[i][name], rtol=1e-12, atol=1e-14)


@chunked
def test_no_class_has_a_probability(chunks):
    found, *blocks = program(chunks)(GIVEN | {"bias": np.full(N, -INF)}, LABELS)
    for out, value in zip(found, (-INF, 0, -INF, 0), strict=True):
        np.testing.assert_array_equal(out, value)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(blocks))


@chunked
@pytest.mark.parametrize("bad", [(NAN, 0.0, 0.0), (1.0, INF, 1.0)])
def test_a_bad_entry_of_x_spoils_its_token_alone(bad, chunks):
    found, _, forward = program(chunks)(with_row(np.array(bad)), LABELS)
    sound, _, sound_forward = program(chunks)(GIVEN, LABELS)
    for i in range(3):
        assert np.isnan(found[i][0])
        same(found[i][1:], sound[i][1:])
        for name, leaf in forward[i].items():
            same(leaf[1:], sound_forward[i][name][1:])


@pytest.mark.parametrize(
    ("tokens", "d", "n", "wanted"),
    [
        (3, 2, 1, (0, 0, 0, 0)),
        (3, 0, 7, (-np.log(7), np.log(7), np.log(7), 0)),
        (3, 2, 0, (NAN, 0, -INF, 0)),
        (0, 2, 7, (0, 0, 0, 0)),
        (0, 2, 0, (0, 0, 0, 0)),
    ],
)
def test_empty_axes_and_one_class(tokens, d, n, wanted):
    x, w, labels = np.ones((tokens, d)), np.zeros((d, n)), np.zeros(tokens, int)
    call = lambda x, w: jaxsoft.linear_log_probs(x, w, labels)[:3]
    out, pullback = jax.vjp(call, x, w)
    argmax = jaxsoft.linear_log_probs(x, w, labels).argmax
    for one, value in zip((*out, argmax), wanted, strict=True):
        np.testing.assert_allclose(one, np.full(tokens, value), rtol=1e-15)
    bars = pullback(tuple(jnp.ones(tokens) for _ in range(3)))
    assert [bar.shape for bar in bars] == [x.shape, w.shape]
    divergence = jaxsoft.linear_kl_divergence(x, w, x, w)
    assert divergence == 0
    for gradient, given in zip(
        jax.grad(jaxsoft.linear_kl_divergence, range(4))(x, w, x, w), (x, w) * 2, strict=True
    ):
        np.testing.assert_array_equal(gradient, np.zeros_like(given))


# ------------------------------------------------------------------------------- divergences


@functools.cache
def divergence(chunks, reduction, reverse=False):
    def call(arguments):
        options = {"reduction": reduction, "reverse": reverse}
        options |= {"token_chunk": chunks[0], "vocab_chunk": chunks[1]}
        return jaxsoft.linear_kl_divergence(**arguments, **options)

    def all_of_it(arguments):
        return call(arguments), *(derive(call)(arguments) for derive in (jax.jacrev, jax.jacfwd))

    return jax.jit(all_of_it)


def plain_divergence(arguments, reverse=False):
    student, teacher = (
        arguments[f"{m}x"] @ arguments[f"{m}w"] + arguments[f"{m}bias"][None]
        for m in ("", "teacher_")
    )
    pair = (student, teacher) if reverse else (teacher, student)
    return jaxsoft.kl_divergence(*pair)


@chunked
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lacks", [("bias",), ("teacher_bias",), ("bias", "teacher_bias")])
def test_a_class_that_one_model_lacks_or_both(lacks, reverse, chunks):
    arguments = GIVEN | TEACHER | dict.fromkeys(lacks, OUT)
    out, *blocks = divergence(chunks, "none", reverse)(arguments)
    of = functools.partial(plain_divergence, reverse=reverse)
    np.testing.assert_allclose(out, of(arguments), rtol=1e-13)
    second = "teacher_bias" if reverse else "bias"
    if lacks == (second,):  # of the second alone: nothing bounds the divergence
        np.testing.assert_array_equal(out, INF)
        return
    exact = jax.jacrev(of)(arguments)
    for block in blocks:
        for name, leaf in block.items():
            np.testing.assert_allclose(leaf, exact[name], rtol=1e-12, atol=1e-14)


@chunked
def test_a_teacher_without_a_class(chunks):
    out, *blocks = divergence(chunks, "none")(GIVEN | TEACHER | {"teacher_bias": np.full(N, -INF)})
    assert not np.any(out)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(blocks))


@chunked
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("model", ["x", "teacher_x"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_token_of_weight_zero_has_no_influence(bad, model, reduction, chunks):
    sound = GIVEN | TEACHER | {"weights": np.array([0.0, 0.5, 2.0, 1.5])}
    spoilt = sound | {model: sound[model].copy()}
    spoilt[model][0] = bad
    run = divergence(chunks, reduction)
    out, *blocks = run(spoilt)
    wanted, *exact = run(sound)
    same(out, wanted)
    for block, other in zip(blocks, exact, strict=True):
        assert not np.any(block["weights"][..., 0])
        for name in sound.keys() - {"weights"}:
            same(block[name], other[name])
        same(block["weights"][..., 1:], other["weights"][..., 1:])


def test_a_model_is_no_distance_from_itself():
    arguments = {"x": GIVEN["x"], "w": GIVEN["w"], "teacher_x": GIVEN["x"], "teacher_w": GIVEN["w"]}
    for chunks in CHUNKS:
        for reverse in (False, True):
            out, by, _ = divergence(chunks, "none", reverse)(arguments)
            assert not np.any(out)
            assert max(np.abs(leaf).max() for leaf in by.values()) <= 1e-16


def test_models_of_other_types():
    x, w = GIVEN["x"].astype(np.float32), GIVEN["w"].astype(np.float32)
    narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    for one, other, dtype in [
        ((x, w), narrow, np.float32),
        (narrow, (GIVEN["x"], GIVEN["w"]), np.float64),
        (narrow, narrow, np.float32),
    ]:
        call = functools.partial(jaxsoft.linear_kl_divergence, reduction="none")
        out, pullback = jax.vjp(call, *one, *other)
        assert out.dtype == dtype
        bars = pullback(jnp.ones_like(out))
        assert [bar.dtype for bar in bars] == [a.dtype for a in (*one, *other)]
        logits = [np.asarray(a, float) @ np.asarray(b, float) for a, b in (other, one)]
        np.testing.assert_allclose(out, jaxsoft.kl_divergence(*logits), rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------- has_aux


@chunked
def test_the_statistics_of_ignored_and_wrong_labels(chunks):
    options = {"token_chunk": chunks[0], "vocab_chunk": chunks[1], "reduction": "none"}
    call = functools.partial(jaxsoft.linear_cross_entropy, ignore_index=IGNORED, has_aux=True)
    logits = GIVEN["x"] @ GIVEN["w"] + GIVEN["bias"]
    loss, found = call(**with_row(NAN), labels=labelled(IGNORED, N), **options)
    wanted = np.array(jaxsoft.logsumexp(logits, -1))
    wanted[0] = 0
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False, False])
    np.testing.assert_allclose(found.log_partition, wanted, rtol=1e-14)
    assert not np.any(found.correct[:2])
    none = {"bias": np.full(N, -INF)}
    _, found = call(**(GIVEN | none), labels=LABELS, **options)
    np.testing.assert_array_equal(found.log_partition, -INF)
    loss, found = call(GIVEN["x"][:0], GIVEN["w"], LABELS[:0])
    assert (loss, found.log_partition.shape, found.correct.shape) == (0, (0,), (0,))


# ----------------------------------------------------------------------------------- errors

X, W = GIVEN["x"], GIVEN["w"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: jaxsoft.linear_log_probs(X, W.T, LABELS),
            ValueError,
            "linear_log_probs: w must have shape (3, n) (x (4, 3) @ w), got (5, 3) (pass w.T)",
        ),
        (
            lambda: jaxsoft.linear_log_probs(X, W, LABELS[:2]),
            ValueError,
            "linear_log_probs: labels must have shape (4,) (x without its last axis; one axis more "
            "for several labels of a token), got (2,)",
        ),
        (
            lambda: jaxsoft.linear_log_probs(X, W, np.zeros((3, 4), int)),
            ValueError,
            "linear_log_probs: labels must have shape (4, 4)",
        ),
        (
            lambda: jaxsoft.linear_log_probs(X, W, LABELS * 1.0),
            TypeError,
            "linear_log_probs: labels must be integers where they are class ids, got dtype float64",
        ),
        (
            lambda: jaxsoft.linear_log_probs(X[0], W, 5),
            ValueError,
            "linear_log_probs: labels must lie in [0, 5), got 5",
        ),
        (
            lambda: jaxsoft.linear_log_probs(X, W, LABELS, vocab_chunk=0),
            ValueError,
            "linear_log_probs: vocab_chunk must be 1 or more, got 0",
        ),
        (
            lambda: jaxsoft.linear_kl_divergence(X, W, X[:2], W),
            ValueError,
            "linear_kl_divergence: teacher_x must have shape (4, 3) (the tokens of x), got (2, 3)",
        ),
        (
            lambda: jaxsoft.linear_kl_divergence(X, W, X, W[:, :4]),
            ValueError,
            "linear_kl_divergence: teacher_w must have shape (3, 5) (the classes of w), got (3, 4)",
        ),
        (
            lambda: jaxsoft.linear_kl_divergence(X, W, X, W.T),
            ValueError,
            "linear_kl_divergence: teacher_w must have shape (3, n) "
            "(teacher_x (4, 3) @ teacher_w), got (5, 3) (pass teacher_w.T)",
        ),
        (
            lambda: jaxsoft.linear_kl_divergence(X, W, X, W, reverse="yes"),
            TypeError,
            "linear_kl_divergence: reverse must be True or False, got str 'yes'",
        ),
        (
            lambda: jaxsoft.linear_kl_divergence(X, W, X, W, teacher_softcap=-1),
            ValueError,
            "linear_kl_divergence: teacher_softcap must lie in (0, inf), got -1",
        ),
        (
            lambda: jaxsoft.linear_kl_divergence(X, W, X, W, teacher_bias=np.ones(4)),
            ValueError,
            "linear_kl_divergence: teacher_bias must have shape (5,) (one for each class), "
            "got (4,)",
        ),
        (
            lambda: jaxsoft.linear_kl_divergence(X, W, X, W, weights=-1.0),
            ValueError,
            "linear_kl_divergence: weights must be 0 or more, got -1.0",
        ),
        (
            lambda: jaxsoft.linear_cross_entropy(X, W, LABELS, has_aux=1),
            TypeError,
            "linear_cross_entropy: has_aux must be True or False, got int",
        ),
    ],
)
def test_errors_name_the_argument_and_the_cure(call, error, message, monkeypatch):
    # The annotations would refuse some of it first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)
