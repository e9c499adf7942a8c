"""The figure of the classifier of Iris flowers, in the style of the notebooks."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from jaxsoft import plot
from jaxsoft._demo.iris import Training

_INK, _HELD_OUT = "0.25", "#CC79A7"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": "0.4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "legend.frameon": False,
}


def save_figure(training: Training, path: Path) -> None:
    """Saves the training curve, and the slopes and the Jacobian at the least certain flower."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(14.5, 4.0), layout="constrained")
        curve, slopes, heat = figure.subplots(1, 3, width_ratios=(5, 7, 5))
        _draw_losses(training, curve)
        logits = jnp.asarray(training.logits, jnp.float32)
        likeliest = int(np.argmax(training.probabilities))
        plot.slopes(logits, likeliest, training.classes, ax=slopes)
        slopes.set_title(f"The flower that it is least sure of, a {training.species}")
        # No derivative of softmax exceeds 1/4, so the colours mean the same at every flower.
        jacobian = np.asarray(training.jacobian)
        plot.jacobian_heatmap(jacobian, training.classes, limit=0.25, ax=heat)
        heat.set_title("Its Jacobian", pad=10)
        figure.savefig(path, dpi=150)


def _draw_losses(training: Training, ax: Axes) -> None:
    ax.plot(training.train_loss, color=_INK, lw=1.8, label="training")
    ax.plot(training.held_out_loss, color=_HELD_OUT, lw=1.8, label="held out")
    ax.set(yscale="log", xlabel="step of Adam", ylabel="mean cross-entropy (nats)")
    ax.set_title(f"{training.correct} of {training.held_out} held-out flowers are right")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.margins(x=0)
    ax.legend()
