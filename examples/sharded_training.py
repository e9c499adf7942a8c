"""The language model of language_model.py on the devices of a mesh, or on one device.

The sequences of a batch are divided along the mesh axis "data", the words of the vocabulary along
"vocabulary": their vectors, their biases and what the optimiser keeps of both. No device ever holds
the vectors of all words, nor the logits of a token for all of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import language_model
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from language_model import Params

import jaxsoft

PARTS = {"words": P("vocabulary", None), "bias": P("vocabulary")}  # the others are not divided


class State(NamedTuple):
    """What one step of training hands to the next."""

    params: Params
    optimizer: optax.OptState


class Training(NamedTuple):
    """The functions of a training run.

    Attributes:
        init: makes the first state.
        step: (state, batch) -> (state, loss before the step). It takes the memory of the state.
        place: puts a batch, which each process has, on the devices.
        shapes: of the state, with its shardings.
    """

    init: Callable[[], State]
    step: Callable[[State, jax.Array], tuple[State, jax.Array]]
    place: Callable[[np.ndarray], jax.Array]
    shapes: State


def mesh_of(data: int, vocabulary: int, processes: int = 1) -> Mesh:
    """A mesh of all processes' devices, whose axis "vocabulary" goes through all processes.

    So the classes are on several processes here, which is what this example is about. Between
    machines that are far apart one would divide the batch.
    """
    devices = np.array(jax.devices()[: data * vocabulary]).reshape(processes, data, -1)
    grid = devices.swapaxes(0, 1).reshape(data, vocabulary)
    return Mesh(grid, ("data", "vocabulary"), axis_types=(AxisType.Auto, AxisType.Auto))


def vectors(table: jax.Array, words: jax.Array, axis_name: str | None) -> jax.Array:
    """The rows of the words in the table. A device looks up those it has; their sum has all."""
    if axis_name is None:
        return table[words]
    rows = words - jax.lax.axis_index(axis_name) * len(table)
    here = (rows >= 0) & (rows < len(table))
    found = table[rows.clip(0, len(table) - 1)]
    return jax.lax.psum(jnp.where(here[..., None], found, 0), axis_name)


def loss(params: Params, batch: jax.Array, axis_name: str | None = None) -> jax.Array:
    """The mean over the sequences at hand."""
    words, labels = batch[:, :-1], batch[:, 1:]
    x = language_model.features(params, vectors(params["words"], words, axis_name))
    w, bias = params["words"].T, params["bias"]
    return jaxsoft.linear_cross_entropy(x, w, labels, bias=bias, axis_name=axis_name)


def loss_over(mesh: Mesh) -> Callable[[Params, jax.Array], jax.Array]:
    """The mean over all sequences, with each device's part of them and of the words."""

    def mean(params: Params, batch: jax.Array) -> jax.Array:
        parts = {name: PARTS.get(name, P()) for name in params}

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(parts, P("data")), out_specs=P())
        def of_part(params: Params, batch: jax.Array) -> jax.Array:
            return jax.lax.pmean(loss(params, batch, "vocabulary"), "data")

        return of_part(params, batch)

    return mean


def training(
    frequency: np.ndarray, rate: float, steps: int, seed: int, mesh: Mesh | None = None
) -> Training:
    """Training over a mesh, or on one device; from the same parameters, with the same batches."""
    optimizer = language_model.optimizer(rate, steps)
    missing = -len(frequency) % mesh.shape["vocabulary"] if mesh else 0

    def init() -> State:
        params = language_model.init(jax.random.key(seed), frequency)
        # Each device has as many words. Those that fill up the last are none: their bias is -inf.
        words = jnp.pad(params["words"], ((0, missing), (0, 0)))
        bias = jnp.pad(params["bias"], (0, missing), constant_values=-jnp.inf)
        params |= {"words": words, "bias": bias}
        return State(params, optimizer.init(params))

    def step(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
        of_batch = loss_over(mesh) if mesh else loss
        value, grads = jax.value_and_grad(of_batch)(state.params, batch)
        updates, inner = optimizer.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), inner), value

    shapes = jax.eval_shape(init)
    if mesh is None:
        return Training(jax.jit(init), jax.jit(step, donate_argnums=0), jnp.asarray, shapes)

    def sharding(part: P) -> NamedSharding:
        return NamedSharding(mesh, part)

    # The moments of Adam are divided as their parameters are.
    of_params = {name: sharding(PARTS.get(name, P())) for name in shapes.params}
    of_optimizer = optax.tree_map_params(
        optimizer,
        lambda _, of_parameter: of_parameter,
        shapes.optimizer,
        of_params,
        transform_non_params=lambda _: sharding(P()),
    )
    shardings = State(of_params, of_optimizer)

    def place(batch: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(batch.shape, sharding(P("data")), batch.__getitem__)

    return Training(
        jax.jit(init, out_shardings=shardings),
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding(P()))),
        place,
        jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shardings,
        ),
    )
