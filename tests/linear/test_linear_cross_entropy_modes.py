"""The functions of x @ w in every mode, and what they compute and hold."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.testing import MODES, assert_derivatives

RNG = np.random.default_rng(0)
X, W, BIAS = RNG.normal(size=(3, 2)), RNG.normal(size=(2, 5)), RNG.normal(size=5)
LABELS = np.array([4, 1, 0])
CHUNKS = {"token_chunk": 2, "vocab_chunk": 2}


def fused(x, w, bias, reduction="mean", **options):
    options = CHUNKS | options
    return jaxsoft.linear_cross_entropy(x, w, LABELS, bias=bias, reduction=reduction, **options)


def plain(x, w, bias, reduction="mean"):
    z = x @ w + bias[None]
    losses = jnp.log(jnp.exp(z).sum(1)) - z[jnp.arange(3), LABELS]
    return losses.mean() if reduction == "mean" else losses


def statistics(x, w, bias):
    found = jaxsoft.linear_log_probs(x, w, LABELS, bias=bias, **CHUNKS)
    return jnp.stack(found[:3])


def plain_statistics(x, w, bias):
    log_p = jax.nn.log_softmax(x @ w + bias[None])
    entropy = -(jnp.exp(log_p) * log_p).sum(1)
    return jnp.stack(
        [log_p[jnp.arange(3), LABELS], entropy, jax.nn.logsumexp(x @ w + bias[None], 1)]
    )


def divergence(x, w, bias):
    options = {"teacher_bias": bias[::-1], **CHUNKS}
    return jaxsoft.linear_kl_divergence(x, w, x[::-1], w[:, ::-1], bias=bias, **options)


def plain_divergence(x, w, bias):
    log_q = jax.nn.log_softmax(x @ w + bias[None])
    log_p = jax.nn.log_softmax(x[::-1] @ w[:, ::-1] + bias[None, ::-1])
    return (jnp.exp(log_p) * (log_p - log_q)).sum(1).mean()


PAIRS = {
    "mean": (fused, plain),
    "none": tuple(functools.partial(fun, reduction="none") for fun in (fused, plain)),
    "log_probs": (statistics, plain_statistics),
    "kl_divergence": (divergence, plain_divergence),
}
SOME_MODES = ["vjp(scan)", "jacfwd(jacrev)", "jacrev(jacrev)"]


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("mean", MODES),
        ("log_probs", [*SOME_MODES, "jit(jvp)"]),
        ("kl_divergence", [*SOME_MODES, "jit(jvp)"]),
        pytest.param("none", SOME_MODES, marks=pytest.mark.slow),
        pytest.param("log_probs", MODES, marks=pytest.mark.slow),
        pytest.param("kl_divergence", MODES, marks=pytest.mark.slow),
    ],
)
def test_every_mode(name, modes):
    fun, reference = PAIRS[name]
    assert_derivatives(fun, *map(jnp.asarray, (X, W, BIAS)), reference=reference, modes=modes)


@pytest.mark.parametrize("batched", ["x", "w", "labels"])
def test_vmap_is_a_loop(batched):
    arguments = {"x": X, "w": W, "labels": LABELS}
    axes = {name: 0 if batched == name else None for name in arguments}
    other = {"x": 2 * X, "w": W[:, ::-1], "labels": LABELS[::-1]}
    call = lambda x, w, labels: jaxsoft.linear_cross_entropy(x, w, labels, **CHUNKS)
    gradient = jax.jit(jax.value_and_grad(call, (0, 1)))
    rows = [arguments, {n: arguments[n] if axes[n] is None else other[n] for n in arguments}]
    stacked = [
        arguments[name] if axis is None else np.stack([row[name] for row in rows])
        for name, axis in axes.items()
    ]
    mapped = jax.jit(jax.vmap(gradient, tuple(axes.values())))(*stacked)
    looped = jax.tree.map(lambda *leaf: np.stack(leaf), *(gradient(*row.values()) for row in rows))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-15)
    jax.tree.map(close, mapped, looped)


def test_one_program_for_all_values_of_the_options(caplog):
    x = RNG.normal(size=(6, 2))  # a shape that no other test has compiled
    call = functools.partial(jaxsoft.linear_cross_entropy, x, W, np.zeros(6, int), **CHUNKS)
    compiled = []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for value in (0.1, 0.2):
            caplog.clear()
            call(z_loss=value, temperature=1 + value, softcap=value, label_smoothing=value)
            compiled.append("_linear_cross_entropy" in caplog.text)
    assert compiled == [True, False]


@pytest.mark.parametrize(
    ("token_chunk", "vocab_chunk", "kept"),
    [(None, None, None), pytest.param(1, 9, None, marks=pytest.mark.slow), (2, None, 2)],
)
def test_a_hessian_vector_product(token_chunk, vocab_chunk, kept, monkeypatch):
    if kept is not None:  # several chunks of classes, whose logits are kept, as of a large layer
        monkeypatch.setattr("jaxsoft._linear.loops._CLASSES", kept)
    chunks = {"token_chunk": token_chunk, "vocab_chunk": vocab_chunk}
    gradient = jax.grad(functools.partial(fused, **chunks), (0, 1, 2))
    primals = X, W, BIAS
    tangents = RNG.normal(size=X.shape), W[:, ::-1].copy(), BIAS + 1
    product = jax.jit(lambda *v: jax.jvp(gradient, primals, v)[1])(*tangents)
    expected = jax.jvp(jax.grad(plain, (0, 1, 2)), primals, tangents)[1]
    for one, other in zip(product, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-15)


# --------------------------------------------------------------------------- products of matrices


def multiplications(jaxpr):
    """How many multiplications the products of matrices in it take, in all turns of its loops."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lengths = [eqn.invars[0].aval.shape[axis] for axis in contracted]
            count += math.prod(eqn.outvars[0].aval.shape) * math.prod(lengths)
        inner = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        )
        inner = [getattr(leaf, "jaxpr", leaf) for leaf in inner]
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        count += turns * sum(multiplications(leaf) for leaf in inner if hasattr(leaf, "eqns"))
    return count


