"""axis_name in `jax.shard_map`, whose replication check is left on: classes on several devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests.devices import collectives, mesh_of

RNG = np.random.default_rng(0)
N, ROWS, D = 16, 3, 4
X, Y = RNG.normal(size=(2, ROWS, N))
OF_ROWS = 0.5 + RNG.uniform(size=(ROWS, 1))
LABELS = np.array([0, -7, 13])
MASK = np.arange(N) < N - 3  # of eight devices the last has no class, and the one before has one
OF_CLASSES = RNG.uniform(size=N)
LAYER = RNG.normal(size=(D, N))
TOKENS = RNG.normal(size=(ROWS, D))
VERSION = tuple(map(int, jax.__version__.split(".")[:2]))
ALONG, OPTIONS = P(None, "v"), {"label_smoothing": 0.1, "z_loss": 0.2}


def since(major, minor):
    """Skips a test of what an older JAX does not do in `shard_map`: it raises errors of its own."""
    older = (major, minor) > VERSION
    return pytest.mark.skipif(older, reason=f"an error in shard_map of jax before {major}.{minor}")


def smooth(x, labels, where, class_weights, temperature, **axis_name):
    return jaxsoft.cross_entropy(
        x,
        labels,
        where=where,
        class_weights=class_weights,
        temperature=temperature,
        ignore_index=-7,
        softcap=5.0,
        **OPTIONS,
        **axis_name,
    )


def linear(reduction, chunks):
    def loss(x, w, bias, temperature, weights, class_weights, labels, **axis_name):
        return jaxsoft.linear_cross_entropy(
            x,
            w,
            labels,
            bias=bias,
            temperature=temperature,
            weights=weights,
            class_weights=class_weights,
            ignore_index=-7,
            softcap=5.0,
            reduction=reduction,
            **OPTIONS,
            **chunks,
            **axis_name,
        )

    return loss


def sums_of_jacobian(x, v, **axis_name):
    jacobian = jaxsoft.softmax_jacobian(x, **axis_name)
    return jacobian.trace() + jacobian.quadratic_form(v) + jacobian.norm("fro")


def product(x, v, temperature, sink, **axis_name):
    return jaxsoft.softmax_jacobian(x, temperature=temperature, sink=sink, **axis_name).mv(v)


# A function of arrays and axis_name; how each array is divided; how the result is; the arrays, of
# which those of floats are differentiated.
OF_LAYER = (P(), ALONG, P("v"), P(), P(), P("v"), P())
LAYERS = (TOKENS, LAYER, np.cos(OF_CLASSES), OF_ROWS, OF_ROWS[:, 0], OF_CLASSES, LABELS)
FUNCTIONS = {
    "softmax": (
        lambda x, where, temperature, sink, **kw: jaxsoft.softmax(
            x, where=where, temperature=temperature, sink=sink, **kw
        ),
        (ALONG, P("v"), P(), P()),
        ALONG,
        (X, MASK, OF_ROWS, -OF_ROWS),
    ),
    "log_softmax": (
        lambda x, temperature, sink, **kw: jaxsoft.log_softmax(
            x, temperature=temperature, sink=sink, **kw
        ),
        (ALONG, P(), P()),
        ALONG,
        (X, OF_ROWS, -OF_ROWS),
    ),
    "logsumexp": (
        lambda x, b, where, **kw: jaxsoft.logsumexp(x, -1, b, where=where, return_sign=True, **kw)[
            0
        ],
        (ALONG, ALONG, P("v")),
        P(),
        (X, Y, MASK),
    ),
    "entropy": (
        lambda x, where, temperature, **kw: jaxsoft.entropy(
            x, where=where, temperature=temperature, **kw
        ),
        (ALONG, P("v"), P()),
        P(),
        (X, MASK, OF_ROWS),
    ),
    "kl_divergence": (
        lambda x, y, where, **kw: jaxsoft.kl_divergence(x, y, where=where, **kw),
        (ALONG, ALONG, P("v")),
        P(),
        (X, Y, MASK),
    ),
    "cross_entropy": (
        smooth,
        (ALONG, P(), P("v"), P("v"), P()),
        P(),
        (X, LABELS, MASK, OF_CLASSES, OF_ROWS),
    ),
    "cross_entropy of targets": (
        lambda x, targets, **kw: jaxsoft.cross_entropy(x, targets, **OPTIONS, **kw),
        (ALONG, ALONG),
        P(),
        (X, np.abs(Y)),
    ),
    "mean": (linear("mean", {}), OF_LAYER, P(), LAYERS),
    "sum": (linear("sum", {"token_chunk": 2, "vocab_chunk": 1}), OF_LAYER, P(), LAYERS),
    "none": (linear("none", {"token_chunk": 2}), OF_LAYER, P(), LAYERS),
    "sums of the Jacobian": (sums_of_jacobian, (ALONG, ALONG), P(), (X, Y)),
    "its product": (product, (ALONG, ALONG, P(), P()), ALONG, (X, Y, OF_ROWS, -OF_ROWS)),
}


def is_float(array):
    return jnp.issubdtype(array.dtype, jnp.floating)


def of_floats(fun, arrays):
    """The function of those arrays that are floats, the others as they are, and those."""

    def of_these(*floats):
        given = iter(floats)
        return fun(*(next(given) if is_float(a) else a for a in arrays))

    return of_these, tuple(a for a in arrays if is_float(a))


def pulled_back(fun):
    """The gradients by all arguments that are floats, for a cotangent that is not constant."""

    def gradients(*args):
        of_these, floats = of_floats(fun, args)
        out, pullback = jax.vjp(of_these, *floats)
        return pullback(jnp.cos(out))

    return gradients


def in_every_mode(fun):
    """Value, forward, reverse, forward over reverse and reverse over reverse."""

    def modes(*args):
        of_these, floats = of_floats(fun, args)
        tangents = tuple(jnp.sin(a) for a in floats)
        out, pushed = jax.jvp(of_these, floats, tangents)
        gradients = lambda *floats: jax.vjp(of_these, *floats)[1](jnp.cos(of_these(*floats)))
        pulled, second = jax.jvp(gradients, floats, tangents)
        squares = lambda *floats: sum(jnp.sum(g**2) for g in gradients(*floats))
        return out, pushed, pulled, second, jax.grad(squares, range(len(floats)))(*floats)

    return modes


def divided(fun, mesh, specs, out, axis_name="v"):
    return jax.shard_map(
        functools.partial(fun, axis_name=axis_name), mesh=mesh, in_specs=specs, out_specs=out
    )


def assert_close(found, wanted, tolerance=1e-11):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@functools.cache
def of_all_classes(name):
    fun, _, _, args = FUNCTIONS[name]
    return jax.jit(in_every_mode(fun))(*args)


@since(0, 7)  # reverse over reverse
@pytest.mark.parametrize("name", FUNCTIONS)
def test_differentiated_around_shard_map(name):
    fun, specs, out, args = FUNCTIONS[name]
    modes = in_every_mode(divided(fun, mesh_of(v=8), specs, out))
    assert_close(jax.jit(modes)(*args), of_all_classes(name))


@pytest.mark.parametrize(
    "name", [pytest.param(f, marks=since(0, 7)) if f == "none" else f for f in FUNCTIONS]
)
def test_differentiated_within_shard_map(name):
    fun, specs, out, args = FUNCTIONS[name]
    of_floats = tuple(spec for spec, a in zip(specs, args, strict=True) if is_float(a))

    def local(*args, axis_name):
        of_part = functools.partial(fun, axis_name=axis_name)
        return of_part(*args), pulled_back(of_part)(*args)

    found = jax.jit(divided(local, mesh_of(v=2), specs, (out, of_floats)))(*args)
    value, _, gradients, *_ = of_all_classes(name)
    assert_close(found, (value, gradients))


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev, jax.hessian])
def test_whole_jacobians(derivative, devices):
    fun, specs, out, args = FUNCTIONS["cross_entropy"]
    sharded = divided(fun, mesh_of(v=devices), specs, out)
    assert_close(jax.jit(derivative(sharded))(*args), jax.jit(derivative(fun))(*args))


@since(0, 8)
def test_tokens_and_classes_divided_and_two_axes_for_the_classes():
    tokens, labels = RNG.normal(size=(8, D)), RNG.integers(0, N, 8)
    fun = lambda x, w, labels, **kw: jaxsoft.linear_cross_entropy(x, w, labels, **OPTIONS, **kw)

    def mean(x, w, labels, axis_name):
        return jax.lax.pmean(fun(x, w, labels, axis_name=axis_name), "data")

    wanted = jax.jit(in_every_mode(fun))(tokens, LAYER, labels)
    specs = P("data", None), P(None, ("a", "b")), P("data")
    sharded = divided(mean, mesh_of(data=2, a=2, b=2), specs, P(), ("a", "b"))
    assert_close(jax.jit(in_every_mode(sharded))(tokens, LAYER, labels), wanted)


@pytest.mark.parametrize("gap", [20, 60])
@pytest.mark.parametrize("top", [0, N - 1])
def test_confident_rows_keep_their_digits_wherever_the_label_is(top, gap):
    x = np.linspace(-1, 1, N)
    x[top] = gap
    wanted = jax.jit(jax.value_and_grad(jaxsoft.cross_entropy))(x, top)
    narrow = x.astype(np.float32)
    sharded = divided(jaxsoft.cross_entropy, mesh_of(v=8), (P("v"), P()), P())
    loss, gradient = jax.jit(jax.value_and_grad(sharded))(narrow, top)
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


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=since(0, 7))])
def test_neither_logits_nor_weight_are_exchanged(reduction):
    tokens, d, n, chunk = 32, 8, 1024, 16

    def gradients(x, w, labels, axis_name):
        def loss(x, w):
            return jaxsoft.linear_cross_entropy(
                x, w, labels, reduction=reduction, token_chunk=chunk, axis_name=axis_name
            )

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
