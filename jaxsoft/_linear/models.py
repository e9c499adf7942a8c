"""What the functions of x @ w check of their arguments, and make of them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft._core import devices, options, validation
from jaxsoft._core.devices import Mesh
from jaxsoft._linear.operands import Layer, Options, widest
from jaxsoft._rows.logits import compute_dtype


class Model(NamedTuple):
    """A linear layer and what it is applied to.

    Attributes:
        x: features, shape [..., d].
        w: shape [d, n].
        bias: shape [n], or None.
        softcap: a number, or None.
    """

    x: Float[Array, "..."]
    w: Float[Array, "..."]
    bias: Float[Array, "..."] | None
    softcap: Any


def checked(function: str, x: Any, w: Any, bias: Any, softcap: Any, prefix: str = "") -> Model:
    """Checks one model, whose arguments have names with the prefix."""
    x = validation.floating(function, f"{prefix}x", x)
    w = validation.floating(function, f"{prefix}w", w)
    validation.matrix(function, f"{prefix}w", w, x, f"{prefix}x")
    bias = options.per_class(function, f"{prefix}bias", bias, w.shape[1], "one for each class")
    return Model(x, w, bias, options.softcap(function, softcap, f"{prefix}softcap"))


class Prepared(NamedTuple):
    """What a program computes with.

    Attributes:
        x: the features of each model as a matrix, of the type of its products; on several devices
            of the compute dtype, for their gradients are added up before they are rounded.
        layer: the layers, without options for all models.
        others: the other arrays, those with fractions in the compute dtype.
        dtype: the compute dtype.
    """

    x: tuple[Float[Array, "t _"], ...]
    layer: Layer
    others: tuple[Any, ...]
    dtype: jnp.dtype


def prepared(models: tuple[Model, ...], *others: Array | None, mesh: Mesh | None) -> Prepared:
    """Arrays of the types in which they are computed with, which differ along the same mesh axes.

    Each model keeps a 16-bit type of its own.
    """
    own = [jnp.promote_types(model.x.dtype, model.w.dtype) for model in models]
    wide = widest(*own)
    own = [dtype if compute_dtype(dtype) == wide else wide for dtype in own]

    def widened(a: Any) -> Array | None:
        discrete = a is None or validation.is_discrete(jnp.asarray(a))
        return a if discrete else jnp.asarray(a, wide)

    x, w, bias, softcap = zip(*models, strict=True)
    w = tuple(w.astype(dtype) for w, dtype in zip(w, own, strict=True))
    bias, softcap, others = (tuple(map(widened, a)) for a in (bias, softcap, others))
    leaves, tree = jax.tree.flatten((w, x, bias, softcap, others))
    aligned = devices.aligned(*leaves, mesh=mesh)
    w, x, bias, softcap, others = jax.tree.unflatten(tree, aligned)

    def matrix(x: Array, dtype: jnp.dtype) -> Array:
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(wide if mesh else dtype)

    return Prepared(tuple(map(matrix, x, own)), Layer(w, Options(bias, softcap)), others, wide)
