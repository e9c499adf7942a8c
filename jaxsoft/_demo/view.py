"""How the measurements look to a person."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxsoft._demo import Step
from jaxsoft._demo.derivatives import Derivatives
from jaxsoft._demo.example import Environment, WorkedExample
from jaxsoft._demo.iris import Training
from jaxsoft._demo.saturation import Saturation
from jaxsoft._demo.speed import Comparison, Speed

_ALL_DIGITS = 0.5 / float(jnp.finfo(jnp.float32).eps)  # an error, in eps, that leaves no digit
_WIDTH = 80, 88  # narrower the tables do not fit, wider the text is hard to read
_GAP = 20  # of the saturated row that is shown in detail


class View:
    """Shows sections on a terminal, or as plain text where there is none."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.console.width = min(max(self.console.width, _WIDTH[0]), _WIDTH[1])

    def track(self, steps: Sequence[Step], description: str, /) -> Iterable[Step]:
        """Yields the steps; meanwhile a terminal shows a progress bar."""
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with progress:
            yield from progress.track(steps, description=description)

    def show(self, section: object) -> None:
        """Prints one section."""
        self.console.print(_rendered(section), Text())

    def conclude(self, failures: Sequence[str], seconds: float, figure: Path | None) -> None:
        """Prints where the figure is, if there is one, and the verdict."""
        if figure is not None:
            saved = Text.assemble("Figure saved to ", (str(figure), "bold"))
            self.console.print(saved, soft_wrap=True)
        if failures:
            number = "1 check failed" if len(failures) == 1 else f"{len(failures)} checks failed"
            text, title, style = "\n".join(failures), number, "bold red"
        else:
            text, title, style = "Every check passed on this machine.", "passed", "green"
        self.console.print(Panel(text, title=title, subtitle=f"{seconds:.0f} s", style=style))


@functools.singledispatch
def _rendered(section: object) -> RenderableType:
    raise NotImplementedError(type(section).__name__)


def _section(title: str, *parts: RenderableType) -> RenderableType:
    return Group(
        Rule(Text(title, "bold"), align="left", style="dim"),
        *parts,
    )


def _table(*headers: str, labels: int = 1) -> Table:
    """A table whose first columns are labels; the others hold numbers, or what lines up so."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, header in enumerate(headers):
        justify: Literal["left", "right"] = "left" if i < labels else "right"
        table.add_column(header, justify=justify, vertical="bottom", no_wrap=True)
    return table


def _error(error: float, tolerance: float) -> Text:
    """An error in eps, coloured."""
    style = "bold red" if not error <= tolerance else "yellow" if error > tolerance / 2 else "green"
    if not error < _ALL_DIGITS:
        return Text("all lost", style)
    return Text(f"{error:.1f}" if error < 100 else f"{error:.0e}", style)


# ------------------------------------------------------------------------------------- sections


@_rendered.register
def _(section: Environment) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("jaxsoft", section.jaxsoft)
    grid.add_row("jax", f"{section.jax}, jaxlib {section.jaxlib}")
    grid.add_row("python", f"{section.python}, {section.system}")
    grid.add_row("devices" if len(section.devices) > 1 else "device", "\n".join(section.devices))
    return Panel(grid, title="softmax and its derivative", expand=False)


@_rendered.register
def _(section: WorkedExample) -> RenderableType:
    first, second = section.classes[:2]
    table = _table(
        "probabilities",
        *section.classes,
        f"∂p {first}\n∂z {first}",
        f"∂p {first}\n∂z {second}",
    )
    for row, digits in zip(section.rows, (2, 4), strict=True):
        numbers = (*row.probabilities, row.same_class, row.cross_class)
        table.add_row(row.source, *(f"{x:.{digits}f}" for x in numbers))
    printed = section.rows[0]
    p, q, *_ = printed.probabilities
    rules = Table.grid(padding=(0, 3))
    rules.add_row("same class", "p (1 - p)", f"{p:.2f} · (1 - {p:.2f}) = {printed.same_class:.2f}")
    rules.add_row("cross class", "-p q", f"-{p:.2f} · {q:.2f} = {printed.cross_class:.2f}")
    logits = ", ".join(f"{z:.2f}" for z in section.logits)
    note = Text(
        f"From {section.source}. The probabilities printed there are not the softmax of the logits "
        f"printed beside them, {logits}: {section.outlier} is off by {section.difference:.4f}, of "
        f"which rounding to two decimals explains at most {section.explained:.4f}; the rules hold "
        "for both rows."
    )
    return _section("The worked example", table, Padding(rules, (0, 0, 1, 1)), note)


@_rendered.register
def _(section: Derivatives) -> RenderableType:
    columns: dict[str, list[str]] = {}
    for mode in section.modes:
        columns.setdefault(_column(mode), []).append(mode)
    table = _table("function", *columns, "")
    for name, errors in section.errors.items():
        worst = [max(errors[mode] for mode in modes) for modes in columns.values()]
        passed = max(worst) <= section.tolerance
        table.add_row(
            name.replace("cross_entropy, ", "… "),
            *(_error(error, section.tolerance) for error in worst),
            Text("pass", "green") if passed else Text("FAIL", "bold red"),
        )
    sentences = [
        "Largest error, in eps of float32, of the values and derivatives against jax.jacfwd of a "
        f"plain reference in float64; {section.tolerance:.0f} is allowed."
    ]
    several = {name: ", ".join(modes) for name, modes in columns.items() if len(modes) > 1}
    sentences += [f"{name} is the worst of {modes}." for name, modes in several.items()]
    if "jacfwd(jacrev)" in section.modes:
        sentences.append("fwd∘rev is jacfwd(jacrev).")
    note = Text(" ".join(sentences))
    table.show_edge = False  # all modes then fit into 80 columns
    return _section("Every function in every mode", Padding(table, (1, 0)), note)


def _column(mode: str) -> str:
    """The heading of a mode; a product has one, however it is transformed."""
    if mode == "value":
        return "out"
    for product in ("jvp", "vjp"):
        if product in mode:
            return product
    outer, _, inner = mode.replace("jac", "").partition("(")
    return f"{outer}∘\n{inner.rstrip(')')}" if inner else mode.replace("jac", "jac\n")


@_rendered.register
def _(section: Saturation) -> RenderableType:
    libraries = tuple(section.rows[0].values | section.rows[1].values)
    values = _table("in float32", "exact", *libraries)
    for row in section.rows:
        if row.gap == _GAP:
            cells = (
                Text(f"{row.values[name] + 0.0:.7g}", _error(row.errors[name], row.tolerance).style)
                if name in row.values
                else Text("–", "dim")
                for name in libraries
            )
            values.add_row(row.quantity, f"{row.exact:.7g}", *cells)
    gradient = "∂loss/∂z₁"
    errors = _table(f"error of\n{gradient}", "exact", *(f"{name}\n(eps)" for name in libraries))
    for row in section.rows:
        if row.quantity == gradient:
            cells = (_error(row.errors[name], row.tolerance) for name in libraries)
            errors.add_row(f"gap {row.gap}", f"{row.exact:.7g}", *cells)
    note = Text(
        f"Exact: a closed form in {section.digits}-digit decimals. Where p₁ rounds to 1, 1 - p₁ is "
        "0 if it is subtracted, and training stops; jaxsoft sums the other classes instead."
    )
    return _section(f"A saturated row, logits ({_GAP}, 0, 0)", values, errors, note)


@_rendered.register
def _(section: Speed) -> RenderableType:
    table = _table("", "logits", "jaxsoft\nms", "peer\nms", "ratio\n(quartiles)", "scratch\nMiB")
    dtype = ""
    for comparison in section.comparisons:
        if comparison.dtype != dtype:
            dtype = comparison.dtype
            table.add_section()
            table.add_row(Text(dtype, "italic"))
        table.add_row(*_comparison_cells(comparison))
    means = ", ".join(f"{ratio:.2f} in {name}" for name, ratio in section.geometric_means.items())
    untold = any(comparison.scratch_bytes is None for comparison in section.comparisons)
    note = Text(
        "Samples taken in turn; below 1 jaxsoft is faster. The geometric mean of the ratios is "
        f"{means}. Scratch is the temporary memory of the compiled program, jaxsoft / peer"
        + ("; XLA does not tell it on this device." if untold else ".")
    )
    return _section("Time and memory against jax.nn (softmax) and optax (loss)", table, note)


def _comparison_cells(c: Comparison) -> Iterable[str | Text]:
    style = "green" if c.high < 1 else "yellow" if c.low > 1 else ""
    yield c.quantity.replace("cross-entropy", "loss")
    yield f"{c.shape[0]}×{c.shape[1]}"
    yield f"{c.seconds * 1e3:.2f}"
    yield f"{c.peer_seconds * 1e3:.2f}"
    yield Text(f"{c.ratio:.2f} ({c.low:.2f}–{c.high:.2f})", style)
    yield f"{_mebibytes(c.scratch_bytes)} / {_mebibytes(c.peer_scratch_bytes)}"


def _mebibytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:.1f}"


@_rendered.register
def _(section: Training) -> RenderableType:
    result = Text.assemble(
        f"Logistic regression, {len(section.train_loss)} steps of Adam through "
        f"jaxsoft.cross_entropy: the loss fell from {section.train_loss[0]:.3f} to "
        f"{section.train_loss[-1]:.3f}, and {section.correct} of {section.held_out} held-out "
        "flowers are classified correctly: ",
        (f"{section.accuracy:.1%}", "bold green"),
        ".",
    )
    table = _table("the Jacobian\nat one flower", "p", *(f"∂z\n{name}" for name in section.classes))
    for name, p, row in zip(section.classes, section.probabilities, section.jacobian, strict=True):
        cells = (Text(f"{x:+.3g}", "red" if x > 0 else "blue") for x in row)
        table.add_row(f"∂p {name}", f"{p:.3g}", *cells)
    sizes = ", ".join(
        f"{name.removesuffix(' (cm)')} {size:.1f}"
        for name, size in zip(section.features, section.flower, strict=True)
    )
    note = Text(
        f"The held-out flower it is least sure of, in truth {section.species} ({sizes} cm); by "
        f"jax.jacfwd(jaxsoft.softmax). Rows sum to 0 within {section.row_sum:.0e}, and the entries "
        f"are off by at most {section.jacobian_error:.1f} eps of the largest."
    )
    return _section("A classifier of real Iris flowers", Text(), result, table, note)
