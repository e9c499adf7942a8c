"""What is added up over chunks of classes, and the gradients.

A quantity of a token is a function of sums over the classes. A chunk of tokens goes through the
chunks of classes once for the sums, and once more for their pullback, which makes the logits again.
JAX differentiates this as it stands: reverse mode makes every chunk again.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft._core import devices, slices
from jaxsoft._core.devices import Mesh
from jaxsoft._linear import operands
from jaxsoft._linear.loops import Division, over_classes, over_tokens
from jaxsoft._linear.operands import Classes, Layer, Options, PerModel, Tokens
from jaxsoft._rows.logits import compute_dtype, product_dtype


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Live:
    """Which arguments a gradient is wanted for."""

    x: tuple[bool, ...]
    temperature: bool | None
    w: tuple[bool, ...]
    options: Options


class Gradients(NamedTuple):
    """Gradients in the compute dtype; None for those not wanted."""

    x: tuple[Float[Array, "t _"] | None, ...]
    temperature: Float[Array, " t"] | None
    w: tuple[Float[Array, "_ n"] | None, ...]
    options: Options


class Found(NamedTuple):
    """What is known of each token after all classes.

    Attributes:
        constants: what the sums are relative to, as a maximum: without a derivative.
        sums: over the classes, given the constants.
    """

    constants: Any
    sums: Any


@runtime_checkable
class Quantity(Protocol):
    """What is added up over the classes."""

    @property
    def relative(self) -> bool:
        """Whether the sums need the constants of all classes, and so a pass of their own."""

    def nothing(self, tokens: Tokens, layer: Layer) -> Any:
        """What is known of each token before the first class."""

    def extended(self, so_far: Any, logits: PerModel, tokens: Tokens, classes: Classes) -> Any:
        """The same with a chunk of classes more."""

    def of_devices(self, part: Any, tokens: Tokens, layer: Layer, mesh: Mesh) -> Any:
        """That of all classes from that of the classes on each device."""

    def found(self, so_far: Any) -> Found:
        """What is known at the end, with the sums of no class if they are relative."""

    def sums(self, logits: PerModel, constants: Any, tokens: Tokens, classes: Classes) -> Any:
        """What a chunk of classes adds to the sums, given the constants."""


@runtime_checkable
class Loss(Quantity, Protocol):
    """A loss of each token that is a function of such sums."""

    def loss(self, found: Found, tokens: Tokens, layer: Layer, mesh: Mesh | None) -> Array:
        """The loss; 0 of an ignored token."""


# ------------------------------------------------------------------------------------ the sums


def of_all_tokens(quantity: Quantity, tokens: Tokens, layer: Layer, division: Division) -> Found:
    """What is found of each token, in one product of matrices for each model."""

    def of_chunk(_: None, tokens: Tokens) -> tuple[None, Found]:
        return None, of_chunk_of_tokens(quantity, tokens, layer, division, keep=False)[0]

    return over_tokens(of_chunk, None, tokens, division)[1]


def of_chunk_of_tokens(
    quantity: Quantity, tokens: Tokens, layer: Layer, division: Division, *, keep: bool
) -> tuple[Found, tuple[Array, ...] | None]:
    """With the products x w of every chunk of classes, if they are to be kept.

    What is found is alike on all devices; the products are those of the classes on each.
    """
    again = quantity.relative

    def step(so_far: Any, classes: Classes, _: None) -> tuple[Any, Any]:
        products = _products(tokens, classes)
        logits = operands.logits(products, classes)
        so_far = quantity.extended(so_far, logits, tokens, classes)
        return so_far, products if keep or (again and division.keep) else None

    nothing = devices.typed(quantity.nothing(tokens, layer), tokens.x[0])
    so_far, kept = over_classes(step, nothing, None, tokens, layer, division)
    if division.mesh is not None:
        so_far = quantity.of_devices(so_far, tokens, layer, division.mesh)
    found = quantity.found(so_far)
    if not again:
        return found, kept

    def add(sums: Any, classes: Classes, kept: tuple[Array, ...] | None) -> tuple[Any, None]:
        products = _products(tokens, classes) if kept is None else kept
        logits = operands.logits(products, classes)
        part = quantity.sums(logits, found.constants, tokens, classes)
        return jax.tree.map(jnp.add, sums, part), None

    start = devices.copied(found.sums, tokens.x[0], division.mesh)
    sums, _ = over_classes(add, start, kept, tokens, layer, division)
    return found._replace(sums=devices.total(sums, division.mesh)), kept


def _products(tokens: Tokens, classes: Classes) -> tuple[Array, ...]:
    """x w of each model."""
    return tuple(map(_product, tokens.x, classes.layer.w))


def _product(x: Array, w: Array) -> Array:
    """x w of the dtype of w, accumulated in the compute dtype."""
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=compute_dtype(w.dtype))


# ------------------------------------------------------------------------------- their pullback


def zeros(tokens: Tokens, layer: Layer, live: Live) -> Gradients:
    """Gradients to add to, of those that are wanted; they differ between devices as x does."""

    def zero(wanted: bool | None, leaf: Array | None) -> Array | None:
        if not wanted or leaf is None:
            return None
        return devices.typed(jnp.zeros(leaf.shape, compute_dtype(leaf.dtype)), tokens.x[0])

    options: Any = jax.tree.map(zero, live.options, layer.options)
    temperature = zero(live.temperature, tokens.temperature)
    x, w = tuple(map(zero, live.x, tokens.x)), tuple(map(zero, live.w, layer.w))
    return Gradients(x, temperature, w, options)


def pulled_back(
    quantity: Quantity,
    so_far: Gradients,
    tokens: Tokens,
    layer: Layer,
    constants: Any,
    sums_bar: Any,
    division: Division,
    kept: tuple[Array, ...] | None = None,
) -> Gradients:
    """Adds the gradients of a chunk of tokens, in one or two products of matrices for each model.

    If the classes lie on several devices, each device has the gradients by its own columns, and a
    part of every other gradient, to be added to the parts of the others.
    """

    def step(
        so_far: Gradients, classes: Classes, kept: tuple[Array, ...] | None
    ) -> tuple[Gradients, None]:
        w, options = classes.layer

        def sums_of(
            products: tuple[Array, ...], temperature: Array | None, options: Options
        ) -> Any:
            part = classes._replace(layer=Layer(w, options))
            of_tokens = tokens._replace(temperature=temperature)
            return quantity.sums(operands.logits(products, part), constants, of_tokens, part)

        products = _products(tokens, classes) if kept is None else kept
        _, pullback = jax.vjp(sums_of, products, tokens.temperature, options)
        products_bar, temperature_bar, options_bar = pullback(sums_bar)
        x_bar, w_bar = [], []
        for i, bar in enumerate(products_bar):
            factor = product_dtype(w[i].dtype)  # p - y is formed in the compute dtype
            u_bar = bar.astype(factor)
            x_bar.append(None if so_far.x[i] is None else _product(u_bar, w[i].T.astype(factor)))
            of_w = so_far.w[i] is not None
            w_bar.append(_product(tokens.x[i].T.astype(factor), u_bar) if of_w else None)
        part = Gradients(tuple(x_bar), temperature_bar, tuple(w_bar), options_bar)
        return added(so_far, part, classes.start), None

    return over_classes(step, so_far, kept, tokens, layer, division)[0]


def added(total: Gradients, part: Gradients, start: Array | int) -> Gradients:
    """Adds what comes from a chunk of classes that begins at `start` to the gradients wanted."""

    def sum_of(total: Array | None, part: Array | None) -> Array | None:
        if total is None or part is None:
            return total
        return slices.added(total, part, [*(0,) * (part.ndim - 1), start])

    return jax.tree.map(sum_of, total, part, is_leaf=lambda leaf: leaf is None)
