"""What the figures share: colours, checks of arguments, signed numbers, Axes and their edges."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar

from jaxsoft._core import validation

# The colours of Okabe and Ito, which can be told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "0.25"


def numbers(function: str, argument: str, value: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns finite numbers in float64, or raises `TypeError` or `ValueError`."""
    given = np.asarray(validation.floating(function, argument, value), np.float64)
    if not np.isfinite(given).all():
        raise ValueError(f"{function}: {argument} must be finite, got inf or NaN")
    return given


def names_of(function: str, class_names: Sequence[str] | None, n: int) -> Sequence[str]:
    """Returns the names of n classes, by default their numbers."""
    names = [str(i) for i in range(n)] if class_names is None else class_names
    if len(names) != n:
        raise ValueError(f"{function}: class_names must be {n} names, got {len(names)}")
    return names


def signed(largest: float) -> Callable[[float], str]:
    """How to write numbers up to the largest: with three digits of it, and a proper minus sign."""
    decimals = 2 - int(np.floor(np.log10(largest))) if largest > 0 else 0
    form, least = f"+.{max(decimals, 0)}f", 10.0**-decimals / 2
    if decimals > 5:
        form, least = "+.1e", 0.0
    return lambda x: f"{x:{form}}".replace("-", "−") if abs(x) >= least else "0"


def new_axes(size: tuple[float, float]) -> Axes:
    """The Axes of a new figure."""
    return plt.figure(figsize=size, layout="constrained").add_subplot()


def plain(ax: Axes) -> None:
    """Draws the frame as two grey lines, at the left and below."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.4")
    ax.tick_params(color="0.4", labelcolor="0.3")


def colour_bar(ax: Axes, image: ScalarMappable, label: str) -> Colorbar:
    """Draws a bar of the colours of an image beside it."""
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.03)
    ax.set_anchor("E")  # beside the bar, where the picture does not fill its place
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar
