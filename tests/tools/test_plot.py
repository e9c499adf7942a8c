"""jaxsoft.plot: what the figures show, read back from the Axes."""

import contextlib
import inspect
import io
import itertools
import re
import runpy
import sys

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
import scipy.stats
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

import jaxsoft
from jaxsoft import plot, softmax_jacobian

mpl.use("Agg")

SPECIES = ["setosa", "versicolor", "virginica"]
LOGITS = np.array([1.43, -0.4, 0.23])
P = np.exp(LOGITS) / np.exp(LOGITS).sum()
JACOBIAN = np.diag(P) - np.outer(P, P)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.figure().add_subplot()


def flow(**options):
    return plot.simplex_flow(lambda z: jaxsoft.cross_entropy(z, 0), SPECIES, **options)


FIGURES = {
    "heat map": lambda **options: plot.jacobian_heatmap(JACOBIAN, SPECIES, **options),
    "flow": flow,
    "slopes": lambda **options: plot.slopes(LOGITS, 0, SPECIES, **options),
    "reliability": lambda **options: plot.reliability(np.eye(3), np.arange(3), **options),
}


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_axes_given_and_new(figure, ax):
    other = plt.gcf().add_subplot()
    assert figure(ax=ax) is ax
    assert not other.has_data()
    new = figure()
    assert isinstance(new, Axes)
    assert new.figure is not ax.figure
    new.figure.savefig(io.BytesIO(), dpi=20)  # a glyph that the font lacks is a warning


def written(ax):
    return [text.get_text() for text in ax.texts]


def numbers(texts):
    return [float(text.replace("−", "-")) for text in texts]


# ------------------------------------------------------------------------------------- heat map


def test_heatmap_shows_the_jacobian(ax):
    plot.jacobian_heatmap(softmax_jacobian(jnp.asarray(LOGITS)), SPECIES, ax=ax)
    (mesh,) = ax.collections
    np.testing.assert_allclose(mesh.get_array(), JACOBIAN, rtol=1e-14)
    np.testing.assert_allclose(mesh.get_clim(), [-JACOBIAN.max(), JACOBIAN.max()], rtol=1e-14)
    np.testing.assert_allclose(numbers(written(ax)), JACOBIAN.ravel(), atol=0.0005)
    assert written(ax)[0] == "+0.216"
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"$z$ {x}" for x in SPECIES]
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"$p$ {x}" for x in SPECIES]
    assert ax.yaxis_inverted()  # the first class on top
    assert ax.get_aspect() == 1


def test_heatmap_of_confident_and_of_many_classes(ax):
    plot.jacobian_heatmap(softmax_jacobian(jnp.array([30.0, 0.0])), ax=ax)
    assert written(ax) == ["+9.4e−14", "−9.4e−14", "−9.4e−14", "+9.4e−14"]
    matrix = np.diag([0.25, 0.0004, 0.0])
    assert written(plot.jacobian_heatmap(matrix))[::4] == ["+0.250", "0", "0"]
    assert set(written(plot.jacobian_heatmap(np.zeros((2, 2))))) == {"0"}
    many = plot.jacobian_heatmap(np.eye(41), limit=0.25)
    assert written(many) == []
    assert many.collections[0].get_clim() == (-0.25, 0.25)


def overlaps(boxes):
    """Whether any two neighbours overlap."""
    return any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def extents(texts):
    return [text.get_window_extent() for text in texts]


# The size of the figure in inches, the classes, how many names a row or column has, and whether the
# entries are written. Text of 6 points needs 7.5 from line to line.
@pytest.mark.parametrize(
    ("inches", "n", "named", "entries"),
    [
        (None, 3, 3, True),
        (None, 12, 12, True),
        (None, 40, 40, False),
        (None, 100, 50, False),
        ((2.4, 1.8), 3, 3, True),
        ((2.4, 1.8), 12, 6, False),
        ((2.4, 1.8), 40, 8, False),
        ((14, 12), 24, 24, True),
        pytest.param((14, 12), 100, 100, False, marks=pytest.mark.slow),
        ((0.3, 0.2), 5, 1, False),
    ],
)
def test_heatmap_writes_what_its_axes_have_room_for(inches, n, named, entries):
    ax = plt.figure(figsize=inches, layout="constrained").add_subplot() if inches else None
    matrix = np.eye(n) / n - 1 / n**2
    warns = pytest.warns(UserWarning, match="collapsed") if named == 1 else contextlib.nullcontext()
    with warns:
        ax = plot.jacobian_heatmap(matrix, ax=ax)
        ax.figure.canvas.draw()
    for axis in (ax.xaxis, ax.yaxis):
        labels = axis.get_ticklabels()
        assert len(labels) == named
        assert [label.get_text().split()[-1] for label in labels[:2]] == ["0", f"{n // named}"][
            :named
        ]
        assert not overlaps(extents(labels))
        assert all(label.get_fontsize() >= 6 for label in labels)
    assert len(written(ax)) == (n * n if entries else 0)
    inside = [box.width < ax.bbox.width / n for box in extents(ax.texts)]
    assert all(inside)


