"""axis_name in `jax.shard_map`, whose replication check is left on: classes on several devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests.cases import OF_LOGITS, SPARSE, arrays, case
from tests.devices import collectives, mesh_of

N, ROWS, D = 16, 3, 4
RNG = np.random.default_rng(0)
GIVEN = arrays(ROWS, N) | {
    # Of eight devices the last has no class, and the one before has one.
    "where": np.arange(N) < N - 3,
    "labels": np.array([0, -7, 12]),
    "tokens": RNG.normal(size=(ROWS, D)),
    "w": RNG.normal(size=(D, N)),
    "bias": RNG.normal(size=N),
    "teacher_w": RNG.normal(size=(D, N)),
    "weights": RNG.uniform(0.5, 1.5, size=ROWS),
}
X, MASK, TOKENS, LAYER = (GIVEN[name] for name in ("x", "where", "tokens", "w"))
VERSION = tuple(map(int, jax.__version__.split(".")[:2]))
ALONG, OPTIONS = P(None, "v"), {"label_smoothing": 0.1, "z_loss": 0.2}


def since(major, minor):
    """Skips a test of what an older JAX does not do in `shard_map`: it raises errors of its own."""
    older = (major, minor) > VERSION
    return pytest.mark.skipif(older, reason=f"an error in shard_map of jax before {major}.{minor}")


def linear(reduction, **chunks):
    names = "tokens w labels bias temperature weights class_weights"
    options = OPTIONS | chunks | {"ignore_index": -7, "softcap": 5.0, "reduction": reduction}
    return case(jaxsoft.linear_cross_entropy, None, names, **options)


def token_statistics(x, w, labels, temperature, bias, **axis_name):
    """Of each token its log-probability, entropy, log-partition and argmax."""
    options = {"ignore_index": -7, "softcap": 5.0, "token_chunk": 2, "vocab_chunk": 1}
    found = jaxsoft.linear_log_probs(
        x, w, labels, bias=bias, temperature=temperature, **options, **axis_name
    )
    return jnp.stack([*found[:3], found.argmax.astype(x.dtype)], 1)


def divergence(x, w, teacher_w, weights, temperature, bias, reduction="mean", **axis_name):
    options = {"reduction": reduction, "token_chunk": 2, "vocab_chunk": 1}
    return jaxsoft.linear_kl_divergence(
        x,
        w,
        jnp.sin(x),
        teacher_w,
        teacher_bias=bias,
        weights=weights,
        temperature=temperature,
        **options,
        **axis_name,
    )


def sums_of_jacobian(x, v, **axis_name):
    jacobian = jaxsoft.softmax_jacobian(x, **axis_name)
    return jacobian.trace() + jacobian.quadratic_form(v) + jacobian.norm("fro")


def product(x, v, temperature, sink, **axis_name):
    return jaxsoft.softmax_jacobian(x, temperature=temperature, sink=sink, **axis_name).mv(v)


# Those of the sparse family want all classes on one device.
FUNCTIONS = {name: case for name, case in OF_LOGITS.items() if name not in SPARSE} | {
    "mean": linear("mean"),
    "sum": linear("sum", token_chunk=2, vocab_chunk=1),
    "none": linear("none", token_chunk=2),
    "log_probs": case(token_statistics, None, "tokens w labels temperature bias"),
    "kl": case(divergence, None, "tokens w teacher_w weights temperature bias"),
    "kl of each token": case(
        divergence, None, "tokens w teacher_w weights temperature bias", reduction="none"
    ),
    "sums of the Jacobian": case(sums_of_jacobian, None, "x v"),
    "its product": case(product, None, "x v temperature sink"),
}
# What is not left to the slow tests: each function once, with its options; fewer of them twice, of
# which the linear loss follows below, and within.
OFTEN = [name for name in FUNCTIONS if name.endswith("options")]
OFTEN += [
    "cross_entropy, targets",
    "mean",
    "log_probs",
    "kl",
    "sums of the Jacobian",
    "its product",
]
TWICE = ["softmax, options", "cross_entropy, targets"]
WITHIN = ["softmax, options", "cross_entropy, options", "mean", "sum", "log_probs", "its product"]


def often(names, *marks):
    """All functions, of which the others are left to the slow tests; with marks for `none`."""
    of = lambda n: [] if n in names else [pytest.mark.slow]
    params = [pytest.param(n, marks=[*of(n), *(marks if n == "none" else ())]) for n in FUNCTIONS]
    return pytest.mark.parametrize("name", params)


def arguments(name):
    """What a function is given: arrays of floats, by which it is differentiated, and others."""
    given = FUNCTIONS[name].chosen(GIVEN)
    if name == "cross_entropy":  # to ignore labels is an option
        given["labels"] = abs(given["labels"])
    floats = {name: a for name, a in given.items() if a.dtype == float}
    return floats, {name: a for name, a in given.items() if name not in floats}


def specs_of(given):
    """Classes are divided, and nothing else is."""
    spec = lambda a: P(*("v" if size == N else None for size in a.shape))
    return {name: spec(a) for name, a in given.items()}


def of_classes(name, mesh=None):
    """A function of floats and other arrays; divided among the devices of a mesh."""
    fun = lambda floats, others, **axis_name: FUNCTIONS[name].fun(floats | others, **axis_name)
    if mesh is None:
        return fun
    given = arguments(name)
    out = P(*("v" if size == N else None for size in jax.eval_shape(fun, *given).shape))
    return divided(fun, mesh, tuple(map(specs_of, given)), out)


def cotangent(out):
    """Not constant; finite where a class has no logarithm."""
    return jnp.cos(jnp.maximum(out, -99.0))


def pulled_back(fun):
    """The gradients by all arguments that are floats."""

    def gradients(floats, *others):
        out, pullback = jax.vjp(lambda floats: fun(floats, *others), floats)
        return pullback(cotangent(out))[0]

    return gradients


def in_every_mode(fun):
    """Value, forward, reverse."""

    def modes(floats, *others):
        of_floats = lambda floats: fun(floats, *others)
        out, pushed = jax.jvp(of_floats, (floats,), (jax.tree.map(jnp.sin, floats),))
        return out, pushed, pulled_back(fun)(floats, *others)

    return modes


def twice(fun):
    """Forward over reverse, and reverse over reverse."""

    def modes(floats, *others):
        gradients = lambda floats: pulled_back(fun)(floats, *others)
        squares = lambda floats: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients(floats)))
        pushed = jax.jvp(gradients, (floats,), (jax.tree.map(jnp.sin, floats),))[1]
        return pushed, jax.grad(squares)(floats)

    return modes


def divided(fun, mesh, specs, out, axis_name="v"):
    return jax.shard_map(
        functools.partial(fun, axis_name=axis_name), mesh=mesh, in_specs=specs, out_specs=out
    )


def assert_close(found, wanted, tolerance=1e-11):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert not np.any(np.isnan(b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@functools.cache
def of_all_classes(name):
    return jax.jit(in_every_mode(of_classes(name)))(*arguments(name))


@often(OFTEN)
def test_differentiated_around_shard_map(name):
    modes = in_every_mode(of_classes(name, mesh_of(v=8)))
    assert_close(jax.jit(modes)(*arguments(name)), of_all_classes(name))


@since(0, 7)  # reverse over reverse
@often(TWICE)
def test_differentiated_twice_around_shard_map(name):
    args = arguments(name)
    wanted = jax.jit(twice(of_classes(name)))(*args)
    assert_close(jax.jit(twice(of_classes(name, mesh_of(v=8))))(*args), wanted)


@often(WITHIN, since(0, 7))
def test_differentiated_within_shard_map(name):
    fun, args = of_classes(name), arguments(name)

    def local(*args, axis_name):
        of_part = functools.partial(fun, axis_name=axis_name)
        return of_part(*args), pulled_back(of_part)(*args)

    value, _, gradients = of_all_classes(name)
    specs = tuple(map(specs_of, args))
    out = P(*("v" if size == N else None for size in value.shape)), specs[0]
    found = jax.jit(divided(local, mesh_of(v=2), specs, out))(*args)
    assert_close(found, (value, gradients))


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_whole_jacobians(devices):
    name, derivatives = "cross_entropy, options", (jax.jacfwd, jax.jacrev, jax.hessian)
    floats, others = arguments(name)

    def every(fun):
        of_logits = lambda x: fun(floats | {"x": x}, others)
        return jax.jit(lambda x: [of(of_logits)(x) for of in derivatives])(X)

    assert_close(every(of_classes(name, mesh_of(v=devices))), every(of_classes(name)))


@since(0, 8)
def test_tokens_and_classes_divided_and_two_axes_for_the_classes():
    floats = {"tokens": RNG.normal(size=(8, D)), "w": LAYER}
    labels = RNG.integers(0, N, 8)
    fun = lambda x, labels, **kw: jaxsoft.linear_cross_entropy(
        x["tokens"], x["w"], labels, **OPTIONS, **kw
    )

    def mean(x, labels, axis_name):
        return jax.lax.pmean(fun(x, labels, axis_name=axis_name), "data")

    specs = {"tokens": P("data", None), "w": P(None, ("a", "b"))}, P("data")
    sharded = divided(mean, mesh_of(data=2, a=2, b=2), specs, P(), ("a", "b"))
    both = lambda fun: jax.jit(lambda *args: (in_every_mode(fun)(*args), twice(fun)(*args)))
    assert_close(both(sharded)(floats, labels), both(fun)(floats, labels))


WITH_GRADIENT = jax.jit(jax.value_and_grad(jaxsoft.cross_entropy))


@functools.cache
def sharded_with_gradient():
    sharded = divided(jaxsoft.cross_entropy, mesh_of(v=8), (P("v"), P()), P())
    return jax.jit(jax.value_and_grad(sharded))


@pytest.mark.parametrize("gap", [20, 60])
@pytest.mark.parametrize("top", [0, N - 1])
def test_confident_rows_keep_their_digits_wherever_the_label_is(top, gap):
    x = np.linspace(-1, 1, N)
    x[top] = gap
    wanted = WITH_GRADIENT(x, top)
    narrow = x.astype(np.float32)
    loss, gradient = sharded_with_gradient()(narrow, top)
    # The logits beside the top are rounded by up to eps/2.
    eps, own = float(jnp.finfo(jnp.float32).eps), 1 + (gap + 1) / 2
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, wanted[0], rtol=(6 + own) * eps)
    np.testing.assert_allclose(gradient, wanted[1], rtol=(8 + own) * eps)


def test_labels_outside_are_nan_on_every_device_and_only_there():
    labels = np.array([N, 3, -1])
    fun = lambda x, axis_name: jaxsoft.cross_entropy(x, labels, axis_name=axis_name)
    loss, pullback = jax.vjp(divided(fun, mesh_of(v=8), (ALONG,), P()), X)
    assert np.array_equal(np.isnan(loss), [True, False, True])
    assert np.array_equal(np.isnan(pullback(np.ones(ROWS))[0]).all(1), [True, False, True])
    for device in loss.addressable_shards:
        np.testing.assert_array_equal(device.data, loss)


def test_a_masked_label_costs_infinity_among_devices():
    fun = lambda x, where, axis_name: jaxsoft.cross_entropy(
        x, np.array([0, 12, 13]), where=where, axis_name=axis_name
    )
    loss = jax.jit(divided(fun, mesh_of(v=8), (ALONG, P("v")), P()))(X, MASK)
    np.testing.assert_array_equal(np.isposinf(loss), [False, False, True])
    assert not np.any(np.isnan(loss))


@pytest.mark.parametrize("fun", [jaxsoft.cross_entropy, jaxsoft.linear_cross_entropy])
def test_labels_that_are_divided_themselves(fun):
    args = (X[:, :N], np.arange(8 * ROWS))
    specs = ALONG, P("v")
    if fun is jaxsoft.linear_cross_entropy:
        args, specs = (TOKENS, LAYER, args[1]), (P(), *specs)
    with pytest.raises(ValueError, match=f"{fun.__name__}: .*labels"):
        divided(fun, mesh_of(v=8), specs, P())(*args)


@pytest.mark.parametrize("axis_name", ["w", ("v", "w"), 3])
def test_axis_that_is_not_there(axis_name):
    with pytest.raises((ValueError, TypeError), match="softmax: axis_name"):
        divided(jaxsoft.softmax, mesh_of(v=8), (ALONG,), ALONG, axis_name)(X)


# ---------------------------------------------------------------------- exchange and memory


@pytest.mark.parametrize(
    "reduction", ["mean", *(pytest.param(n, marks=since(0, 7)) for n in ("none", "log_probs"))]
)
def test_neither_logits_nor_weight_are_exchanged(reduction):
    tokens, d, n, chunk = 32, 8, 1024, 16

    def gradients(x, w, labels, axis_name):
        def loss(x, w):
            options = {"token_chunk": chunk, "axis_name": axis_name}
            if reduction == "log_probs":
                return sum(jaxsoft.linear_log_probs(x, w, labels, **options)[:3])
            return jaxsoft.linear_cross_entropy(x, w, labels, reduction=reduction, **options)

        out, pullback = jax.vjp(loss, x, w)
        return out, *pullback(jnp.cos(out))

    sharded = divided(gradients, mesh_of(v=8), (P(), ALONG, P()), (P(), P(), ALONG))
    args = np.zeros((tokens, d)), np.zeros((d, n)), np.zeros(tokens, int)
    sent = collectives(jax.jit(sharded).lower(*args).compile().as_text())
    assert {operation for operation, _ in sent} == {"all-reduce"}
    sizes = sorted(math.prod(shape) for _, shape in sent)
    # The gradient by x once, or once a chunk; the rest are statistics of a chunk, or of all tokens.
    assert sizes[-1] in (tokens * d, chunk * d)
    assert sizes[-2] <= tokens


def test_softmax_exchanges_numbers_of_rows_alone():
    def both(x, axis_name):
        out, pullback = jax.vjp(functools.partial(jaxsoft.softmax, axis_name=axis_name), x)
        return out, *pullback(jnp.cos(out))

    program = jax.jit(divided(both, mesh_of(v=8), (ALONG,), (ALONG, ALONG))).lower(X).compile()
    assert {shape for _, shape in collectives(program.as_text())} == {(ROWS,)}


@since(0, 8)  # a few MB more on four and eight devices
def test_memory_falls_with_the_number_of_devices():
    tokens, d, n, chunk, classes = 512, 16, 65_536, 256, 2048
    shapes = (tokens, d), (d, n), (tokens,)
    dtypes = jnp.float32, jnp.float32, jnp.int32
    args = [jax.ShapeDtypeStruct(*of) for of in zip(shapes, dtypes, strict=True)]

    def temporary(devices):
        specs = P(), ALONG, P()
        loss = divided(jaxsoft.linear_cross_entropy, mesh_of(v=devices), specs, P())
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
        return program.memory_analysis().temp_size_in_bytes

    alone = temporary(1)
    assert alone > 4 * chunk * n
    # What does not fall: an array and the part of w for a chunk of classes, x and its gradient.
    constant = 4 * (chunk * classes + d * (classes + 2 * tokens))
    for devices in (2, 4, 8):
        assert temporary(devices) <= alone / devices + 1.1 * constant
