"""axis_name: classes on several devices, which `jax.vmap` with an axis name stands for here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

DEVICES = 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 16))
LABELS = np.array([0, 5, 15])
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.2, "temperature": 1.5}
LOSSES = {
    "logsumexp": lambda x, **kw: jaxsoft.logsumexp(x, -1, **kw),
    "entropy": jaxsoft.entropy,
    "cross_entropy": lambda x, **kw: jaxsoft.cross_entropy(x, LABELS, **OPTIONS, **kw),
    "trace": lambda x, **kw: jaxsoft.softmax_jacobian(x, **kw).trace(),
    "linear": lambda x, **kw: jaxsoft.linear_cross_entropy(
        np.eye(3), x, LABELS, reduction="none", **OPTIONS, **kw
    ),
    "log_probs": lambda x, **kw: jnp.stack(
        jaxsoft.linear_log_probs(np.eye(3), x, LABELS, temperature=1.5, **kw)[:3]
    ),
    "kl": lambda x, **kw: jaxsoft.linear_kl_divergence(
        np.eye(3), x, np.eye(3)[::-1], jnp.sin(x), reduction="none", **kw
    ),
}


def parts(x):
    return jnp.moveaxis(x.reshape(3, DEVICES, -1), 1, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loss_of_all_classes(name):
    loss = LOSSES[name]

    def divided(x):
        mapped = jax.vmap(lambda part: loss(part, axis_name="v"), axis_name="v")
        return mapped(parts(x))[0]

    both = lambda f: (f(X), jax.jacrev(f)(X))
    found, forward, wanted = jax.jit(lambda: (both(divided), jax.jacfwd(divided)(X), both(loss)))()
    for a, b in zip((*found, forward), (*wanted, wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


def test_label_outside_all_classes_is_nan_on_every_device():
    labels = np.array([16, -1, 15])
    loss = lambda part: jaxsoft.cross_entropy(part, labels, axis_name="v")
    found = jax.vmap(loss, axis_name="v")(parts(X))
    assert np.array_equal(np.isnan(found), [[True, True, False]] * DEVICES)


def test_unknown_axis_name():
    with pytest.raises(ValueError, match="softmax: axis_name must name mesh axes"):
        jaxsoft.softmax(X, axis_name="v")