def test_names_lie_flat_while_they_fit(ax):
    plot.jacobian_heatmap(JACOBIAN, SPECIES, ax=ax)
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {0}
    long = plot.jacobian_heatmap(JACOBIAN, [f"the flower of {name}" for name in SPECIES])
    assert {label.get_rotation() for label in long.get_xticklabels()} == {90}
    assert {label.get_rotation() for label in long.get_yticklabels()} == {0}


def test_entries_shrink_and_vanish_with_their_cells():
    ax = plot.jacobian_heatmap(JACOBIAN, SPECIES)

    def image(entries):
        for text in ax.texts:
            text.set_visible(entries)
        for _ in range(2):  # the layout of one draw depends on that before it
            ax.figure.canvas.draw()
        return np.asarray(ax.figure.canvas.buffer_rgba()).copy()

    ax.figure.canvas.draw()
    first = ax.texts[0].get_fontsize()
    ax.figure.set_size_inches(3.0, 2.4)
    assert (image(entries=True) != image(entries=False)).any()
    assert 5 <= ax.texts[0].get_fontsize() < first == 10
    cell = ax.bbox.width / 3
    assert all(box.width < cell for box in extents(ax.texts))
    ax.figure.set_size_inches(2.4, 2.0)
    assert (image(entries=True) == image(entries=False)).all()


# ----------------------------------------------------------------------------------------- flow


def test_flow_shows_the_velocity(ax, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        ax, "streamplot", lambda x, y, u, v, **_: drawn.update(x=x, y=y, u=u, v=v), raising=True
    )
    flow(ax=ax)
    x, y, u, v = (drawn[name] for name in "xyuv")
    inside = np.isfinite(u)
    assert (inside == np.isfinite(v)).all()
    assert 0.45 < inside.mean() < 0.5  # a triangle in its bounding box
    corners = np.array([[0.5, np.sqrt(0.75)], [0.0, 0.0], [1.0, 0.0]])
    for k in np.flatnonzero(inside)[::997]:
        place = np.array([x.flat[k], y.flat[k], 1.0])
        p = np.linalg.solve(np.vstack([corners.T, np.ones(3)]), place)
        speed = (np.diag(p) - np.outer(p, p)) @ (np.array([1.0, 0.0, 0.0]) - p)
        np.testing.assert_allclose([u.flat[k], v.flat[k]], speed @ corners, atol=1e-13)


def test_flow_names_the_corners(ax):
    flow(ax=ax)
    assert written(ax) == SPECIES
    heights = [text.get_position()[1] for text in ax.texts]
    assert heights[0] > 0.8
    assert max(heights[1:]) < 0
    assert ax.get_aspect() == 1


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_the_flow_is_that_of_entmax(ax, alpha, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        ax, "contourf", lambda *args, **_: drawn.append(args) or mpl.cm.ScalarMappable()
    )
    monkeypatch.setattr(plot._shared, "colour_bar", lambda ax, *_: ax.figure.colorbar)
    direction = jnp.array([1.0, -0.5, 0.2])
    with contextlib.suppress(AttributeError):  # of a bar that is none
        plot.simplex_flow(lambda z: z @ direction, alpha=alpha, ax=ax)
    x, y, speed, *_ = drawn[0]
    for place in ((60, 80), (20, 200), (150, 120)):
        upper = y[place] / np.sqrt(0.75)
        right = x[place] - upper / 2
        p = jnp.array([upper, 1 - upper - right, right])
        z = jnp.log(p) if alpha == 1 else (p ** (alpha - 1) - 1) / (alpha - 1)
        np.testing.assert_allclose(jaxsoft.entmax(z, alpha), p, rtol=1e-12)
        moved = jaxsoft.entmax_jacobian(z, alpha).mv(direction)
        np.testing.assert_allclose(speed[place], jnp.linalg.norm(moved), rtol=1e-5)


def test_flow_without_motion(ax):
    plot.simplex_flow(lambda z: 0 * jnp.sum(z), ax=ax)
    assert written(ax) == ["0", "1", "2"]
    assert len(ax.figure.axes) == 1  # no bar for colours that are not there


# --------------------------------------------------------------------------------------- slopes


@pytest.mark.parametrize("index", [0, 1])
def test_slopes_are_a_column_of_the_jacobian(ax, index):
    plot.slopes(LOGITS, index, SPECIES, ax=ax)
    order = [index, *(i for i in range(3) if i != index)]
    handles, labels = ax.get_legend_handles_labels()
    assert [label.split()[0] for label in labels] == [SPECIES[i] for i in order]
    found = numbers(label.split("= ")[1] for label in labels)
    np.testing.assert_allclose(found, JACOBIAN[order, index], atol=0.0005)
    for i, stroke in zip(order, handles, strict=True):
        (x0, x1), (y0, y1) = stroke.get_data()
        np.testing.assert_allclose((y1 - y0) / (x1 - x0), JACOBIAN[i, index], rtol=1e-12)
        np.testing.assert_allclose([(x0 + x1) / 2, (y0 + y1) / 2], [LOGITS[index], P[i]])
        assert to_hex(stroke.get_color()) == ["#0072b2", "#d55e00", "#009e73"][i]


def test_slopes_draw_the_curves(ax):
    plot.slopes(LOGITS, 0, SPECIES, ax=ax)
    curve = next(line for line in ax.lines if len(line.get_xdata()) > 100)
    z, p = curve.get_data()
    odds = np.exp(z) / np.exp(LOGITS[1:]).sum()
    np.testing.assert_allclose(p, odds / (1 + odds), rtol=1e-12)
    assert z[0] < LOGITS[0] < z[-1]
    assert p[0] < 0.01
    assert p[-1] > 0.99


@pytest.mark.parametrize("layout", ["constrained", None])
@pytest.mark.parametrize("logits", [LOGITS, np.array([20.0, 0, 1]), np.linspace(-2, 2, 8)])
def test_legend_of_slopes_stands_beside_the_curves(layout, logits):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout=layout)
    for ax in axes:
        plot.slopes(logits, 0, ax=ax)
    figure.canvas.draw()
    legend, other = (ax.get_legend().get_window_extent() for ax in axes)
    assert axes[0].bbox.x1 < legend.x0 < legend.x1 < axes[1].bbox.x0
    assert axes[1].bbox.x1 < other.x0 < other.x1 < figure.bbox.x1
    assert axes[0].bbox.width > 100


def test_slopes_of_many_classes(ax):
    logits = np.random.default_rng(0).normal(size=50)
    plot.slopes(logits, 7, ax=ax)
    _, labels = ax.get_legend_handles_labels()
    others = [int(i) for i in np.argsort(-logits) if i != 7][:5]
    assert [int(label.split()[0]) for label in labels] == [7, *sorted(others)]


# ---------------------------------------------------------------------------------- reliability


def test_reliability_of_two_bins(ax):
    # Five times 60 % sure and right three times; twice 80 % sure and right both times.
    p = np.array([[0.6, 0.4]] * 5 + [[0.2, 0.8]] * 2)
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    plot.reliability(np.log(p), labels, bins=4, ax=ax)
    points = ax.lines[0]
    np.testing.assert_allclose(points.get_xdata(), [0.6, 0.8], rtol=1e-12)
    np.testing.assert_allclose(points.get_ydata(), [0.6, 1.0], rtol=1e-12)
    assert ax.get_title(loc="left") == "calibration error 0.057\naccuracy 0.714, 7 examples"
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in ax.patches]
    np.testing.assert_allclose(bars, [[0.5, 0.25, 5 / 7], [0.75, 0.25, 2 / 7]])
    for segment, (right, count) in zip(
        ax.collections[0].get_segments(), [(3, 5), (2, 2)], strict=True
    ):
        interval = scipy.stats.binomtest(right, count).proportion_ci(0.95, "wilson")
        np.testing.assert_allclose(segment[:, 1], interval, atol=1e-4)


