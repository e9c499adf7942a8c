"""Trains on addition modulo 113 with three losses, two of which collapse.

    python notebooks/softmax_collapse.py            # the full run: softmax_collapse.json beside it
    python notebooks/softmax_collapse.py --help     # other fractions, losses, seeds, steps, output

The experiment is that of Prieto et al. 2025, arXiv 2501.04697. The notebook 05_softmax_collapse
imports the model and the training from here, and shows what the full run has written.
"""

import argparse
import dataclasses
import functools
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxsoft

LOSSES = ("optax, float32", "optax, float64", "jaxsoft, float32")
PLAN = {0.7: (11_000, 3), 0.4: (7_500, 3)}  # fraction of the table: steps and seeds
DATA = Path(__file__).with_suffix(".json")

Params = dict[str, jax.Array]
Pairs = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that makes a run what it is, besides its loss, fraction, seed and length."""

    modulus: int = 113
    width: int = 200  # of both hidden layers
    learning_rate: float = 5e-4
    # Those of the authors' code, as a public copy has it. The lower decay lets Adam follow a
    # gradient that falls by decades: with the usual 0.999 the loss falls far more slowly.
    b2: float = 0.99
    epsilon: float = 1e-30
    # Adam divides by the root of the squared gradients, so it is blind to a factor of the loss, and
    # a power of two changes no digit. But with this one (1 - b2) times the square of a gradient is
    # in the range of float32 from 1e-36 to 16; without it, it underflows from 1e-18 down.
    scale: float = 2.0**60
    every: int = 100  # steps from one record to the next


def per_example(loss: str, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each example. Float64 is the loss's alone: logits and gradients are float32."""
    match loss:
        case "optax, float32":
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        case "optax, float64":
            wide = logits.astype(jnp.float64)
            return optax.softmax_cross_entropy_with_integer_labels(wide, labels)
        case "jaxsoft, float32":
            return jaxsoft.cross_entropy(logits, labels)
        case "exact":  # of these logits: to compare all runs with one measure
            return jaxsoft.cross_entropy(logits.astype(jnp.float64), labels)
    raise ValueError(f"per_example: loss must be one of {LOSSES} or 'exact', got {loss!r}")


def split(settings: Settings, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """The pairs to train on, drawn without replacement, and the others."""
    cells = np.random.default_rng(seed).permutation(settings.modulus**2)
    count = int(fraction * len(cells))
    a, b = jnp.divmod(jnp.asarray(cells, jnp.int32), settings.modulus)
    return (a[:count], b[:count]), (a[count:], b[count:])


def init(settings: Settings, seed: int) -> Params:
    """Weights uniform within ±1/√(inputs), as `torch.nn.Linear` draws them."""
    n, width = settings.modulus, settings.width
    shapes = {"left": (n, width), "right": (n, width), "hidden": (width, width), "out": (width, n)}
    inputs = {"left": 2 * n, "right": 2 * n, "hidden": width, "out": width}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.uniform(key, shape, jnp.float32, -1, 1) * inputs[name] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def apply(params: Params, pairs: Pairs) -> jax.Array:
    """Logits of the sums. A row of each matrix is its product with a one-hot number."""
    a, b = pairs
    x = jax.nn.relu(params["left"][a] + params["right"][b])
    return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def scaled_gradient(
    settings: Settings, loss: str, params: Params, pairs: Pairs
) -> tuple[jax.Array, Params]:
    """The mean loss, and the gradient of `settings.scale` times that."""
    labels = sum(pairs) % settings.modulus

    def scaled(params: Params) -> tuple[jax.Array, jax.Array]:
        mean = per_example(loss, apply(params, pairs), labels).mean()
        return settings.scale * mean, mean

    grads, mean = jax.grad(scaled, has_aux=True)(params)
    return mean, grads


def optimizer(settings: Settings) -> optax.GradientTransformation:
    return optax.adam(settings.learning_rate, b2=settings.b2, eps=settings.epsilon)


@functools.partial(jax.jit, static_argnames=("settings", "loss"))
def advance(
    settings: Settings, loss: str, params: Params, state: Any, pairs: Pairs
) -> tuple[Params, Any, jax.Array]:
    """`settings.every` steps on the whole batch, and the loss before each of them."""

    def step(carry: tuple[Params, Any], _: None) -> tuple[tuple[Params, Any], jax.Array]:
        params, state = carry
        mean, grads = scaled_gradient(settings, loss, params, pairs)
        updates, state = optimizer(settings).update(grads, state, params)
        return (optax.apply_updates(params, updates), state), mean

    (params, state), losses = jax.lax.scan(step, (params, state), length=settings.every)
    return params, state, losses


@functools.partial(jax.jit, static_argnames=("settings", "loss"))
def measure(
    settings: Settings, loss: str, params: Params, train: Pairs, test: Pairs
) -> dict[str, jax.Array]:
    """One record. Gradients are without the factor, their norms and products in float64."""

    def inner(x: Params, y: Params) -> jax.Array:
        x, y = (jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree) for tree in (x, y))
        return sum(map(jnp.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))

    def accuracy(pairs: Pairs) -> jax.Array:
        right = apply(params, pairs).argmax(-1) == sum(pairs) % settings.modulus
        return right.mean(dtype=jnp.float64)

    mean, grads = scaled_gradient(settings, loss, params, train)
    exact_mean, exact_grads = scaled_gradient(settings, "exact", params, train)
    norm, exact_norm = jnp.sqrt(inner(grads, grads)), jnp.sqrt(inner(exact_grads, exact_grads))
    losses = per_example(loss, apply(params, train), sum(train) % settings.modulus)
    return {
        "loss": mean,
        "exact loss": exact_mean,
        "zero losses": (losses == 0).mean(dtype=jnp.float64),
        "gradient norm": norm / settings.scale,
        "exact gradient norm": exact_norm / settings.scale,
        "cosine": inner(grads, exact_grads) / jnp.maximum(norm * exact_norm, 1e-300),
        "train accuracy": accuracy(train),
        "test accuracy": accuracy(test),
    }


def run(
    settings: Settings,
    loss: str,
    fraction: float,
    seed: int,
    steps: int,
    progress: Callable[[int, dict[str, float]], None] = lambda steps, record: None,
) -> dict[str, Any]:
    """Trains one model.

    Returns:
        What was run; "collapse", the first step before which the loss, as the run computes it, is
        exactly 0 for every example to train on (None: there is none); and "curves", one list for
        each number of `measure`, at the steps 0, `settings.every`, 2 `settings.every`, ....
    """
    if not jax.config.jax_enable_x64:
        raise RuntimeError('run: call jax.config.update("jax_enable_x64", True) first')
    train, test = split(settings, fraction, seed)
    params = init(settings, seed)
    state = optimizer(settings).init(params)
    records = [measure(settings, loss, params, train, test)]
    collapse = None
    for start in range(0, steps, settings.every):
        params, state, losses = advance(settings, loss, params, state, train)
        records.append(measure(settings, loss, params, train, test))
        zero = np.asarray(losses) == 0  # no loss is negative: a mean of 0 is 0 for all examples
        if collapse is None and zero.any():
            collapse = start + int(zero.argmax())
        progress(settings.every, records[-1])
    curves = {name: [float(record[name]) for record in records] for name in records[0]}
    about = {"loss function": loss, "fraction": fraction, "seed": seed, "steps": steps}
    return {**about, "collapse": collapse, "curves": curves}


def as_json(about: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """One line for each run, all numbers of curves with four digits."""

    def rounded(run: dict[str, Any]) -> dict[str, Any]:
        curves = {k: [float(f"{x:.4g}") for x in curve] for k, curve in run["curves"].items()}
        return {**run, "curves": curves}

    lines = ",\n".join(json.dumps(rounded(run), separators=(",", ":")) for run in runs)
    head = json.dumps(about, indent=2).removesuffix("\n}")
    return f'{head},\n  "runs": [\n{lines}\n  ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fraction", type=float, nargs="+", default=list(PLAN), metavar="F")
    parser.add_argument("--loss", nargs="+", default=list(LOSSES), choices=LOSSES, metavar="NAME")
    parser.add_argument("--seeds", type=int, metavar="N", help="as many for every fraction")
    parser.add_argument("--steps", type=int, metavar="N", help="as many for every run")
    parser.add_argument("--output", type=Path, default=DATA, metavar="FILE")
    args = parser.parse_args()

    jax.config.update("jax_enable_x64", True)
    settings = Settings()
    plan = []
    for fraction in args.fraction:
        steps, seeds = PLAN.get(fraction, PLAN[0.7])
        for seed in range(args.seeds or seeds):
            plan += [(loss, fraction, seed, args.steps or steps) for loss in args.loss]
    plan.sort(key=lambda run: run[2])  # seed by seed: what is there after a part is of all kinds
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (jax, jaxsoft, np, optax)},
        },
        "device": str(jax.devices()[0].device_kind),
        "settings": dataclasses.asdict(settings),
    }
    runs = []
    with tqdm(total=sum(steps for *_, steps in plan), unit="step", mininterval=5) as bar:
        for loss, fraction, seed, steps in plan:

            def progress(steps: int, record: dict[str, float]) -> None:
                bar.set_postfix({k: f"{record[k]:.3g}" for k in ("exact loss", "test accuracy")})
                bar.update(steps)

            bar.set_description(f"{loss}, {fraction}, seed {seed}")
            runs.append(run(settings, loss, fraction, seed, steps, progress))
            args.output.write_text(as_json(about, runs), encoding="utf-8")
            best = max(runs[-1]["curves"]["test accuracy"])
            collapse = runs[-1]["collapse"]
            bar.write(
                f"{loss}, fraction {fraction}, seed {seed}: best test accuracy {best:.2%}, "
                + ("no collapse" if collapse is None else f"collapse at step {collapse}"),
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
