"""Which blocks are wrong, and the table that says so."""

from collections.abc import Sequence

import numpy as np

from jaxsoft.testing._arguments import kind
from jaxsoft.testing._eps import error_in_eps
from jaxsoft.testing._types import Named


def compared(
    blocks: Named,
    expected: Named,
    tolerance: int | float | None,
    least_scale: int | float,
    differences: bool,
) -> tuple[float, list[tuple[str, ...]]]:
    """Returns the largest error, and a row of the table for each wrong block."""
    largest = 0.0
    rows: list[tuple[str, ...]] = []
    for name, exact in expected.items():
        got = blocks[name]
        unit = np.float32 if differences and got.dtype == np.float64 else got.dtype
        scale = np.maximum(exact.scale, least_scale)
        errors = error_in_eps(got, exact.entries, scale=scale, dtype=unit)
        allowed = (8 if got.dtype.itemsize <= 2 else 64) if tolerance is None else tolerance
        largest = max(largest, float(np.max(errors, initial=0.0)))
        if np.any(errors > allowed):
            at = tuple(int(i) for i in np.unravel_index(np.argmax(errors), errors.shape))
            wrong = f"{np.count_nonzero(errors > allowed)}/{errors.size}"
            digits = 17 if unit == np.float64 else 9
            numbers = (f"{float(x[at]):.{digits}g}" for x in (got, exact.entries))
            rows.append((f"{errors[at]:.3g}", wrong, f"{name} {list(at) or ''}".strip(), *numbers))
    return largest, rows


def report(
    fun: object, chosen: Sequence[str], table: list[tuple[str, ...]], differences: bool
) -> str:
    """The message of the error that `assert_derivatives` raises."""
    lines = [("mode", "eps", "wrong", "at", "got", "wanted"), *table]
    # The text of an exception stands in place of the numbers and takes no part in the columns.
    widths = [max(len(line[i]) for line in lines if i == 0 or len(line) > 3) for i in range(6)]
    failed = {line[0] for line in table}
    name = getattr(fun, "__name__", kind(fun))
    text = [f"assert_derivatives: {name} is wrong in {len(failed)} of {len(chosen)} modes"]
    text += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text.append("right: " + (", ".join(mode for mode in chosen if mode not in failed) or "none"))
    if differences:
        text.append("wanted is by central differences in float64; a reference would be sharper")
    return "\n  ".join(text)
