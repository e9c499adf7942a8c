"""slopes: probabilities as functions of one logit, with their tangents."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Shaped
from matplotlib.axes import Axes

from jaxsoft._core import class_ids, validation
from jaxsoft._functions.products import softmax_jvp
from jaxsoft._functions.softmax import softmax
from jaxsoft.plot import _shared


def slopes(
    logits: Shaped[ArrayLike, "..."],
    index: int,
    class_names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draws the probabilities while one logit varies, and their tangents at its present value.

        ∂p_i/∂z_i = p_i (1 - p_i)          ∂p_j/∂z_i = -p_i p_j

    Args:
        logits: one row of n ≥ 2 logits.
        index: the class i whose logit varies.
        class_names: n names. Class i and the five most probable others are drawn.
        ax: where to draw. Default: a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: `logits` is complex or not an array, `index` is not an integer.
        ValueError: `logits` is not one row of two finite logits or more, `index` is outside [0, n),
            the number of names is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from matplotlib.figure import Figure
        >>> from jaxsoft import plot
        >>> logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
        >>> ax = plot.slopes(logits, 0, ["cat", "dog", "fox"], ax=Figure().subplots())
        >>> for text in ax.get_legend().get_texts():
        ...     print(text.get_text())
        cat  pᵢ(1 − pᵢ) = +0.250
        dog  −pᵢpⱼ = −0.125
        fox  −pᵢpⱼ = −0.125
    """
    name = "slopes"
    values = validation.floating(name, "logits", logits)
    n = values.size
    if values.ndim != 1 or n < 2:
        raise ValueError(f"{name}: logits must have shape (n,) with n ≥ 2, got {values.shape}")
    if not bool(jnp.isfinite(values).all()):
        raise ValueError(f"{name}: logits must be finite, got {values}")
    at = int(class_ids.one_class(name, "index", index, n, ()))
    names = _shared.names_of(name, class_names, n)

    present = float(values[at])
    others = np.delete(np.asarray(values, float), at)
    balance = float(np.logaddexp.reduce(others))  # where p_i is one half
    low, high = min(balance - 6, present - 2), max(balance + 6, present + 2)
    grid = jnp.linspace(low, high, 401, dtype=values.dtype)
    varied = jnp.broadcast_to(values, (grid.size, n)).at[:, at].set(grid)
    curves = np.asarray(softmax(varied), float)
    of_logits = softmax(values)
    tangents = np.asarray(softmax_jvp(of_logits, jnp.zeros_like(values).at[at].set(1)), float)
    p = np.asarray(of_logits, float)
    falling = [int(j) for j in np.argsort(-p, kind="stable") if j != at]
    drawn = [at, *sorted(falling[: len(_shared.COLOURS) - 1])]

    ax = ax or _shared.new_axes((7.4, 3.8))
    ax.axvline(present, color="0.75", lw=0.9, zorder=0)
    written = _shared.signed(float(abs(tangents[drawn]).max()))
    for position, i in enumerate(drawn):
        # While there are enough, the colour of a class is the same whichever logit varies.
        colour = _shared.COLOURS[i if n <= len(_shared.COLOURS) else position]
        ax.plot(grid, curves[:, i], color=colour, alpha=0.45)
        # Strokes of about equal length in the picture.
        run = 0.09 * (high - low) / np.hypot(1, 0.6 * (high - low) * tangents[i])
        ends = np.array([-run, run])
        formula = "pᵢ(1 − pᵢ)" if i == at else "−pᵢpⱼ"
        label = f"{names[i]}  {formula} = {written(tangents[i])}"
        ax.plot(present + ends, p[i] + tangents[i] * ends, color=colour, lw=2.2, label=label)
        ax.plot(present, p[i], "o", color=colour, ms=4.5)
    ax.set(xlim=(low, high), ylim=(-0.04, 1.04))
    ax.set(xlabel=f"logit of {names[at]}", ylabel="probability")
    _shared.plain(ax)
    title = f"slopes at {present:.3g}".replace("-", "−")
    # The legend stands beside the Axes: curves and tangents can reach every place within them.
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    legend = ax.legend(title=title, **beside, frameon=False, alignment="left", fontsize=9)
    if ax.figure.get_layout_engine() is None:  # Nothing else would make room for it.
        box, beyond = ax.get_position(), legend.get_window_extent().x1 - ax.bbox.x1
        width = max(box.width - beyond / ax.figure.bbox.width, box.width / 3)
        ax.set_position((box.x0, box.y0, width, box.height))
    return ax
