"""`python -m jaxsoft`: checks softmax and its derivative on this machine, and shows them work."""

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jaxsoft

_EXTRA = 'pip install ".[demo]" in a checkout of the repository'
# What each optional package is for, by the name under which it is imported.
_OPTIONAL = {
    "rich": ("rich", "the tables and progress bars"),
    "optax": ("optax", "the comparison and the training"),
    "sklearn": ("scikit-learn", "the Iris flowers"),
    "matplotlib": ("matplotlib", "the figure"),
}
_FORMATS = (".pdf", ".png", ".svg")
_FIGURE = Path("jaxsoft-report.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not (options.figure or options.no_figure or options.json):
        options.figure = _FIGURE
    if options.figure and options.figure.suffix.lower() not in _FORMATS:
        parser.error(f"--figure must end in {', '.join(_FORMATS)}, got {options.figure}")
    if options.figure and not os.access(options.figure.parent, os.W_OK):
        parser.error(f"--figure: cannot write into the directory {options.figure.parent}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must lie in [0, 2**32), got {options.seed}")
    unused = {"rich": options.json, "matplotlib": options.figure is None}
    missing = [
        f"{package} ({purpose})"
        for name, (package, purpose) in _OPTIONAL.items()
        if not unused.get(name) and importlib.util.find_spec(name) is None
    ]
    if missing:
        print(f"python -m jaxsoft needs {', '.join(missing)}: {_EXTRA}", file=sys.stderr)
        return 2
    return _as_json(options) if options.json else _for_a_person(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft",
        description="Checks softmax and its derivative on this machine and device, compares them "
        "with jax.nn and optax, and trains a classifier of Iris flowers with them.",
        epilog="Exit status: 0 if every check passes, 1 if one fails, 2 if the command cannot run. "
        f"It needs {_EXTRA}.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer modes, sizes and steps")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document instead, and draw a figure only with --figure",
    )
    figure = parser.add_mutually_exclusive_group()
    figure.add_argument(
        "--figure",
        type=Path,
        metavar="PATH",
        help=f"where to save the figure, a file ending in {', '.join(_FORMATS)} "
        f"(default: {_FIGURE})",
    )
    figure.add_argument("--no-figure", action="store_true", help="draw none; needs no matplotlib")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random logits and the split (default: 0)"
    )
    parser.add_argument("--version", action="version", version=f"jaxsoft {jaxsoft.__version__}")
    return parser


def _for_a_person(options: argparse.Namespace) -> int:
    # Inside the function, as everything in `_demo`, for it needs optional packages.
    from jaxsoft._demo.view import View

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the encoding has no ∂
    view = View()
    start = time.perf_counter()
    sections = _measured(options, view.track, view.show)
    failures = _failures(sections)
    view.conclude(failures, time.perf_counter() - start, options.figure)
    return 1 if failures else 0


def _as_json(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    sections = _measured(options, lambda steps, _: steps, lambda _: None)
    failures = _failures(sections)
    document = {
        "passed": not failures,
        "failures": failures,
        "quick": options.quick,
        "seed": options.seed,
        "seconds": time.perf_counter() - start,
        **{name: dataclasses.asdict(section) for name, section in sections.items()},
        "figure": options.figure and str(options.figure.resolve()),
    }
    print(json.dumps(_finite(document), allow_nan=False))
    return 1 if failures else 0


def _measured(
    options: argparse.Namespace, track: Callable[..., Iterable[Any]], show: Callable[[Any], None]
) -> dict[str, Any]:
    """Measures section by section, showing each one; returns them by name."""
    from jaxsoft._demo import derivatives, example, iris, saturation, speed

    run: dict[str, Any] = {"seed": options.seed, "quick": options.quick, "track": track}
    measures: dict[str, Callable[[], Any]] = {
        "environment": example.environment,
        "worked_example": example.worked_example,
        "derivatives": lambda: derivatives.derivatives(**run),
        "saturation": saturation.saturation,
        "speed": lambda: speed.speed(**run),
        "training": lambda: iris.train_on_iris(**run),
    }
    sections: dict[str, Any] = {}
    for name, measure in measures.items():
        sections[name] = measure()
        show(sections[name])
    if options.figure:
        from jaxsoft._demo.figure import save_figure

        save_figure(sections["training"], options.figure)
    return sections


def _failures(sections: dict[str, Any]) -> list[str]:
    return [text for section in sections.values() for text in getattr(section, "failures", ())]


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
