"""simplex_flow: three probabilities on their way along the gradient of a loss."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Polygon

from jaxsoft._core import options, powers
from jaxsoft._simplex.operator import SimplexJacobian
from jaxsoft.plot import _shared


def simplex_flow(
    loss: Callable[[Float[Array, "3"]], Float[Array, ""]],
    class_names: Sequence[str] | None = None,
    *,
    alpha: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Draws how three probabilities move while their logits follow the gradient of a loss.

        ż = -∂loss/∂z          ṗ = J ż,    J = diag(s) - s sᵀ / Σs,  s_i = p_i^(2 - α)

    Three probabilities that sum to 1 are a point in a triangle: certainty in the corners, equal
    probabilities in the centre. The colour is the speed |ṗ|.

    Args:
        loss: a differentiable function of three logits to a scalar, such as
            `lambda z: jaxsoft.cross_entropy(z, 0)`. It is called with logits whose entmax is p:
            log p for alpha = 1, else (p^(α-1) - 1) / (α - 1).
        class_names: three names, for the upper, the left and the right corner.
        alpha: α ≥ 1 of the map from logits to probabilities: 1 is softmax, 2 sparsemax, others are
            `entmax`.
        ax: where to draw. Default: a new figure.

    Returns:
        The Axes, with the triangle in the unit square.

    Raises:
        ValueError: there are not three names, alpha is less than 1, or the gradient of the loss is
            not finite.

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
    names = _shared.names_of("simplex_flow", class_names, 3)
    excess = float(np.asarray(options.number("simplex_flow", "alpha", alpha, 1, np.inf))) - 1
    height = np.sqrt(0.75)
    corners = np.array([[0.5, height], [0.0, 0.0], [1.0, 0.0]])
    x, y = np.meshgrid(np.linspace(0, 1, 241), np.linspace(0, height, 209))
    upper = y / height
    right = x - upper / 2
    points = np.stack([upper, 1 - upper - right, right], -1)
    inside = (points > 1e-3).all(-1)

    @jax.jit
    def velocity(p: Array) -> Array:
        z = -powers.depth(p, excess)
        jacobian = SimplexJacobian(p ** (1 - excess), jnp.zeros(p.shape[:-1], p.dtype))
        return jacobian.mv(-jax.vmap(jax.grad(loss))(z))

    moved = np.full(points.shape, np.nan)
    moved[inside] = velocity(jnp.asarray(points[inside], float))
    if not np.isfinite(moved[inside]).all():
        raise ValueError("simplex_flow: the gradient of the loss must be finite, got inf or NaN")
    speed = np.linalg.norm(moved, axis=-1)

    ax = ax or _shared.new_axes((5.6, 4.4))
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
        ax.streamplot(x, y, u, v, color=_shared.INK, linewidth=0.7, arrowsize=0.7, density=0.9)
        bar = _shared.colour_bar(ax, image, r"speed $|\,\dot p\,|$")
        bar.set_ticks(levels, labels=[f"{level:g}" for level in levels])
    # The white outline covers the ragged edge of the coloured regions.
    ax.add_patch(Polygon(corners, fill=False, ec="w", lw=2.5, zorder=3))
    ax.add_patch(Polygon(corners, fill=False, ec="0.4", lw=0.8, zorder=3))
    places = [(0.5, 0.9, "center"), (0.0, -0.07, "left"), (1.0, -0.07, "right")]
    for text, colour, (across, up, side) in zip(names, _shared.COLOURS, places, strict=False):
        ax.text(across, up, text, color=colour, ha=side, weight="bold")
    ax.set(aspect="equal", xlim=(-0.03, 1.03), ylim=(-0.1, 0.97))
    ax.axis("off")
    return ax
