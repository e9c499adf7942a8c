"""`python -m benchmarks`: jaxsoft against jax.nn, optax and others, in turns in one process."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

try:
    from benchmarks import (
        accuracy,
        attention,
        compilation,
        environment,
        jacobian,
        layouts,
        linear,
        programs,
        segments,
        sparse,
        speed,
        targets,
        tokens,
    )
    from benchmarks.tables import Grid, markdown, text, tracked
except ModuleNotFoundError as error:
    sys.exit(
        f"python -m benchmarks needs {error.name}: "
        'pip install ".[bench]" in a checkout of the repository'
    )

RESULTS = Path(__file__).parent / "RESULTS.md"

_INTRODUCTION = """# Results

Written by the command below; a section that names another command was measured later, by that one.
A ratio below 1 means that jaxsoft is faster, or needs less memory.
Programs that are compared run in turns in one process, so what else the machine does falls on all
alike; absolute times mean little.
"""

_WHY = """Why what is missed is missed, as far as it is known of a CPU:

- The bare formula, at the right of the targets, is the shortest program for the same quantity: one
  sum of exponentials, one of p ∘ g. It loses the digits of what is nearly certain. Where it misses
  the target too, and so does the faster of both programs at each size, the target asks for more
  than XLA makes of any formula that is known here.
- The time of large arrays is that of memory, and of page faults for what is returned: the same for
  all who return the same arrays. What can be gained is what the peer keeps in between.
- logsumexp, log_softmax, the loss: a sum that keeps the largest exponential apart is two sums. XLA
  makes one kernel of both, but that takes longer than the single sum of the peer where the arrays
  fit the cache, or where the peer is as near to the time of memory as the one sum allows. Long
  rows are one sum for each chunk, and are read once more only where the largest sum is.
- softmax + VJP: the centre of g is a sum of its own, without which 1 − p and a common offset of g
  lose their digits; log_softmax + VJP: so is the sum of the others, and an entry of −inf, whose
  cotangent does not count, takes a selection, for which XLA writes an array. This is the price of
  the digits in the table of accuracy, and a cell where it is paid in full is not under 1.05.
- Soft labels, the divergence: a class of probability 0 adds nothing even where the other number is
  infinite, which takes a selection; XLA keeps none in its loops for sums, so the terms become an
  array. By a minimum in its place the loss of soft labels takes 0.5 of the time at 16384×1000, but
  5 times as long at 512×50304 and 2.6 times at 200000×10. The divergence takes a series where p and
  q are close, and the sum of q − p besides. With its gradient, of 9 to 16 classes, it pays for the
  pairs of the product with the Jacobian, which compute log q − log p again for each: 1.6 in place
  of 2.3 and 5.4 (10 and 16 classes) without them, but softmax + VJP 1.12 in place of 0.67 and 0.79.
- Without jax.jit some µs of a call go into the checks of its arguments. `jax.nn.log_softmax` is one
  compiled call without any; the other peers are several.
- In 16-bit types jaxsoft computes in float32 and rounds once. A peer that computes in 16 bits is
  faster at some sizes, and wrong by several eps.
- Along an axis that is not the last, and has no other before it, a kernel with several sums keeps
  whole arrays between them, not rows. Several axes are merged into one; XLA's program for bfloat16
  along one axis is slower than that along two, that of `jax.nn.softmax` as well.
