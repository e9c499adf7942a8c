"""What is computed from: tokens, and the layer of one model or of several."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft._rows.logits import cap, compute_dtype, positive


class Tokens(NamedTuple):
    """What belongs to one token.

    Attributes:
        x: the features for each model, of the dtype of its weight; on several devices of the
            compute dtype.
        labels: the places of labels among the classes of the layer, one for each token or several;
            any other number if it is not there. None without labels.
        valid: whether the label exists or is ignored; None without labels.
        ignored: tokens that count for nothing, whatever they hold; None for none of them.
        temperature: T > 0 of each token, or None.
    """

    x: tuple[Float[Array, "t _"], ...]
    labels: Int[Array, "t ..."] | None
    valid: Bool[Array, "t ..."] | None
    ignored: Bool[Array, " t"] | None
    temperature: Float[Array, " t"] | None = None

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.x[0].shape[0]

    def with_temperature(self, temperature: Array | None) -> "Tokens":
        """Given one value for each token, or None: NaN for one that is not positive."""
        if temperature is None:
            return self
        scale = positive(temperature.reshape(-1), temperature.dtype)
        scale = scale if self.ignored is None else jnp.where(self.ignored, 1, scale)
        return self._replace(temperature=scale)


class Options(NamedTuple):
    """What all tokens share besides the weights, in the compute dtype; None where not asked for.

    Attributes:
        bias: of each model, added to its logits; -inf takes a class out.
        softcap: of each model, c of c tanh(logits / c).
        class_weights: the weight of each class in the loss.
        label_smoothing: the part of the target that is spread evenly over the classes.
        z_loss: the weight of the squared logarithm of the partition function.
    """

    bias: tuple[Float[Array, " n"] | None, ...]
    softcap: tuple[Float[Array, ""] | None, ...]
    class_weights: Float[Array, " n"] | None = None
    label_smoothing: Float[Array, ""] | None = None
    z_loss: Float[Array, ""] | None = None


class Layer(NamedTuple):
    """The weight of the layer of each model, and the options."""

    w: tuple[Float[Array, "_ n"], ...]
    options: Options

    @property
    def dtype(self) -> jnp.dtype:
        """What all is computed in."""
        return widest(*(w.dtype for w in self.w))

    def with_options(self, *options: Array | None) -> "Layer":
        """With the class weights, the label smoothing and the z-loss."""
        of_models = self.options[:2]
        return self._replace(options=Options(*of_models, *options))


class Classes(NamedTuple):
    """A chunk of classes.

    Attributes:
        layer: the layer with the columns of the chunk alone.
        start: the first of these columns.
        fresh: the columns that the chunk before does not have as well; None for all of them.
        places: the places of the labels of each token; the number of columns if it is elsewhere.
    """

    layer: Layer
    start: Int[Array, ""] | int
    fresh: Bool[Array, " c"] | None
    places: Int[Array, "t ..."] | None


PerModel = tuple[Array, ...]


def widest(*dtypes: jnp.dtype) -> jnp.dtype:
    """What is computed in where there are several types."""
    return max(map(compute_dtype, dtypes), key=lambda dtype: dtype.itemsize)


def logits(products: tuple[Array, ...], classes: Classes) -> PerModel:
    """u = c tanh((x w + b) / c) of each model, -inf in the columns that count elsewhere."""
    options = classes.layer.options

    def of_model(u: Array, bias: Array | None, softcap: Array | None) -> Array:
        u = u if bias is None else u + bias[None]
        u = u if softcap is None else cap(u, softcap)
        return u if classes.fresh is None else jnp.where(classes.fresh[None], u, -jnp.inf)

    return tuple(map(of_model, products, options.bias, options.softcap))
