"""What the speed is meant to be, and by how much it falls short."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from benchmarks import segments, sparse, tokens
from benchmarks.candidates import Result
from benchmarks.speed import FROM_P, Cell, Measured, geometric_mean
from benchmarks.tables import Grid
from jaxsoft._demo.timing import Timing

LIMIT = 1.05  # of the time of the peer: a cell above it is listed
SLOWEST = 1.4  # of the time of the peer, in any cell
# Of the geometric mean of any quantity, by the kind of table.
MEANS = {"last axis": 1.0, "other axis": 1.15}
# Of functions of x and w, of the time and the temporary memory of their peer, in any case.
TOKENS_TIME, TOKENS_TEMPORARY = 1.1, 0.1
# Of a function and its VJP, of the time of the peer: of rows of so many classes, and in any case.
SPARSE_TIME, SPARSE_CLASSES = 4, 1000
SEGMENTS_TIME = 1.1


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on a geometric mean of ratios, over the sizes of one table.

    Attributes:
        table: which one.
        quantity: a row of it; None for all.
        wanted: the bound.
    """

    table: str
    quantity: str | None
    wanted: float

    def chosen(self, measured: Mapping[Cell, Measured]) -> list[Measured]:
        """Those that count for it."""
        return [
            found
            for cell, found in measured.items()
            if cell.table == self.table and self.quantity in (None, cell.quantity)
        ]


TARGETS = (
    Target("float32, last axis", "softmax + VJP", 0.8),
    Target("bfloat16, last axis", "softmax + VJP", 0.5),
    Target("float32, last axis", "loss", 0.5),
    Target("float32, last axis", "loss + gradient", 0.8),
    Target("float32, without jax.jit", None, 0.3),
)


def means(timings: Mapping[Cell, Timing]) -> Grid:
    """All geometric means: of each quantity, by dtype and kind of axis."""
    tables = dict.fromkeys(cell.table for cell in timings if cell.jitted)
    found = _means(timings)
    rows = [
        (name, *(f"{row[table]:.2f}" if table in row else "–" for table in tables))
        for name, row in found.items()
    ]
    return Grid(("time / peer, geometric mean", *tables), tuple(rows))


def _means(timings: Mapping[Cell, Timing]) -> dict[str, dict[str, float]]:
    """The geometric mean of each quantity in each table."""
    found: dict[str, dict[str, list[Timing]]] = {}
    for cell, timed in timings.items():
        found.setdefault(cell.quantity, {}).setdefault(cell.table, []).append(timed)
    return {
        name: {table: geometric_mean(those) for table, those in row.items()}
        for name, row in found.items()
    }


def verdicts(measured: Mapping[Cell, Measured]) -> Grid:
    """Every target with what was measured."""
    rows = []
    for target in TARGETS:
        found = target.chosen(measured)
        if found:
            name = f"{target.quantity or 'all'}: {target.table}"
            mean = geometric_mean(one.own for one in found)
            rows.append((name, *_verdict(mean, target.wanted), *_bounds(found)))
    timings = {cell: found.own for cell, found in measured.items()}
    ratios, of_quantities = _of_libraries(timings), _means(timings)
    for table in dict.fromkeys(cell.table for cell in ratios):
        _, _, kind = table.partition(", ")
        if kind in MEANS:
            names = dict.fromkeys(cell.quantity for cell in ratios if cell.table == table)
            worst = max(names, key=lambda name: of_quantities[name][table])
            verdict = _verdict(of_quantities[worst][table], MEANS[kind])
            rows.append((f"the largest mean, {worst}: {table}", *verdict, "–", "–"))
    last = f"the slowest of {len(ratios)} cells"
    rows.append((last, *_verdict(max(ratios.values()), SLOWEST), "–", "–"))
    of_bounds = "bare formula", "the faster of both"
    columns = "time / peer, geometric mean", "wanted", "measured", "", *of_bounds
    return Grid(columns, tuple(rows))


def _verdict(measured: float, wanted: float) -> tuple[str, str, str]:
    met = measured <= wanted
    missed = f"missed by {100 * (measured / wanted - 1):.0f} %"
    return f"≤ {wanted}", f"{measured:.2f}", "met" if met else missed


def _bounds(found: list[Measured]) -> tuple[str, str]:
    """The mean of the bare formula, and that of the faster one at each size."""
    bare = [one.bare for one in found if one.bare is not None]
    if len(bare) < len(found):
        return "–", "–"
    pairs = zip((one.own for one in found), bare, strict=True)
    faster = (min(pair, key=lambda timed: timed.ratio) for pair in pairs)
    return f"{geometric_mean(bare):.2f}", f"{geometric_mean(faster):.2f}"


def over(timings: Mapping[Cell, Timing]) -> Grid:
    """How many cells of each quantity are over the limit, and by how much."""
    ratios = _of_libraries(timings)
    rows = []
    for quantity in dict.fromkeys(cell.quantity for cell in ratios):
        found = {cell: r for cell, r in ratios.items() if cell.quantity == quantity}
        slow = {cell: r for cell, r in found.items() if r > LIMIT}
        if slow:
            median = statistics.median(slow.values())
            worst = max(slow, key=lambda cell: slow[cell])
            where = f"{worst.dtype}, {worst.place}{'' if worst.jitted else ', without jax.jit'}"
            count = f"{len(slow)} of {len(found)}"
            rows.append((quantity, count, f"{median:.2f}", f"{slow[worst]:.2f}", where))
    total = sum(r > LIMIT for r in ratios.values())
    name = f"{total} of {len(ratios)} cells over {LIMIT}"
    return Grid((name, "cells", "their median", "the slowest", "which is"), tuple(rows))


def _of_libraries(timings: Mapping[Cell, Timing]) -> dict[Cell, float]:
    """Ratios to a library; the textbook's VJP from p is none, and no digit of it may be right."""
    return {cell: timed.ratio for cell, timed in timings.items() if cell.quantity != FROM_P}


def of_tokens(results: Mapping[str, Sequence[Result]]) -> Grid:
    """The time and memory of the functions of x and w, at their worst."""
    rows = []
    for name, found in results.items():
        quantity = tokens.QUANTITIES[name]
        for candidate in quantity.own:
            measured = [result.measured[candidate] for result in found]
            slowest = max(one.timing.ratio for one in measured)
            rows.append((f"{candidate.name}: time", *_verdict(slowest, TOKENS_TIME)))
            shares = [one.share for one in measured if one.share is not None]
            if shares and quantity.smaller:
                largest = _verdict(max(shares), TOKENS_TEMPORARY)
                rows.append((f"{candidate.name}: temporary memory", *largest))
    columns = "of that of the peer, in the worst case", "wanted", "measured", ""
    return Grid(columns, tuple(rows))


def of_sparse(rows: Sequence[Result], of_segments: Sequence[Result]) -> Grid:
    """The time of sparse probabilities and of segments with their VJP, at their worst."""
    wide = [
        result
        for result in rows
        if result.case.dtype == "float32" and result.case.shape[-1] == SPARSE_CLASSES
    ]
    where = f", float32, n = {SPARSE_CLASSES}"
    lines = []
    for name, chosen, place, wanted in (
        *((name, wide, where, SPARSE_TIME) for name in sparse.OWN),
        (segments.OWN, of_segments, "", SEGMENTS_TIME),
    ):
        if chosen:
            slowest = max(result.of(name).timing.ratio for result in chosen)
            lines.append((f"{name}{place}", *_verdict(slowest, wanted)))
    columns = f"{sparse.VJP}: time / peer, in the worst case", "wanted", "measured", ""
    return Grid(columns, tuple(lines))
