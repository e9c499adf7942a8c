"""jacobian_heatmap: the entries of a Jacobian as colours and numbers."""

import itertools
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import ArrayLike, Shaped
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

from jaxsoft._simplex.operator import SimplexJacobian
from jaxsoft.plot import _shared

_LEAST_SIZE = 6.0  # points, of text that can be read
_LINE = 1.25  # the distance of lines of text, in sizes of it


def jacobian_heatmap(
    jacobian: SimplexJacobian | Shaped[ArrayLike, "..."],
    class_names: Sequence[str] | None = None,
    *,
    limit: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws a Jacobian of softmax as a heat map, orange for positive and purple for negative.

    Row i says how the probability of class i answers to each logit. What is written depends on the
    size of the Axes at the time of the call: the names beside the rows and above the columns, or of
    many classes every second, fifth, tenth ... name; and the entries where they fit into their
    cells, with three digits of the largest, and 0 for what then rounds to zero.

    Args:
        jacobian: the Jacobian of one row of n classes, or any matrix of shape [n, n].
        class_names: n names. Default: the numbers of the classes.
        limit: the entry that has the strongest colour, the same above and below zero. Default: the
            largest absolute value. With 0.25, which no derivative of softmax exceeds, colours mean
            the same in every figure.
        ax: where to draw. Default: a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: `jacobian` is complex or not an array.
        ValueError: `jacobian` is not square or has batch axes, or holds inf or NaN; the number of
            names is wrong; `limit` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from matplotlib.figure import Figure
        >>> from jaxsoft import plot, softmax_jacobian
        >>> jacobian = softmax_jacobian(jnp.log(jnp.array([0.5, 0.25, 0.25])))
        >>> ax = plot.jacobian_heatmap(jacobian, ["cat", "dog", "fox"], ax=Figure().subplots())
        >>> print([text.get_text() for text in ax.texts[:3]])
        ['+0.250', '−0.125', '−0.125']
    """
    name = "jacobian_heatmap"
    matrix = jacobian.as_matrix() if isinstance(jacobian, SimplexJacobian) else jacobian
    entries = _shared.numbers(name, "jacobian", matrix)
    n = len(entries) if entries.ndim else 0
    if entries.shape != (n, n) or not n:
        raise ValueError(f"{name}: jacobian must have shape (n, n), got {entries.shape}")
    names = _shared.names_of(name, class_names, n)
    largest = float(abs(entries).max())
    if limit is None:
        limit = largest or 1.0
    elif not limit > 0:
        raise ValueError(f"{name}: limit must be positive, got {limit}")

    cells = min(max(n, 3), 6)
    ax = ax or _shared.new_axes((1.2 * cells + 1.4, 1.1 * cells + 0.6))
    edges = np.arange(n + 1) - 0.5
    image = ax.pcolormesh(edges, edges, entries, cmap="PuOr_r", vmin=-limit, vmax=limit)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelcolor=_shared.INK, labeltop=True, labelbottom=False)
    ax.xaxis.set_label_position("top")
    _shared.colour_bar(ax, image, r"$\partial p_i / \partial z_j$")
    side = _with_names(ax, names)

    texts = list(map(_shared.signed(largest), entries.flat))
    width = _extent(ax, max(texts, key=len), 10.0) / 10
    if _entry_size(side, width) >= _LEAST_SIZE:
        image.set(edgecolor="w", linewidth=min(2.0, side / 15))
        for text, ((row, column), entry) in zip(texts, np.ndenumerate(entries), strict=True):
            colour = "w" if abs(entry) > 0.55 * limit else _shared.INK
            ax.add_artist(_Entry(column, row, text, colour, width))
    return ax


# A layout engine may shrink the cells after the call, when other Axes get labels or the window is
# made smaller.
class _Entry(Text):
    """A number in a cell of a heat map, which fits into the cell whenever it is drawn."""

    def __init__(self, x: int, y: int, text: str, colour: str, width: float) -> None:
        super().__init__(x, y, text, color=colour, ha="center", va="center")
        self.set_in_layout(False)  # The cells make room for it.
        self._width = width

    def draw(self, renderer: RendererBase) -> None:
        corner, opposite = self.get_transform().transform([(0, 0), (1, 1)])
        size = _entry_size(min(abs(opposite - corner)) * 72 / self.figure.dpi, self._width)
        if size != self.get_fontsize():
            self.set_fontsize(size)
        if size >= _LEAST_SIZE - 1:
            super().draw(renderer)


def _entry_size(side: float, width: float) -> float:
    """The font size for cells of this side, if the widest entry is `width` times the font size."""
    return min(10.0, 0.86 * side / width)


# Names take room from the cells, and smaller cells have room for fewer and smaller names. So the
# figure is laid out again until the choice of names stays. The side may only shrink: otherwise the
# loop could alternate between names too large for the cells that they leave, and smaller ones.
def _with_names(ax: Axes, names: Sequence[str]) -> float:
    """Writes the names of the rows and columns of a heat map; returns the side of a cell."""
    n = len(names)
    largest = FontProperties(size=mpl.rcParams["xtick.labelsize"]).get_size_in_points()
    widest = max(_extent(ax, f"$z$ {name}", largest) for name in names)
    shown, side = None, np.inf
    ax.set(xticks=[], yticks=[])
    while True:
        ax.figure.figure.draw_without_rendering()  # lays it out
        side = min(side, min(ax.get_window_extent().size) * 72 / ax.figure.dpi / n)
        steps = (k * 10**e for e in itertools.count() for k in (1, 2, 5))
        step = next(k for k in steps if k * side >= _LINE * _LEAST_SIZE or k >= n)
        size = min(largest, max(_LEAST_SIZE, np.floor(2 * step * side / _LINE) / 2))
        upright = widest * size / largest + size / 2 > step * side
        if shown == (step, size, upright):
            return side
        shown = step, size, upright
        for axis, letter in ((ax.xaxis, "$z$"), (ax.yaxis, "$p$")):
            labels = [name if step > 1 else f"{letter} {name}" for name in names[::step]]
            axis.set_ticks(range(0, n, step), labels, size=size)
            axis.set_label_text(f"{letter} of class" if step > 1 else "")
        ax.tick_params("x", labelrotation=90 if upright else 0)


def _extent(ax: Axes, text: str, size: float) -> float:
    """The width of a text in points, or its height where that is larger."""
    probe = ax.text(0, 0, text, fontsize=size)
    extent = max(probe.get_window_extent().size) * 72 / ax.figure.dpi
    probe.remove()
    return extent
