"""The pictures of the pages, for a light and for a dark page: two by cells of the notebooks."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxsoft

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ORANGE, BLUE, GREY = "#D55E00", "#0072B2", "#888888"  # legible on white and on black
INKS = {"light": "0.25", "dark": "0.8"}


def _cell(notebook: str, phrase: str) -> str:
    """The one cell of code that contains a phrase."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    (cell,) = (source for source in found if phrase in source)
    return cell


def _drawn_by(notebook: str, before: list[str], figure: str) -> Callable[[], None]:
    """What draws the figure of one cell, after the cells with what it needs."""
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()), plt.rc_context():
        for phrase in before:
            exec(_cell(notebook, phrase), names)

    def draw() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(_cell(notebook, figure), names)

    return draw


def _memory() -> None:
    sizes, tokens, width = np.array([8192, 16384, 32768, 65536, 131072]), 4096, 256

    def plain(x, w, labels):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels).mean()

    def megabytes(loss: Callable[..., jax.Array], n: int) -> float:
        shapes = [(tokens, width), (width, n), (tokens,)]
        args = map(jax.ShapeDtypeStruct, shapes, [jnp.float32, jnp.float32, jnp.int32])
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    _, ax = plt.subplots(figsize=(6.4, 3.6))
    for name, loss, colour in (
        ("Optax on x @ w", plain, ORANGE),
        ("linear_cross_entropy", jaxsoft.linear_cross_entropy, BLUE),
    ):
        needed = [megabytes(loss, n) for n in sizes.tolist()]
        ax.plot(sizes, needed, "o-", color=colour, lw=1.8, ms=5)
        place = {"textcoords": "offset points", "ha": "right", "color": colour}
        ax.annotate(name, (sizes[2], needed[2]), (-8, 6), **place)
    ax.plot(sizes, 4 * tokens * sizes / 1e6, color=GREY, lw=1.2, ls="--")
    ax.annotate(
        "the logits alone",
        (sizes[3], 4 * tokens * sizes[3] / 1e6),
        (0, -16),
        textcoords="offset points",
        color=GREY,
    )
    ax.set(xscale="log", yscale="log", xlabel="words in the vocabulary", ylabel="MB")
    ax.set_title(f"Temporary memory of a loss and its gradients, {tokens} tokens")
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter("{x:,.0f}")


def _spectrum() -> None:
    gaps = jnp.linspace(-2, 8, 201)
    rest = jnp.broadcast_to(-0.7 * jnp.arange(5.0), (gaps.size, 5))
    jacobian = jaxsoft.softmax_jacobian(jnp.concatenate([gaps[:, None], rest], 1))
    _, ax = plt.subplots(figsize=(6.4, 3.6))
    ax.plot(gaps, jacobian.weights, color=ORANGE, lw=1.0, ls=(0, (2, 2)))
    ax.plot(gaps, jacobian.eigvalsh()[:, 1:], color=BLUE, lw=1.8)
    ax.set(xlim=(-2, 8), ylim=(0, 1), xlabel="lead of one of six classes (logit units)")
    ax.set_title("Eigenvalues of the Jacobian, each between two probabilities")
    ax.text(3.2, 0.33, "eigenvalues", color=BLUE, weight="bold")
    ax.text(3.6, 0.88, "probabilities", color=ORANGE)


def _look(theme: str) -> dict[str, object]:
    ink = INKS[theme]
    colours = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    return {
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        **dict.fromkeys(colours, ink),
    }


def draw(folder: Path) -> None:
    """Writes NAME-light.png and NAME-dark.png of each picture."""
    plt.switch_backend("agg")
    first = "01_softmax_derivative"
    setup = ["plt.rcParams.update", "logits = jnp.array([1.43"]
    pictures = {
        "error": _drawn_by(first, [*setup, "getcontext().prec"], "the gradient is exactly 0"),
        "flow": _drawn_by(first, setup, "def cross_entropy_flow"),
        "memory": _memory,
        "spectrum": _spectrum,
    }
    for name, picture in pictures.items():
        for theme in INKS:
            with plt.rc_context(_look(theme)):
                picture()
                plt.savefig(folder / f"{name}-{theme}.png", dpi=150, transparent=True)
                plt.close("all")