def summed(function, labels, **options):
    """A function of x, w and a bias, with a scalar result."""

    other = jnp.ones((64, 4)), jnp.ones((4, 32))

    def call(x, w, bias):
        if function == "log_probs":
            found = jaxsoft.linear_log_probs(x, w, labels, bias=bias, **options)
            return sum(map(jnp.sum, found[:3]))
        if function == "kl":
            return jaxsoft.linear_kl_divergence(x, w, *other, bias=bias, **options)
        if function == "kl of the teacher":
            return jaxsoft.linear_kl_divergence(*other, x, w, teacher_bias=bias, **options)
        if function == "has_aux":
            has_aux = {"has_aux": True, **options}
            return jaxsoft.linear_cross_entropy(x, w, labels, bias=bias, **has_aux)[0]
        of_reduction = {"reduction": function, **options}
        return jnp.sum(jaxsoft.linear_cross_entropy(x, w, labels, bias=bias, **of_reduction))

    return call


@pytest.mark.parametrize(
    ("function", "argnums", "vocab_chunk", "wanted"),
    [
        ("mean", (), None, 1),
        ("sum", (), 8, 1),
        ("none", (), None, 1),
        ("mean", (0, 1), None, 3),
        ("sum", (0, 1), None, 3),
        ("mean", (0,), None, 2),
        ("mean", (1,), None, 2),
        ("mean", (2,), None, 1),
        ("mean", (0, 1), 8, 4),
        ("none", (0, 1), None, 4),
        ("has_aux", (), None, 1),
        ("has_aux", (0, 1), None, 3),
        ("has_aux", (0, 1), 8, 4),
        ("log_probs", (), None, 1),
        ("log_probs", (0, 1), None, 4),
        ("log_probs", (1,), 8, 3),
        ("kl", (), None, 2),
        ("kl", (0, 1), None, 4),
        ("kl", (2,), None, 2),
        ("kl", (0, 1), 8, 8),
        ("kl of the teacher", (0, 1), None, 4),
    ],
)
@pytest.mark.parametrize("token_chunk", [None, 16])
def test_products_of_matrices(function, argnums, vocab_chunk, wanted, token_chunk):
    x, w, labels = jnp.ones((64, 4)), jnp.ones((4, 32)), jnp.zeros(64, int)
    call = summed(function, labels, token_chunk=token_chunk, vocab_chunk=vocab_chunk)
    fun = jax.value_and_grad(call, argnums) if argnums else call
    count = multiplications(jax.make_jaxpr(fun)(x, w, jnp.ones(32)).jaxpr)
    assert count == wanted * 64 * 4 * 32


# ------------------------------------------------------------------------------------- memory

TOKENS, D, N = 2048, 256, 32768
LOGITS = 4 * TOKENS * N  # bytes


@functools.cache
def temporary(fun, tokens=TOKENS, **options):
    """Bytes of temporary memory for so many tokens, in float32; nothing is executed."""
    shapes = ((tokens, D), jnp.float32), ((D, N), jnp.float32), ((tokens,), jnp.int32)
    given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    loss = functools.partial(jaxsoft.linear_cross_entropy, **options)
    compiled = jax.jit(functools.partial(fun, loss)).lower(*given).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def value(loss, *given):
    return loss(*given)


