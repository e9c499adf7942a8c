"""Figures of softmax and its derivative: each function draws on an Axes and returns it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from jaxsoft._core import class_ids, validation
from jaxsoft._functions.products import softmax_jvp
from jaxsoft._functions.softmax import softmax
from jaxsoft._simplex.operator import SimplexJacobian

try:
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Polygon
    from matplotlib.text import Text
except ModuleNotFoundError as error:
    raise ImportError(
        'jaxsoft.plot needs matplotlib: pip install ".[plot]" in a checkout of the repository'
    ) from error

# Of Okabe and Ito: told apart with every kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _FAINT = "0.25", "0.75"
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
        ValueError: `jacobian` is not square or has batch axes, or holds NaN; the number of names is
            wrong; `limit` is not positive.

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
    entries = _numbers(name, "jacobian", matrix)
    n = len(entries) if entries.ndim else 0
    if entries.shape != (n, n) or not n:
        raise ValueError(f"{name}: jacobian must have shape (n, n), got {entries.shape}")
    names = _names(name, class_names, n)
    if limit is None:
        limit = float(abs(entries).max()) or 1.0
    elif not limit > 0:
        raise ValueError(f"{name}: limit must be positive, got {limit}")

    ax = ax or _new_axes((1.2 * min(max(n, 3), 6) + 1.4, 1.1 * min(max(n, 3), 6) + 0.6))
    edges = np.arange(n + 1) - 0.5
    image = ax.pcolormesh(edges, edges, entries, cmap="PuOr_r", vmin=-limit, vmax=limit)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelcolor=_INK, labeltop=True, labelbottom=False)
    ax.xaxis.set_label_position("top")
    _colour_bar(ax, image, r"$\partial p_i / \partial z_j$")
    side = _with_names(ax, names)

    written = _signed(float(abs(entries).max()))
    texts = [[written(entry) for entry in row] for row in entries]
    width = _extent(ax, max(np.ravel(texts), key=len), 10.0) / 10
    if _entry_size(side, width) >= _LEAST_SIZE:
        image.set(edgecolor="w", linewidth=min(2.0, side / 15))
        for (row, column), entry in np.ndenumerate(entries):
            colour = "w" if abs(entry) > 0.55 * limit else _INK
            ax.add_artist(_Entry(column, row, texts[row][column], colour, side, width))
    return ax


# A layout engine may shrink the cells after the call, when other Axes get labels or the window is
# made smaller.
class _Entry(Text):
    """A number in a cell of a heat map, which fits into the cell whenever it is drawn."""

    def __init__(self, x: int, y: int, text: str, colour: str, side: float, width: float) -> None:
        size = _entry_size(side, width)
        super().__init__(x, y, text, color=colour, fontsize=size, ha="center", va="center")
        self.set_in_layout(False)  # The cells make room for it.
        self._width = width

    def draw(self, renderer: RendererBase) -> None:
        (left, top), (right, bottom) = self.get_transform().transform([(0, 0), (1, 1)])
        side = min(abs(right - left), abs(bottom - top)) * 72 / self.figure.dpi
        size = _entry_size(side, self._width)
        if size != self.get_fontsize():
            self.set_fontsize(size)
        if size >= _LEAST_SIZE - 1:
            super().draw(renderer)


def _entry_size(side: float, width: float) -> float:
    """For a cell with this side, and entries of which the widest has `width` times its size."""
    return min(10.0, 0.86 * side / width)


# What the names take the layout takes from the cells, so that both are measured until the names fit
# the cells that they leave. The side never grows from one round to the next: else names that fit
# only without themselves would come and go.
def _with_names(ax: Axes, names: Sequence[str]) -> float:
    """Writes the names of the rows and columns of a heat map; returns the side of a cell."""
    n = len(names)
    largest = FontProperties(size=mpl.rcParams["xtick.labelsize"]).get_size_in_points()
    widest = max(_extent(ax, f"$z$ {name}", largest) for name in names)
    shown, side = None, np.inf
    ax.set(xticks=[], yticks=[])
    while True:
        ax.figure.figure.draw_without_rendering()  # lays it out
        box = ax.get_window_extent()
        side = min(side, min(box.width, box.height) * 72 / ax.figure.dpi / n)
        step = next(k for k in _steps() if k * side >= _LINE * _LEAST_SIZE or k >= n)
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


def _steps() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, 100 and so on."""
    return (k * 10**e for e in itertools.count() for k in (1, 2, 5))


