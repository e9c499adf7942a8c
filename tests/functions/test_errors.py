"""The message of every error: function, argument, what came and what is wanted."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

X = jnp.zeros((4, 3))
ROWS = jnp.zeros(4, int)
W = jnp.zeros((3, 5))
ONE_ARRAY = [
    jaxsoft.softmax,
    jaxsoft.log_softmax,
    jaxsoft.logsumexp,
    jaxsoft.entropy,
    jaxsoft.sparsemax,
]


def call(fun, *args, **kwargs):
    # The tests check annotations at run time; here the function's own check is to answer.
    return inspect.unwrap(fun)(*args, **kwargs)


def fails(error, message, fun, *args, **kwargs):
    """Raises eagerly, under jit, and without any array work."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(fun, *args, **kwargs)


@pytest.mark.parametrize("fun", ONE_ARRAY)
def test_what_is_no_real_array(fun):
    name = fun.__name__
    argument = "a" if name == "logsumexp" else "x"
    message = f"{name}: {argument} must be an array or a number, got list (use jnp.asarray)"
    fails(TypeError, message, fun, [1.0, 2.0])
    fails(TypeError, message.replace("list", "tuple"), fun, (1.0, 2.0))
    fails(TypeError, f"{name}: {argument} must be an array or a number, got NoneType", fun, None)
    fails(TypeError, f"{name}: {argument} must be an array or a number, got str 'x'", fun, "x")
    if name != "logsumexp":
        message = f"{name}: {argument} must be real, got dtype complex128"
        fails(TypeError, message, fun, X.astype(complex))
    fails(TypeError, f"{name}: {argument} must be numeric, got dtype <U1", fun, np.array(["a"]))
    key = jax.random.key(0)
    fails(TypeError, f"{name}: {argument} must be real, got dtype key<fry>", fun, key)


@pytest.mark.parametrize("fun", ONE_ARRAY)
def test_axis(fun):
    name = fun.__name__
    wrong = f"{name}: axis must lie in [-2, 2) for an array of 2 dimensions, got "
    fails(ValueError, wrong + "2", fun, X, 2)
    fails(ValueError, wrong + "-3", fun, X, (0, -3))
    fails(ValueError, f"{name}: axis must name each axis once, got (0, -2)", fun, X, (0, -2))
    message = f"{name}: axis must be an integer, a tuple of integers or None, got float"
    fails(TypeError, message, fun, X, 1.0)
    scalar = f"{name}: axis must lie in [0, 0) for an array of 0 dimensions, got -1"
    fails(ValueError, scalar, fun, 1.0, -1)


@pytest.mark.parametrize("fun", ONE_ARRAY)
def test_where(fun):
    name = fun.__name__
    fails(TypeError, f"{name}: where must be boolean, got dtype float64", fun, X, where=X)
    argument = "a" if name == "logsumexp" else "x"
    message = f"{name}: where must broadcast with (4, 3) (the shape of {argument}), got (4,)"
    fails(ValueError, message, fun, X, where=ROWS == 0)


@pytest.mark.parametrize("fun", [jaxsoft.softmax, jaxsoft.log_softmax, jaxsoft.entropy])
def test_temperature(fun):
    name = fun.__name__
    fails(ValueError, f"{name}: temperature must be positive, got 0", fun, X, temperature=0)
    fails(ValueError, f"{name}: temperature must be positive, got nan", fun, X, temperature=np.nan)
    missing = f"{name}: temperature must be an array or a number, got NoneType"
    fails(TypeError, missing, fun, X, temperature=None)
    message = (
        f"{name}: temperature must broadcast to (4, 1) "
        "((4, 3) with the reduced axes (1,) of size 1), got (4,)"
    )
    fails(ValueError, message, fun, X, temperature=jnp.ones(4))


@pytest.mark.parametrize(
    ("fun", "arguments"),
    [
        (jaxsoft.entmax, (X,)),
        (jaxsoft.entmax_jacobian, (X,)),
        (jaxsoft.entmax_loss, (X, ROWS)),
    ],
)
def test_alpha(fun, arguments):
    name = fun.__name__
    for number in (0.9, np.float32(0.5), np.inf, np.nan):
        fails(
            ValueError, f"{name}: alpha must lie in [1, inf), got {number}", fun, *arguments, number
        )
    missing = f"{name}: alpha must be an array or a number, got "
    fails(TypeError, missing + "NoneType", fun, *arguments, None)
    fails(TypeError, missing + "str 'sparse'", fun, *arguments, "sparse")
    message = (
        f"{name}: alpha must broadcast to (4, 1) "
        "((4, 3) with the reduced axes (1,) of size 1), got (4,)"
    )
    fails(ValueError, message, fun, *arguments, jnp.ones(4))


def test_labels_of_entmax_loss():
    fun = jaxsoft.entmax_loss
    message = "entmax_loss: labels must have shape (4,) (logits (4, 3) without axis 1), got (4, 1)"
    fails(ValueError, message, fun, X, ROWS[:, None])
    fails(ValueError, "entmax_loss: labels must lie in [0, 3), got 3", fun, X[0], 3)
    unknown = "entmax_loss: reduction must be one of mean, sum, none, got 'all'"
    fails(ValueError, unknown, fun, X, ROWS, reduction="all")
    fails(ValueError, "entmax_loss: weights must be 0 or more, got -1", fun, X, ROWS, weights=-1)


def test_sink():
    message = (
        "softmax: sink must broadcast to (4, 1) "
        "((4, 3) with the reduced axes (1,) of size 1), got (3,)"
    )
    fails(ValueError, message, jaxsoft.softmax, X, sink=jnp.zeros(3))
    fails(
        TypeError,
        "log_softmax: sink must be real, got dtype complex128",
        jaxsoft.log_softmax,
        X,
        sink=1j,
    )


def test_labels():
    fun = jaxsoft.cross_entropy
    fails(
        ValueError,
        "cross_entropy: labels must have shape (4,) (logits (4, 3) without axis 1), got (4, 1)",
        fun,
        X,
        ROWS[:, None],
    )
    fails(
        ValueError,
        "cross_entropy: labels must have shape (4, 3) (target probabilities, as the logits), "
        "got (5,)",
        fun,
        X,
        jnp.zeros(5),
    )
    fails(
        TypeError,
        "cross_entropy: labels must be integers where they are class ids, got dtype bool "
        "(use labels.astype(int))",
        fun,
        X,
        ROWS == 0,
    )
    for labels in ([0, 1], (0, 1)):
        message = (
            "cross_entropy: labels must be an array or a number, "
            f"got {type(labels).__name__} (use jnp.asarray)"
        )
        fails(TypeError, message, fun, X, labels)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_class_ids_that_are_floating(dtype):
    ids = ROWS.astype(dtype)
    for fun, args in (
        (jaxsoft.cross_entropy, (X, ids)),
        (jaxsoft.cross_entropy, (X, ids, -1, None)),
        (jaxsoft.linear_cross_entropy, (X, W, ids)),
    ):
        message = (
            f"{fun.__name__}: labels must be integers where they are class ids, got dtype {dtype} "
            "(use labels.astype(int))"
        )
        fails(TypeError, message, fun, *args)
    # With ids to ignore too, of which target probabilities have none.
    message = message.replace("linear_", "")
    fails(TypeError, message, jaxsoft.cross_entropy, X, ids, ignore_index=-1)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_one_hot_labels_that_are_not_floating(dtype):
    message = (
        "cross_entropy: labels of the shape of the logits are target probabilities, which must be "
        f"floating, got dtype {dtype} (use labels.astype(float))"
    )
    one_hot = jnp.eye(4, 3).astype(dtype)
    fails(TypeError, message, jaxsoft.cross_entropy, X, one_hot)
    fails(TypeError, message, jaxsoft.cross_entropy, X, np.asarray(one_hot))
    fails(TypeError, message, jaxsoft.cross_entropy, X.T, one_hot.T, 0)


def test_swapped_arguments():
    message = (
        "cross_entropy: labels must have shape (4,) "
        "(target probabilities, as the logits (are logits and labels swapped?)), got (4, 3)"
    )
    fails(ValueError, message, jaxsoft.cross_entropy, ROWS, X)
    message = (
        "linear_cross_entropy: w must have shape (3, n) (x (4, 3) @ w), got (4,) "
        "(are w and labels swapped?)"
    )
    fails(ValueError, message, jaxsoft.linear_cross_entropy, X, ROWS, W)