def by_x(loss, *given):
    return jax.value_and_grad(loss)(*given)


def by_both(loss, *given):
    return jax.value_and_grad(loss, (0, 1))(*given)


def with_logits(loss, *given):
    optax = pytest.importorskip("optax")

    def mean(x, w, labels):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels).mean()

    return by_both(mean, *given)


def hessian_product_by_w(loss, x, w, labels):
    return jax.jvp(lambda w: jax.grad(loss, 1)(x, w, labels), (w,), (w,))[1]


def hessian_product_by_both(loss, x, w, labels):
    gradient = jax.grad(loss, (0, 1))
    return jax.jvp(lambda x, w: gradient(x, w, labels), (x, w), (x, w))[1]


def reverse_over_reverse(loss, x, w, labels):
    return jax.grad(lambda w: jnp.sum(jax.grad(loss)(x, w, labels)))(w)


def test_memory_of_value_and_gradient():
    assert temporary(with_logits) >= LOGITS
    assert temporary(by_both) <= temporary(with_logits) / 4
    assert temporary(by_both, vocab_chunk=2048) <= temporary(with_logits) / 10
    assert temporary(value) < temporary(by_both)


def test_no_gradient_of_the_weight_unless_asked_for():
    # With both chunks smaller than that; without, the gradient is made where it is returned.
    assert temporary(by_x, vocab_chunk=2048) < 4 * D * N
    assert temporary(by_x) <= temporary(by_both)


# Known of jax 0.6: its XLA holds arrays of a chunk longer, and of reverse over reverse all of them.
FRUGAL = pytest.mark.skipif(
    jax.__version_info__ < (0, 7), reason="XLA of jax 0.6 needs more memory for this"
)


@pytest.mark.parametrize(
    "product", [hessian_product_by_w, pytest.param(hessian_product_by_both, marks=FRUGAL)]
)
def test_memory_of_a_hessian_vector_product(product):
    assert temporary(product) < LOGITS / 2


@pytest.mark.parametrize(
    "fun", [hessian_product_by_both, pytest.param(reverse_over_reverse, marks=FRUGAL)]
)
def test_memory_does_not_grow_with_tokens_times_classes(fun):
    assert temporary(fun, 2 * TOKENS) - temporary(fun) <= LOGITS / 32


def log_probs(x, w, labels):
    found = jaxsoft.linear_log_probs(x, w, labels)
    return found.log_probs.mean() + found.entropy.mean()


def log_probs_with_logits(x, w, labels):
    logits = x @ w
    loss = jaxsoft.cross_entropy(logits, labels, reduction="mean")
    return jaxsoft.entropy(logits).mean() - loss


def distilled(x, w, labels):
    return jaxsoft.linear_kl_divergence(x, w, *jax.lax.stop_gradient((jnp.cos(x), w)))


def distilled_with_logits(x, w, labels):
    teacher = jax.lax.stop_gradient(jnp.cos(x) @ w)
    return jaxsoft.kl_divergence(teacher, x @ w).mean()


@pytest.mark.parametrize(
    ("own", "other"), [(log_probs, log_probs_with_logits), (distilled, distilled_with_logits)]
)
def test_memory_of_statistics_and_their_gradients(own, other):
    gradient = lambda fun: lambda _, *given: by_both(fun, *given)
    plain = temporary(gradient(other))
    assert plain >= LOGITS
    assert temporary(gradient(own)) <= plain / 10
    grows = temporary(gradient(own), 2 * TOKENS) - temporary(gradient(own))
    assert grows <= LOGITS / 32


def test_memory_of_the_statistics_of_a_loss():
    with_aux = lambda loss, *given: jax.value_and_grad(loss, (0, 1), has_aux=True)(*given)
    assert temporary(with_aux, has_aux=True) - temporary(by_both) <= 5 * 4 * TOKENS


# The argument of exp, and what is multiplied by it, are there once for each chunk: in a program of
# log-probabilities alone nothing is multiplied, and the maximum has no place.
def test_what_is_not_used_is_not_computed():
    def operations(*names):
        call = lambda x, w, labels: [
            getattr(jaxsoft.linear_log_probs(x, w, labels), name) for name in names
        ]
        shapes = ((64, 8), float), ((8, 512), float), ((64,), int)
        given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return jax.jit(call).lower(*given).compile().cost_analysis()

    names = ("log_probs", "entropy", "log_partition", "argmax")
    alone, all_of_them = operations("log_probs"), operations(*names)
    assert alone["transcendentals"] <= all_of_them["transcendentals"] / 1.9
    assert alone["flops"] < all_of_them["flops"]
