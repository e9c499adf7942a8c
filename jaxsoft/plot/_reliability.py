"""reliability: how sure a classifier is, and how often it is right."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Shaped
from matplotlib.axes import Axes

from jaxsoft._core import validation
from jaxsoft._functions.softmax import softmax
from jaxsoft.plot import _shared


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
        worst = next(k for k in classes.tolist() if not 0 <= k < values.shape[1])
        raise ValueError(f"{name}: labels must lie in [0, {values.shape[1]}), got {worst}")
    if not bins > 0:
        raise ValueError(f"{name}: bins must be positive, got {bins}")
    p = _shared.numbers(name, "the probabilities", softmax(values))
    confidence, right = p.max(1), p.argmax(1) == classes

    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = np.flatnonzero(count)
    m, count = len(right), count[filled]
    said = np.bincount(place, confidence, bins)[filled] / count
    seen = np.bincount(place, right, bins)[filled] / count
    error = np.sum(count / m * abs(said - seen))
    # Wilson's interval holds the rates that are within 1.96 of their standard deviations of the
    # observed share.
    z = 1.96
    middle = (seen + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * np.sqrt(seen * (1 - seen) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)

    ax = ax or _shared.new_axes((5.0, 4.6))
    blue = _shared.COLOURS[0]
    ax.vlines(said, middle - reach, middle + reach, color=blue, lw=1.2, alpha=0.5)
    ax.plot(said, seen, "o-", color=blue, lw=1, ms=5, clip_on=False, label="bins, 95 % interval")
    ax.plot([0, 1], [0, 1], color="0.6", lw=0.9, ls=(0, (4, 3)), zorder=1, label="calibrated")
    bars = ax.bar(filled / bins, count / m, 1 / bins, color="0.9", ec="w", zorder=0, align="edge")
    bars.set_label("share of the examples")
    ax.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
    ax.set(xlabel="confidence: the largest probability", ylabel="share of right answers")
    _shared.plain(ax)
    title = f"calibration error {error:.3f}\naccuracy {right.mean():.3f}, {m:,} examples"
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(loc="upper left", frameon=False, fontsize=9)
    return ax
