"""Arrays that `jax.jit` divides among devices, along automatic and explicit axes of a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsoft
from tests.devices import collectives, mesh_of

ROWS, CLASSES, FEATURES, TOKENS, CHUNK = 8, 256, 8, 64, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, CLASSES))
LABELS = RNG.integers(0, CLASSES, ROWS)
SCALE = np.full((ROWS, 1), 1.5)

explicit_axes = pytest.mark.skipif(
    not hasattr(jax.sharding, "auto_axes"), reason="jax before 0.7 has no explicit axes"
)
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh

FUNCTIONS = {
    "softmax": lambda x: jaxsoft.softmax(x, where=x > -1, temperature=SCALE, sink=0.5),
    "log_softmax": jaxsoft.log_softmax,
    "logsumexp": lambda x: jaxsoft.logsumexp(x, -1, keepdims=True),
    "entropy": jaxsoft.entropy,
    "kl_divergence": lambda x: jaxsoft.kl_divergence(x, jnp.cos(x)),
    "cross_entropy": lambda x: jaxsoft.cross_entropy(
        x, LABELS, label_smoothing=0.1, z_loss=0.2, class_weights=np.ones(CLASSES), softcap=9.0
    ),
    "entmax": lambda x: jaxsoft.entmax(x, where=x > -1, temperature=SCALE),
    "entmax_loss": lambda x: jaxsoft.entmax_loss(x, LABELS, 2.0),
    "jacobian": lambda x: jaxsoft.softmax_jacobian(x, temperature=SCALE).mv(jnp.cos(x)),
    "row": lambda x: jaxsoft.softmax_jacobian(x).row(3),
    "trace": lambda x: jaxsoft.softmax_jacobian(x).trace(),
}


def placed(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def in_every_mode(fun):
    """The value, a gradient, and a Hessian-vector product, which is forward over reverse."""

    def gradient(x):
        out, pullback = jax.vjp(fun, x)
        return pullback(jnp.cos(out))[0]

    return lambda x: (fun(x), *jax.jvp(gradient, (x,), (jnp.sin(x),)))


def compiled(fun, mesh, *args):
    with set_mesh(mesh):
        return jax.jit(fun).lower(*args).compile()


def assert_close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@functools.cache
def on_one_device(name):
    return jax.jit(in_every_mode(FUNCTIONS[name]))(X)


# Along automatic axes those of each kind: of rows, of classes, of labels, an operator.
AUTOMATIC = ("softmax", "logsumexp", "cross_entropy", "jacobian")


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, AxisType.Explicit, marks=explicit_axes) for name in FUNCTIONS]
    + [
        pytest.param(name, AxisType.Auto, marks=[] if name in AUTOMATIC else [pytest.mark.slow])
        for name in FUNCTIONS
    ],
)
def test_only_what_belongs_to_rows_is_sent(name, kind):
    fun = in_every_mode(FUNCTIONS[name])
    mesh = mesh_of(kind, rows=2, classes=4)
    x = placed(mesh, X, "rows", "classes")
    program = compiled(fun, mesh, x)
    sent = collectives(program.as_text())
    assert sent
    # The threshold of entmax is sought among the largest of groups first.
    largest = ROWS * CLASSES // 16 if name.startswith("entmax") else 4 * ROWS
    assert max(math.prod(shape) for _, shape in sent) <= largest
    found = program(x)
    assert_close(found, on_one_device(name))
    if kind == AxisType.Explicit:
        assert jax.typeof(found[1]).sharding == jax.typeof(x).sharding


# How x and w are divided, and the sizes of all that is added up between devices beyond the
# statistics of a chunk of tokens: the gradient by x of a chunk, where classes are divided; that by
# w, where tokens are. Where features are divided, so is the sum that makes a logit.
OF_W = FEATURES * CLASSES
LAYERS = {
    "classes": ((None, None), (None, "b"), {CHUNK * FEATURES}),
    "tokens": (("a", None), (None, None), {OF_W}),
    "tokens and classes": (("a", None), (None, "b"), {CHUNK // 2 * FEATURES, OF_W // 4}),
    "features": ((None, "b"), ("b", None), {CHUNK * CLASSES}),
}


TOKENS_AND_WEIGHT = RNG.normal(size=(TOKENS, FEATURES)), RNG.normal(size=(FEATURES, CLASSES))
OF_TOKENS = RNG.integers(0, CLASSES, TOKENS)


@functools.cache
def gradients(reduction):
    """The loss and its gradients, as a function and on one device."""

    def of_arrays(x, w, labels):
        def loss(x, w):
            if reduction == "log_probs":
                return sum(jaxsoft.linear_log_probs(x, w, labels, token_chunk=CHUNK)[:3])
            if reduction == "kl":
                return jaxsoft.linear_kl_divergence(x, w, jnp.sin(x), w, token_chunk=CHUNK)
            return jaxsoft.linear_cross_entropy(
                x, w, labels, label_smoothing=0.1, reduction=reduction, token_chunk=CHUNK
            )

        out, pullback = jax.vjp(loss, x, w)
        return out, pullback(jnp.cos(out))

    return of_arrays, jax.jit(of_arrays)(*TOKENS_AND_WEIGHT, OF_TOKENS)


@pytest.mark.parametrize(
    ("reduction", "kind"),
    [
        ("mean", AxisType.Auto),
        pytest.param("none", AxisType.Explicit, marks=explicit_axes),
        pytest.param("log_probs", AxisType.Explicit, marks=[explicit_axes, pytest.mark.slow]),
        pytest.param("none", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("log_probs", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("kl", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("mean", AxisType.Explicit, marks=[explicit_axes, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_neither_logits_nor_weight_are_gathered(name, reduction, kind):
    of_x, of_w, wanted = LAYERS[name]
    fun, on_one_device = gradients(reduction)
    mesh = mesh_of(kind, a=2, b=4)
    x, w = TOKENS_AND_WEIGHT
    args = placed(mesh, x, *of_x), placed(mesh, w, *of_w), placed(mesh, OF_TOKENS, of_x[0])
    program = compiled(fun, mesh, *args)
    sent = collectives(program.as_text())
    large = [(op, math.prod(shape)) for op, shape in sent if math.prod(shape) > 2 * CHUNK]
    assert {size for _, size in large} == wanted
    assert {op for op, _ in large} == {"all-reduce"}
    assert_close(program(*args), on_one_device)


def of_temperature(x, labels):
    return jax.grad(lambda t: jnp.sum(jnp.sin(jaxsoft.softmax(x, temperature=t))))(SCALE)


def reverse_over_reverse(x, labels):
    def loss(x, w):
        return jaxsoft.linear_cross_entropy(x, w, labels, token_chunk=3, weights=jnp.cos(labels))

    weight = jnp.sin(jnp.arange(4.0 * CLASSES)).reshape(CLASSES, 4)
    return jax.grad(lambda w: jnp.sum(jax.grad(loss)(x, w) ** 2))(weight)


TRANSFORMED = {
    "vmap over rows": jax.vmap(jax.grad(jaxsoft.cross_entropy)),
    "vmap over classes": lambda x, _: jax.vmap(lambda x: jaxsoft.softmax(x, 0), 1, 1)(x),
    "hessian": lambda x, labels: jax.hessian(
        lambda t: jnp.sum(jaxsoft.cross_entropy(x, labels, temperature=t))
    )(2.0),
    "temperature": of_temperature,
    "reverse over reverse": reverse_over_reverse,
    "all axes": lambda x, _: jaxsoft.logsumexp(x),
    "eigenvalues": lambda x, _: jaxsoft.softmax_jacobian(x).eigvalsh(),
    "derivative": lambda x, _: jaxsoft.softmax_derivative(jaxsoft.softmax(x), 1, 2),
}


# Each operation of these is a program of its own where they are not compiled as a whole.
LONG = ("hessian", "reverse over reverse")


@explicit_axes
@pytest.mark.parametrize(
    ("name", "jit"),
    [(name, True) for name in LONG]
    + [
        pytest.param(name, False, marks=[pytest.mark.slow] if name in LONG else [])
        for name in TRANSFORMED
    ],
)
def test_transformations_along_explicit_axes(name, jit):
    fun = jax.jit(TRANSFORMED[name]) if jit else TRANSFORMED[name]
    mesh = mesh_of(AxisType.Explicit, rows=2, classes=4)
    args = placed(mesh, X, "rows", "classes"), placed(mesh, LABELS, "rows")
    with set_mesh(mesh):
        found = fun(*args)
    assert_close(found, jax.jit(fun)(X, LABELS))


# By default there are some more chunks than needed, such that tokens and devices divide.
def test_tokens_stay_where_they_are():
    mesh = mesh_of(a=2, b=4)
    x, w = RNG.normal(size=(1024, 4)), RNG.normal(size=(4, 64))
    args = placed(mesh, x, "a"), placed(mesh, w, None, "b"), placed(mesh, x[:, 0] > 0, "a")
    gradients = jax.value_and_grad(
        lambda x, w, labels: jaxsoft.linear_cross_entropy(x, w, labels.astype(int)), (0, 1)
    )
    program = compiled(gradients, mesh, *args)
    sent = collectives(program.as_text())
    assert {operation for operation, _ in sent} == {"all-reduce"}
    assert max(math.prod(shape) for _, shape in sent) == 128 // 2 * 4
    assert_close(program(*args), jax.jit(gradients)(x, w, x[:, 0] > 0))