def _extent(ax: Axes, text: str, size: float) -> float:
    """The width of a text in points, or its height where that is larger."""
    probe = ax.text(0, 0, text, fontsize=size)
    box = probe.get_window_extent()
    probe.remove()
    return max(box.width, box.height) * 72 / ax.figure.dpi


def simplex_flow(
    loss: Callable[[Float[Array, "3"]], Float[Array, ""]],
    class_names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draws how three probabilities move while their logits follow the gradient of a loss.

        ż = -∂loss/∂z          ṗ = J ż

    Three probabilities that sum to 1 are a point in a triangle: certainty in the corners, equal
    probabilities in the centre. The colour is the speed |ṗ|.

    Args:
        loss: a differentiable function of three logits to a scalar, such as
            `lambda z: jaxsoft.cross_entropy(z, 0)`. It is called with the logits log p.
        class_names: three names, for the upper, the left and the right corner.
        ax: where to draw. Default: a new figure.

    Returns:
        The Axes, with the triangle in the unit square.

    Raises:
        ValueError: there are not three names, or the gradient of the loss is not finite.

    Example:
        >>> import jaxsoft
        >>> from jaxsoft import plot
        >>> from matplotlib.figure import Figure
        >>> names = ["setosa", "versicolor", "virginica"]
        >>> ax = Figure().subplots()
        >>> ax = plot.simplex_flow(lambda z: jaxsoft.cross_entropy(z, 0), names, ax=ax)
        >>> print([text.get_text() for text in ax.texts])
        ['setosa', 'versicolor', 'virginica']
    """
    names = _names("simplex_flow", class_names, 3)
    height = np.sqrt(0.75)
    corners = np.array([[0.5, height], [0.0, 0.0], [1.0, 0.0]])
    x, y = np.meshgrid(np.linspace(0, 1, 241), np.linspace(0, height, 209))
    upper = y / height
    right = x - upper / 2
    points = np.stack([upper, 1 - upper - right, right], -1)
    inside = (points > 1e-3).all(-1)

    @jax.jit
    def velocity(p: Float[Array, "m 3"]) -> Float[Array, "m 3"]:
        return softmax_jvp(p, -jax.vmap(jax.grad(loss))(jnp.log(p)))

    moved = np.full(points.shape, np.nan)
    moved[inside] = velocity(jnp.asarray(points[inside], float))
    if not np.isfinite(moved[inside]).all():
        raise ValueError("simplex_flow: the gradient of the loss must be finite, got inf or NaN")
    speed = np.linalg.norm(moved, axis=-1)

    ax = ax or _new_axes((5.6, 4.4))
    top = speed[inside].max()
    if top > 0:
        # 1, 3, 10, ...: the colours span three decades below the highest speed.
        exponent = int(np.floor(np.log10(top)))
        steps = [k * 10.0**e for e in range(exponent - 3, exponent + 1) for k in (1, 3)]
        levels = [step for step in steps if step < top][-6:]
        blues = ListedColormap(mpl.colormaps["Blues"](np.linspace(0.0, 0.7, len(levels) + 1)))
        norm = BoundaryNorm(levels, blues.N, extend="both")
        image = ax.contourf(x, y, speed, levels, cmap=blues, norm=norm, extend="both")
        u, v = np.moveaxis(moved @ corners, -1, 0)
        ax.streamplot(x, y, u, v, color=_INK, linewidth=0.7, arrowsize=0.7, density=0.9)
        bar = _colour_bar(ax, image, r"speed $|\,\dot p\,|$")
        bar.set_ticks(levels, labels=[f"{level:g}" for level in levels])
    # The white one covers the ragged ends of the colours.
    ax.add_patch(Polygon(corners, fill=False, ec="w", lw=2.5, zorder=3))
    ax.add_patch(Polygon(corners, fill=False, ec="0.4", lw=0.8, zorder=3))
    places = [(0.5, 0.9, "center"), (0.0, -0.07, "left"), (1.0, -0.07, "right")]
    for text, colour, (across, up, side) in zip(names, _COLOURS, places, strict=False):
        ax.text(across, up, text, color=colour, ha=side, weight="bold")
    ax.set(aspect="equal", xlim=(-0.03, 1.03), ylim=(-0.1, 0.97))
    ax.axis("off")
    return ax


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
    n = values.shape[-1] if values.ndim else 0
    if values.ndim != 1 or n < 2:
        raise ValueError(f"{name}: logits must have shape (n,) with n ≥ 2, got {values.shape}")
    if not bool(jnp.isfinite(values).all()):
        raise ValueError(f"{name}: logits must be finite")
    at = int(class_ids.one_class(name, "index", index, n, ()))
    names = _names(name, class_names, n)

    present = float(values[at])
    other_logits = np.delete(np.asarray(values, float), at)
    balance = float(np.logaddexp.reduce(other_logits))  # where p_i is one half
    low, high = min(balance - 6, present - 2), max(balance + 6, present + 2)
    grid = jnp.linspace(low, high, 401, dtype=values.dtype)
    varied = jnp.broadcast_to(values, (grid.size, n)).at[:, at].set(grid)
    curves = np.asarray(softmax(varied), float)
    of_logits = softmax(values)
    tangents = np.asarray(softmax_jvp(of_logits, jnp.zeros_like(values).at[at].set(1)), float)
    p = np.asarray(of_logits, float)
    others = [int(j) for j in np.argsort(-p, kind="stable") if j != at]
    drawn = [at, *sorted(others[: len(_COLOURS) - 1])]

    ax = ax or _new_axes((7.4, 3.8))
    ax.axvline(present, color=_FAINT, lw=0.9, zorder=0)
    written = _signed(float(abs(tangents[drawn]).max()))
    for position, i in enumerate(drawn):
        # While there are enough, the colour of a class is the same whichever logit varies.
        colour = _COLOURS[i if n <= len(_COLOURS) else position]
        ax.plot(grid, curves[:, i], color=colour, alpha=0.45)
        # Strokes of about equal length in the picture.
        run = 0.09 * (high - low) / np.hypot(1, 0.6 * (high - low) * tangents[i])
        ends = np.array([-run, run])
        formula = "pᵢ(1 − pᵢ)" if i == at else "−pᵢpⱼ"
        label = f"{names[i]}  {formula} = {written(tangents[i])}"
        ax.plot(present + ends, p[i] + tangents[i] * ends, color=colour, lw=2.2, label=label)
        ax.plot(present, p[i], "o", color=colour, ms=4.5)
    ax.set(xlim=(low, high), ylim=(-0.04, 1.04), ylabel="probability")
    ax.set_xlabel(f"logit of {names[at]}")
    _plain(ax)
    title = f"slopes at {present:.3g}".replace("-", "−")
    # Beside the Axes: within them there is no place that curves or tangents never reach.
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    legend = ax.legend(title=title, **beside, frameon=False, alignment="left", fontsize=9)
    if ax.figure.get_layout_engine() is None:  # Nothing else would make room for it.
        box, beyond = ax.get_position(), legend.get_window_extent().x1 - ax.bbox.x1
        width = max(box.width - beyond / ax.figure.bbox.width, box.width / 3)
        ax.set_position((box.x0, box.y0, width, box.height))
    return ax


def reliability(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    *,
    bins: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Draws how often a classifier is right against how sure it says that it is.

    The examples are put into bins by their confidence, the largest probability. Each bin is a
    point: the mean confidence against the share of right answers, with its 95 % interval of
    Wilson. On the diagonal the classifier is calibrated, below it it is overconfident. The grey
    bars are the share of the examples in each bin. The expected calibration error is the mean
    distance of the points from the diagonal, weighted by these shares.

    Args:
        logits: m rows of n classes.
        labels: m class ids.
        bins: the number of bins, of equal width in [0, 1]; those without examples have no point.
        ax: where to draw. Default: a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: `logits` is complex or not an array, `labels` are not integers.
        ValueError: the shapes do not fit, there is no example, `logits` hold NaN or +inf, a label
            is outside [0, n), `bins` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from matplotlib.figure import Figure
        >>> from jaxsoft import plot
        >>> logits = jnp.log(jnp.array([[0.75, 0.25]] * 4))  # right three times out of four
        >>> ax = plot.reliability(logits, jnp.array([0, 0, 0, 1]), ax=Figure().subplots())
        >>> print(ax.get_title(loc="left"))
        calibration error 0.000
        accuracy 0.750, 4 examples
    """
    name = "reliability"
    values = validation.floating(name, "logits", logits)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name}: logits must have shape (m, n), not empty, got {values.shape}")
    ids = validation.array(name, "labels", labels)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must be integers, got dtype {ids.dtype}")
    validation.same_shape(name, "labels", ids, values.shape[:1], "one for each row of the logits")
    classes = np.asarray(ids)
    if not ((classes >= 0) & (classes < values.shape[1])).all():
        raise ValueError(f"{name}: labels must lie in [0, {values.shape[1]})")
    if not bins > 0:
        raise ValueError(f"{name}: bins must be positive, got {bins}")
    p = _numbers(name, "the probabilities", softmax(values))
    confidence, right = p.max(1), p.argmax(1) == classes

    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = count > 0
    m, count = len(right), count[filled]
    said = np.bincount(place, confidence, bins)[filled] / count
    seen = np.bincount(place, right, bins)[filled] / count
    error = np.sum(count / m * abs(said - seen))
    # Wilson's interval: the rates from which what was seen is no further than 1.96 deviations.
    z = 1.96
    middle = (seen + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * np.sqrt(seen * (1 - seen) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)

    ax = ax or _new_axes((5.0, 4.6))
    left, blue = np.flatnonzero(filled) / bins, _COLOURS[0]
    ax.vlines(said, middle - reach, middle + reach, color=blue, lw=1.2, alpha=0.5)
    ax.plot(said, seen, "o-", color=blue, lw=1, ms=5, clip_on=False, label="bins, 95 % interval")
    ax.plot([0, 1], [0, 1], color="0.6", lw=0.9, ls=(0, (4, 3)), zorder=1, label="calibrated")
    bars = ax.bar(left, count / m, 1 / bins, align="edge", label="share of the examples")
    for bar in bars:
        bar.set(color="0.9", edgecolor="w", zorder=0)
    ax.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
    ax.set(xlabel="confidence: the largest probability", ylabel="share of right answers")
    _plain(ax)
    title = f"calibration error {error:.3f}\naccuracy {right.mean():.3f}, {m:,} examples"
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(loc="upper left", frameon=False, fontsize=9)
    return ax


# ------------------------------------------------------------------------------ what they share


def _numbers(function: str, argument: str, value: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    numbers = np.asarray(validation.floating(function, argument, value), np.float64)
    if np.isnan(numbers).any():
        raise ValueError(f"{function}: {argument} must be numbers, got NaN")
    return numbers


def _names(function: str, names: Sequence[str] | None, n: int) -> Sequence[str]:
    if names is None:
        return [str(i) for i in range(n)]
    if len(names) != n:
        raise ValueError(f"{function}: class_names must be {n} names, got {len(names)}")
    return names


def _signed(largest: float) -> Callable[[float], str]:
    """How to write numbers up to the largest: with three digits of it, and a proper minus sign."""
    decimals = 2 - int(np.floor(np.log10(largest))) if largest > 0 else 0
    if decimals > 5:
        return lambda number: f"{number:+.1e}".replace("-", "−")
    unit = 10.0**-decimals

    def written(number: float) -> str:
        rounded = abs(number) >= unit / 2
        return f"{number:+.{max(decimals, 0)}f}".replace("-", "−") if rounded else "0"

    return written


def _new_axes(size: tuple[float, float]) -> Axes:
    figure: Figure = plt.figure(figsize=size, layout="constrained")
    return figure.add_subplot()


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.4")
    ax.tick_params(color="0.4", labelcolor="0.3")


def _colour_bar(ax: Axes, image: ScalarMappable, label: str) -> Colorbar:
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.03)
    ax.set_anchor("E")  # beside the bar, where the picture does not fill its place
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar
