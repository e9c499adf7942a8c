"""Tables in Markdown, as plain text, and as rich draws them."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_WIDTH = 400  # in a narrower console rich would cut the ratios
_RICH = importlib.util.find_spec("rich") is not None


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        columns: the headings, of which the first also says what the table is about.
        rows: the text of the rows.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def markdown(grid: Grid) -> str:
    """The table in Markdown."""
    ruler = ("---", *("---:" for _ in grid.columns[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (grid.columns, ruler, *grid.rows))


def text(grid: Grid) -> str:
    """The table for a terminal."""
    return _as_rich(grid) if _RICH else plain(grid)


def plain(grid: Grid) -> str:
    """The table as aligned text."""
    lines = (grid.columns, *grid.rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def tracked(steps: Sequence[T], what: str) -> Iterator[T]:
    """Yields the steps; meanwhile a terminal shows a progress bar."""
    if not _RICH:
        yield from steps
        return
    # Inside the function, for rich is optional.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import track  # noqa: PLC0415

    console = Console(stderr=True)
    yield from track(steps, what, console=console, transient=True, disable=not console.is_terminal)


def _as_rich(grid: Grid) -> str:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(grid.columns):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