def test_a_mask_of_examples():
    for where in (ROWS == 0, jnp.ones(4, bool)):
        message = (
            "cross_entropy: where must broadcast to (4, 3) (the shape of the logits; "
            "it masks classes, weights or ignore_index examples), got (4,)"
        )
        fails(ValueError, message, jaxsoft.cross_entropy, X, ROWS, where=where)
        fails(ValueError, message, jaxsoft.cross_entropy, X, X, where=where)


@pytest.mark.parametrize("label", [3, -1, 2**40, np.int8(-3), np.uint64(2**63), np.array(7)])
def test_a_label_given_as_a_number(label):
    message = f"labels must lie in [0, 3), got {label}"
    fails(ValueError, f"cross_entropy: {message}", jaxsoft.cross_entropy, X[0], label)
    message = f"linear_cross_entropy: {message}"
    fails(ValueError, message, jaxsoft.linear_cross_entropy, X[0], W[:, :3], label)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "label_smoothing must lie in [0, 1], got 1.5", {"label_smoothing": 1.5}),
        (ValueError, "label_smoothing must lie in [0, 1], got -0.1", {"label_smoothing": -0.1}),
        (TypeError, "label_smoothing must be a number, got str '0.1'", {"label_smoothing": "0.1"}),
        (
            ValueError,
            "label_smoothing must be a scalar, got shape (4,)",
            {"label_smoothing": jnp.zeros(4)},
        ),
        (ValueError, "z_loss must lie in [0, inf), got -1", {"z_loss": -1}),
        (ValueError, "softcap must lie in (0, inf), got 0", {"softcap": 0}),
        (TypeError, "ignore_index must be an integer, got float", {"ignore_index": 1.0}),
        (
            ValueError,
            "class_weights must have shape (3,) (one weight per class), got (4,)",
            {"class_weights": jnp.ones(4)},
        ),
        (ValueError, "temperature must be positive, got -1.0", {"temperature": -1.0}),
        (ValueError, "z_loss must lie in [0, inf), got inf", {"z_loss": np.inf}),
        (
            ValueError,
            "weights must broadcast to (4,) (the shape of the loss), got (4, 1)",
            {"weights": jnp.ones((4, 1))},
        ),
        (ValueError, "weights must be 0 or more, got -1.0", {"weights": -1.0}),
        (
            ValueError,
            "reduction must be one of mean, sum, none, got 'median'",
            {"reduction": "median"},
        ),
        (ValueError, "reduction must be one of mean, sum, none, got None", {"reduction": None}),
    ],
)
def test_options_of_cross_entropy(error, message, options):
    fails(error, f"cross_entropy: {message}", jaxsoft.cross_entropy, X, ROWS, **options)


def test_ignore_index_with_targets():
    message = "cross_entropy: ignore_index must be None with target probabilities"
    fails(ValueError, message, jaxsoft.cross_entropy, X, X, ignore_index=0)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be an array or a number, got list (use jnp.asarray)", {"x": [[1.0]]}),
        (TypeError, "x must be real, got dtype complex128", {"x": X.astype(complex)}),
        (ValueError, "x must have an axis of features, got shape ()", {"x": 1.0}),
        (TypeError, "w must be an array or a number, got NoneType", {"w": None}),
        (TypeError, "w must be real, got dtype complex128", {"w": W.astype(complex)}),
        (
            ValueError,
            "w must have shape (3, n) (x (4, 3) @ w), got (5, 3) (pass w.T)",
            {"w": W.T},
        ),
        (
            ValueError,
            "w must have shape (3, n) (x (4, 3) @ w), got (4, 5)",
            {"w": jnp.ones((4, 5))},
        ),
        (ValueError, "w must have shape (3, n) (x (4, 3) @ w), got (3,)", {"w": W[:, 0]}),
        (
            TypeError,
            "labels must be an array or a number, got list (use jnp.asarray)",
            {"labels": [0, 1, 2, 0]},
        ),
        (
            TypeError,
            "labels must be integers where they are class ids, got dtype float64 "
            "(use labels.astype(int))",
            {"labels": X[:, 0]},
        ),
        (
            TypeError,
            "labels must be integers where they are class ids, got dtype bool "
            "(use labels.astype(int))",
            {"labels": ROWS == 0},
        ),
        (
            ValueError,
            "labels must have shape (4,) (x without its last axis), got (4, 1)",
            {"labels": ROWS[:, None]},
        ),
        (
            ValueError,
            "bias must have shape (5,) (one for each class), got (1, 5)",
            {"bias": jnp.zeros((1, 5))},
        ),
        (
            TypeError,
            "bias must be an array or a number, got list (use jnp.asarray)",
            {"bias": [0.0] * 5},
        ),
        (
            ValueError,
            "class_weights must have shape (5,) (one weight per class), got (4,)",
            {"class_weights": jnp.ones(4)},
        ),
        (
            ValueError,
            "weights must broadcast to (4,) (the shape of labels), got (5,)",
            {"weights": jnp.ones(5)},
        ),
        (ValueError, "weights must be 0 or more, got -1.0", {"weights": -1.0}),
        (TypeError, "ignore_index must be an integer, got float", {"ignore_index": 1.0}),
        (ValueError, "label_smoothing must lie in [0, 1], got 1.5", {"label_smoothing": 1.5}),
        (ValueError, "z_loss must lie in [0, inf), got -1", {"z_loss": -1}),
        (ValueError, "softcap must lie in (0, inf), got 0", {"softcap": 0}),
        (ValueError, "temperature must be positive, got 0.0", {"temperature": 0.0}),
        (
            ValueError,
            "temperature must broadcast to (4, 1) "
            "((4, 5) with the reduced axes (1,) of size 1), got (4,)",
            {"temperature": jnp.ones(4)},
        ),
        (
            ValueError,
            "reduction must be one of mean, sum, none, got 'median'",
            {"reduction": "median"},
        ),
        (ValueError, "reduction must be one of mean, sum, none, got None", {"reduction": None}),
        (ValueError, "token_chunk must be 1 or more, got 0", {"token_chunk": 0}),
        (ValueError, "vocab_chunk must be 1 or more, got -8", {"vocab_chunk": -8}),
        (TypeError, "vocab_chunk must be an integer or None, got float", {"vocab_chunk": 8.0}),
        (TypeError, "token_chunk must be an integer or None, got str '8'", {"token_chunk": "8"}),
    ],
)
def test_linear_cross_entropy(error, message, arguments):
    given = {"x": X, "w": W, "labels": ROWS} | arguments
    fails(error, f"linear_cross_entropy: {message}", jaxsoft.linear_cross_entropy, **given)


def test_two_arrays():
    message = "kl_divergence: y must broadcast with (4, 3) (the shape of x), got (4,)"
    fails(ValueError, message, jaxsoft.kl_divergence, X, X[:, 0])
    message = "softmax_vjp: g must broadcast to (4, 3) (the shape of p), got (4,)"
    fails(ValueError, message, jaxsoft.softmax_vjp, X, X[:, 0])
    message = "softmax_jvp: v must be an array or a number, got list (use jnp.asarray)"
    fails(TypeError, message, jaxsoft.softmax_jvp, X, [1.0])
    message = "logsumexp: b must broadcast with (4, 3) (the shape of a), got (4,)"
    fails(ValueError, message, jaxsoft.logsumexp, X, b=X[:, 0])


def test_classes():
    fun = jaxsoft.softmax_derivative
    fails(ValueError, "softmax_derivative: i must lie in [0, 3), got 3", fun, X, 3, 0)
    fails(ValueError, "softmax_derivative: j must lie in [0, 3), got -1", fun, X, 0, -1)
    fails(TypeError, "softmax_derivative: i must be an integer, got dtype float64", fun, X, 0.5, 0)
    message = "softmax_derivative: j must broadcast to (4,) (the shape without the axis), got (3,)"
    fails(ValueError, message, fun, X, 0, jnp.zeros(3, int))
    assert np.all(np.isnan(fun(X, jnp.full(4, -1), 0)))


def test_jvp_from_vjp():
    fails(TypeError, "jvp_from_vjp: fun must be callable, got int", jaxsoft.jvp_from_vjp, 3)


def test_errors_are_raised_while_tracing_too():
    with pytest.raises(ValueError, match=r"^softmax: axis must lie in"):
        jax.jit(lambda x: jaxsoft.softmax(x, 5))(X)
    with pytest.raises(ValueError, match=r"^cross_entropy: labels must have shape"):
        jax.eval_shape(jaxsoft.cross_entropy, X, ROWS[:3])