"""

# What a section shows, one piece after another: paragraphs and tables.
Section = Callable[[argparse.Namespace], Iterator[str | Grid]]


def _accuracy(options: argparse.Namespace) -> Iterator[str | Grid]:
    yield accuracy.CAPTION
    cases = tracked(accuracy.cases(), "accuracy")
    yield accuracy.grid({case: accuracy.measure(case) for case in cases})


def _speed(options: argparse.Namespace) -> Iterator[str | Grid]:
    yield speed.CAPTION
    cells = tracked(speed.cells(quick=options.quick), "speed")
    given = {"seconds": options.seconds, "seed": options.seed, "portable": options.portable}
    measured = {cell: speed.measure(cell, **given) for cell in cells}
    timings = {cell: found.own for cell, found in measured.items()}
    yield targets.means(timings)
    yield from speed.grids(timings)
    if options.portable:
        yield speed.PORTABLE_CAPTION
        yield from speed.portable_grids(measured)
    yield "Bandwidth achieved: the arrays that have to be read and written at least, over the time."
    yield speed.bandwidths(timings)
    yield targets.verdicts(measured)
    yield targets.over(timings)
    yield _WHY.strip()


def _jacobian(options: argparse.Namespace) -> Iterator[str | Grid]:
    cases = tracked(jacobian.cases(quick=options.quick), "jacobian")
    rows = [jacobian.measure(case, options.seed) for case in cases]
    yield "The largest eigenvalue of every row's Jacobian, and how many times as fast it is."
    yield Grid(jacobian.COLUMNS, tuple(rows))


def _linear(options: argparse.Namespace) -> Iterator[str | Grid]:
    yield linear.CAPTION
    cases = tracked(linear.cases(quick=options.quick), "large vocabulary")
    results = [linear.measure(case, options.seconds, options.seed) for case in cases]
    yield linear.grid(results)
    yield from dict.fromkeys(line for result in results for line in result.left_out)
    yield layouts.CAPTION
    sizes = tracked(layouts.QUICK_SIZES if options.quick else layouts.SIZES, "products")
    rows = [row for size in sizes for row in layouts.measure(size, options.seconds, options.seed)]
    yield Grid(layouts.COLUMNS, tuple(rows))


def _tokens(options: argparse.Namespace) -> Iterator[str | Grid]:
    yield tokens.CAPTION
    results = {}
    for name in tokens.QUANTITIES:
        cases = tracked(tokens.cases(quick=options.quick), name)
        measured = [tokens.measure(name, case, options.seconds, options.seed) for case in cases]
        yield tokens.grid(name, measured)
        yield from dict.fromkeys(line for result in measured for line in result.left_out)
        results[name] = measured
    yield targets.of_tokens(results)
    yield tokens.ACCURACY_CAPTION
    yield tokens.digits()


def _sparse(options: argparse.Namespace) -> Iterator[str | Grid]:
    results = {}
    for module in (sparse, segments):
        yield module.CAPTION
        for name in sparse.QUANTITIES:
            cases = tracked(module.cases(quick=options.quick), name)
            measured = [module.measure(name, c, options.seconds, options.seed) for c in cases]
            yield module.grid(name, measured)
            yield from dict.fromkeys(line for result in measured for line in result.left_out)
            results[module, name] = measured
    yield targets.of_sparse(*(results[module, sparse.VJP] for module in (sparse, segments)))
    yield sparse.ACCURACY_CAPTION
    yield sparse.digits()
    yield sparse.LOSS_CAPTION
    yield sparse.loss_digits()


def _attention(options: argparse.Namespace) -> Iterator[str | Grid]:
    yield attention.CAPTION
    cases = tracked(attention.cases(quick=options.quick), "attention")
    measured = [attention.measure(case, options.seconds, options.seed) for case in cases]
    yield Grid(attention.COLUMNS, tuple(result.row for result in measured))
    yield from dict.fromkeys(result.left_out for result in measured if result.left_out)
    yield attention.ACCURACY_CAPTION
    yield attention.digits()
    yield attention.COMPILE_CAPTION
    yield attention.compilation(quick=options.quick)


def _compile(options: argparse.Namespace) -> Iterator[str | Grid]:
    yield compilation.CAPTION
    for case in tracked(compilation.cases(quick=options.quick), "compile"):
        yield compilation.measure(case)


def _programs(options: argparse.Namespace) -> Iterator[str | Grid]:
    yield programs.CAPTION
    cases = tracked(programs.cases(quick=options.quick), "programs")
    yield Grid(
        programs.COLUMNS, tuple(programs.measure(case, quick=options.quick) for case in cases)
    )


SECTIONS: dict[str, tuple[str, Section]] = {
    "speed": ("Speed", _speed),
    "accuracy": ("Accuracy", _accuracy),
    "jacobian": ("The Jacobian", _jacobian),
    "linear": ("A large vocabulary", _linear),
    "tokens": ("Log-probabilities and divergence of a large vocabulary", _tokens),
    "sparse": ("Sparse probabilities and segments", _sparse),
    "attention": ("Attention", _attention),
    "programs": ("Size of programs", _programs),
    "compile": ("Compilation of deep models", _compile),
}

# ------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    options.seconds = options.seconds or (0.1 if options.quick else 1.0)
    header = environment.header(argv)
    print("\n".join(f"{name}: {value}" for name, value in header), flush=True)
    sections = {}
    for name in options.only or SECTIONS:
        title, section = SECTIONS[name]
        written = []
        for piece in section(options):
            written.append(markdown(piece) if isinstance(piece, Grid) else piece)
            print("", text(piece) if isinstance(piece, Grid) else piece, sep="\n", flush=True)
        sections[title] = "\n\n".join(written)
    by = "\n".join(f"- {name}: {value}" for name, value in header)
    whole = _joined(f"{_INTRODUCTION.strip()}\n\n{by}", sections)
    if options.output:
        options.output.write_text(whole)
    elif not (options.quick or options.only):
        RESULTS.write_text(whole)
    elif not options.quick and RESULTS.exists():
        own = {title: f"{by}\n\n{body}" for title, body in sections.items()}
        RESULTS.write_text(_replaced(RESULTS.read_text(), own))
    else:
        return 0
    print(f"\nwritten to {options.output or RESULTS}")
    return 0


def _joined(introduction: str, sections: Mapping[str, str]) -> str:
    parts = [introduction, *(f"## {title}\n\n{body}" for title, body in sections.items())]
    return "\n\n".join(parts) + "\n"


def _replaced(results: str, sections: Mapping[str, str]) -> str:
    """The results with these sections in place of theirs, in the order of all sections."""
    introduction, *parts = re.split(r"^## (.+)\n", results, flags=re.MULTILINE)
    found = dict(zip(parts[::2], parts[1::2], strict=True)) | sections
    titles = [title for title, _ in SECTIONS.values() if title in found]
    return _joined(introduction.strip(), {title: found[title].strip() for title in titles})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Accuracy and speed of jaxsoft beside its peers, and how long deep models take "
        f"to compile. A run of all takes ten minutes or more, and writes {RESULTS.name}; a run of "
        "some sections writes these in their places. With --quick nothing is written.",
    )
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, help="one section; may be given repeatedly"
    )
    parser.add_argument(
        "--portable", action="store_true", help="time the portable forms beside the chosen ones"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    parser.add_argument(
        "--seconds", type=_positive, help="spent on each timing (default: 1, with --quick 0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the logits (default: 0)")
    parser.add_argument("--output", type=Path, help="a file for the results, in Markdown")
    return parser


def _positive(argument: str) -> float:
    number = float(argument)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {argument}")
    return number


if __name__ == "__main__":
    sys.exit(main())
