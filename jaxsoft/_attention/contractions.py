"""The three products of matrices of attention, each the transpose of the two others."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from jaxsoft._rows.logits import compute_dtype, product_dtype

Product = Callable[[Array, Array], Array]


# They are the derivatives of one sum, Σ w[t, s] q[t] · k[s], by w, by q and by k, so that the
# transpose of each is another one. JAX's own transpose of a transpose exchanges the factors, and
# XLA:CPU (jax 0.10) then transposes w, the largest array: loss and gradient of 2048 queries and
# keys take 1.2 times as long.
def _product(name: str, formula: Product) -> Primitive:
    """A product of two arrays with a batch axis, as a primitive."""
    primitive = Primitive(f"attention_{name}")
    primitive.def_impl(formula)
    primitive.def_abstract_eval(lambda x, y: jax.make_jaxpr(formula)(x, y).out_avals[0])
    mlir.register_lowering(primitive, mlir.lower_fun(formula, multiple_results=False))

    def batched(args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Array, int]:
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        given = [batching.bdim_at_front(x, d, size) for x, d in zip(args, dims, strict=True)]
        together = [x.reshape(size * x.shape[1], *x.shape[2:]) for x in given]
        out = primitive.bind(*together)
        return out.reshape(size, given[0].shape[1], *out.shape[1:]), 0

    batching.primitive_batchers[primitive] = batched
    return primitive


def _dot(x: Array, y: Array, contracting: Any, batch: Any) -> Array:
    wide = compute_dtype(x.dtype)
    return lax.dot_general(x, y, (contracting, batch), preferred_element_type=wide)


def _queries_times_keys(q: Array, k: Array) -> Array:
    return _dot(q, k, ((4,), (3,)), ((0, 2), (0, 2)))


def _weights_times_keys(w: Array, k: Array) -> Array:
    return jnp.moveaxis(_dot(w, k, ((4,), (1,)), ((0, 1), (0, 2))), 2, 1)


def _queries_times_weights(q: Array, w: Array) -> Array:
    return jnp.transpose(_dot(q, w, ((1, 3), (2, 3)), ((0, 2), (0, 1))), (0, 3, 1, 2))


_QUERIES_TIMES_KEYS = _product("queries_times_keys", _queries_times_keys)
_WEIGHTS_TIMES_KEYS = _product("weights_times_keys", _weights_times_keys)
_QUERIES_TIMES_WEIGHTS = _product("queries_times_weights", _queries_times_weights)


def queries_times_keys(
    q: Float[Array, "b t k g h"], k: Float[Array, "b s k h"]
) -> Float[Array, "b k t g s"]:
    """Σ_h q k, in the compute dtype."""
    return _QUERIES_TIMES_KEYS.bind(q, k)


def weights_times_keys(
    w: Float[Array, "b k t g s"], k: Float[Array, "b s k h"]
) -> Float[Array, "b t k g h"]:
    """Σ_s w k, in the compute dtype."""
    return _WEIGHTS_TIMES_KEYS.bind(w, k)


def queries_times_weights(
    q: Float[Array, "b t k g h"], w: Float[Array, "b k t g s"]
) -> Float[Array, "b s k h"]:
    """Σ_{t, g} q w, in the compute dtype."""
    return _QUERIES_TIMES_WEIGHTS.bind(q, w)


def mixed(product: Product, x: Array, y: Array) -> Array:
    """Rounds both factors to the product dtype of the narrower one, and multiplies them."""
    narrow = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    dtype = product_dtype(narrow)
    return product(x.astype(dtype), y.astype(dtype))


# In a transpose rule the factor that is wanted has a type and no value.
def _like(x: Any, value: Array) -> Array:
    return value.astype(x.aval.dtype)


ad.defbilinear(
    _QUERIES_TIMES_KEYS,
    lambda w, q, k: _like(q, mixed(weights_times_keys, w, k)),
    lambda w, q, k: _like(k, mixed(queries_times_weights, q, w)),
)
ad.defbilinear(
    _WEIGHTS_TIMES_KEYS,
    lambda q, w, k: _like(w, mixed(queries_times_keys, q, k)),
    lambda q, w, k: _like(k, mixed(queries_times_weights, q, w)),
)
ad.defbilinear(
    _QUERIES_TIMES_WEIGHTS,
    lambda k, q, w: _like(q, mixed(weights_times_keys, w, k)),
    lambda k, q, w: _like(w, mixed(queries_times_keys, q, k)),
)