def test_reliability_of_certain_answers(ax):
    plot.reliability(1000 * np.eye(3), np.arange(3), bins=3, ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1.0, 1.0]])
    assert [bar.get_x() for bar in ax.patches] == [2 / 3]


# --------------------------------------------------------------------------------------- errors


def call(fun, *args, **kwargs):
    # The tests check annotations at run time; here the function's own check is to answer.
    return inspect.unwrap(fun)(*args, **kwargs)


WRONG = [
    (plot.jacobian_heatmap, (np.zeros((2, 3)),), "jacobian must have shape (n, n), got (2, 3)"),
    (
        plot.jacobian_heatmap,
        (np.zeros((2, 2, 2)),),
        "jacobian must have shape (n, n), got (2, 2, 2)",
    ),
    (plot.jacobian_heatmap, (np.diag([np.nan, 1.0]),), "jacobian must be finite, got inf or NaN"),
    (plot.jacobian_heatmap, (np.diag([np.inf, 1.0]),), "jacobian must be finite, got inf or NaN"),
    (plot.jacobian_heatmap, (np.eye(2), ["a"]), "class_names must be 2 names, got 1"),
    (plot.simplex_flow, (jnp.sum, ["a"]), "class_names must be 3 names, got 1"),
    (
        plot.simplex_flow,
        (lambda z: jnp.nan * jnp.sum(z),),
        "the gradient of the loss must be finite, got inf or NaN",
    ),
    (plot.slopes, (np.zeros((2, 2)), 0), "logits must have shape (n,) with n ≥ 2, got (2, 2)"),
    (plot.slopes, (np.zeros(1), 0), "logits must have shape (n,) with n ≥ 2, got (1,)"),
    (plot.slopes, (np.array([0, np.inf]), 0), "logits must be finite, got [ 0. inf]"),
    (plot.slopes, (np.zeros(2), 2), "index must lie in [0, 2), got 2"),
    (plot.slopes, (np.zeros(2), 0, ["a"]), "class_names must be 2 names, got 1"),
    (
        plot.reliability,
        (np.zeros(3), np.zeros(3, int)),
        "logits must have shape (m, n), not empty, got (3,)",
    ),
    (
        plot.reliability,
        (np.zeros((0, 3)), np.zeros(0, int)),
        "logits must have shape (m, n), not empty, got (0, 3)",
    ),
    (
        plot.reliability,
        (np.zeros((2, 3)), np.zeros(3, int)),
        "labels must have shape (2,) (one for each row of the logits), got (3,)",
    ),
    (plot.reliability, (np.zeros((1, 3)), np.array([3])), "labels must lie in [0, 3), got 3"),
    (plot.reliability, (np.zeros((1, 3)), np.array([-1])), "labels must lie in [0, 3), got -1"),
    (
        plot.reliability,
        (np.full((1, 3), np.nan), np.array([0])),
        "the probabilities must be finite, got inf or NaN",
    ),
]


@pytest.mark.parametrize(("function", "args", "message"), WRONG)
def test_wrong_values(function, args, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{function.__name__}: {message}')}$"):
        call(function, *args)
    assert plt.get_fignums() == []


def test_wrong_options_and_types():
    with pytest.raises(ValueError, match="jacobian_heatmap: limit must be positive, got 0"):
        plot.jacobian_heatmap(np.eye(2), limit=0.0)
    with pytest.raises(ValueError, match=r"simplex_flow: alpha must lie in \[1, inf\), got 0\.5"):
        plot.simplex_flow(jnp.sum, alpha=0.5)
    with pytest.raises(ValueError, match="reliability: bins must be positive, got 0"):
        plot.reliability(np.eye(2), np.arange(2), bins=0)
    with pytest.raises(TypeError, match="reliability: labels must be integers, got dtype float64"):
        plot.reliability(np.eye(2), np.zeros(2))
    with pytest.raises(TypeError, match="slopes: logits must be an array or a number, got list"):
        call(plot.slopes, [1.0, 2.0], 0)


def test_without_matplotlib(monkeypatch):
    assert "slopes" in runpy.run_path(plot.__file__)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'needs matplotlib: pip install "\.\[plot\]" in a check'):
        runpy.run_path(plot.__file__)
