"""`python -m benchmarks.deviceless`: kernels, passes over memory and temporary memory."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxsoft
from benchmarks.deviceless.devices import DEVICES, Device, MissingPlugin
from benchmarks.deviceless.hlo import Traffic, traffic
from benchmarks.deviceless.programs import (
    ATTENTION,
    LAYERS,
    ROWS,
    Build,
    Comparison,
    Size,
    rows_and_classes,
)
from benchmarks.tables import Grid, markdown, plain

ROW_SIZES: tuple[Size, ...] = ((8192, 1024), (4096, 16_384), (1024, 50_304), (512, 131_072))
LAYER_SIZES: tuple[Size, ...] = ((8192, 2048, 50_304), (4096, 4096, 131_072))
ATTENTION_SIZES: tuple[Size, ...] = ((8 * 2048, 64, 2048),)
QUICK_ROW_SIZES: tuple[Size, ...] = ((4096, 16_384), (1024, 50_304))
DTYPES = ("float32", "bfloat16")

_CAPTION = (
    "Compiled ahead of time, and never run. Each entry: the bytes that the program moves, in "
    "passes over the array of logits, which of attention are the scores; the number of kernels; "
    "and the temporary memory in the same unit where there is any. The floor is what arguments and "
    "results alone move. What is counted is said in benchmarks/deviceless/hlo.py."
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program moves and holds, in passes over the logits.

    Attributes:
        passes: the bytes that it reads and writes.
        floor: the bytes of its arguments and results.
        temporary: the temporary memory.
        launches: the number of kernels that run.
        exact: False if the passes and the launches are lower bounds.
    """

    passes: float
    floor: float
    temporary: float
    launches: int
    exact: bool

    def __str__(self) -> str:
        bound = "" if self.exact else "≥ "
        held = f" + {self.temporary:.2f}" if self.temporary >= 0.005 else ""
        return f"{bound}{self.passes:.2f} in {self.launches}{held}"


def cost(counted: Traffic, temporary: int, unit: float) -> Cost:
    """Expresses what was counted in a unit of bytes."""
    return Cost(
        counted.bytes / unit,
        counted.floor / unit,
        temporary / unit,
        counted.launches,
        counted.exact,
    )


def measure(device: Device, build: Build, size: Size, dtype: str, dump: Path | None) -> Cost:
    """Compiles a program and counts; its optimised HLO goes to the file `dump`."""
    function, args = build(device, size, dtype)
    compiled = device.compile(function, *args)
    text = compiled.as_text()
    if dump is not None:
        dump.parent.mkdir(parents=True, exist_ok=True)
        dump.write_text(text)
    unit = rows_and_classes(size) * jnp.dtype(dtype).itemsize
    return cost(traffic(text), compiled.memory_analysis().temp_size_in_bytes, unit)


def grid(
    device: Device,
    comparisons: Sequence[Comparison],
    sizes: Sequence[Size],
    dtype: str,
    dump: Path | None,
) -> Grid:
    """One table: two lines for each quantity, jaxsoft and its peer."""
    rows = []
    for comparison in comparisons:
        for who, build in (("jaxsoft", comparison.own), (comparison.peer, comparison.peers)):
            costs = []
            for size in sizes:
                words = device.name, comparison.name, who, _shown(size), dtype, "hlo.txt"
                file = re.sub(r"[^\w.]+", "-", ".".join(words))
                path = None if dump is None else dump / file
                costs.append(measure(device, build, size, dtype, path))
            rows.append((comparison.name, who, f"{costs[0].floor:.1f}", *map(str, costs)))
    title = f"{device.name}, {dtype}"
    return Grid((title, "", "floor", *map(_shown, sizes)), tuple(rows))


def _shown(size: Size) -> str:
    return "×".join(map(str, size))


def grids(devices: Sequence[Device], *, quick: bool, dump: Path | None) -> Iterator[Grid]:
    """All tables, one after another as they are measured."""
    row_sizes = QUICK_ROW_SIZES if quick else ROW_SIZES
    layer_sizes = LAYER_SIZES[:1] if quick else LAYER_SIZES
    for device in devices:
        for dtype in DTYPES:
            yield grid(device, ROWS, row_sizes, dtype, dump)
            yield grid(device, LAYERS, layer_sizes, dtype, dump)
            yield grid(device, ATTENTION, ATTENTION_SIZES, dtype, dump)


# ------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 2 if a compiler that is needed is missing."""
    options = _parser().parse_args(argv)
    # Nothing runs, and a device that is there is left alone.
    jax.config.update("jax_platforms", "cpu")
    devices = []
    for name in options.device or DEVICES:
        try:
            devices.append(DEVICES[name]())
        except MissingPlugin as missing:
            print(missing, file=sys.stderr)
            if options.device or name == "h100":
                return 2
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"jaxsoft {jaxsoft.__version__}, {versions}")
    print(_CAPTION)
    for table in grids(devices, quick=options.quick, dump=options.dump):
        print()
        print((markdown if options.markdown else plain)(table), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deviceless", description=_CAPTION)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="keep the optimised HLO here")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        action="append",
        help="compile for this device (default: h100, and tpu where libtpu is installed)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
