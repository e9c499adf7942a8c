"""`python -m benchmarks`: what it measures, and what it writes of it."""

import dataclasses
import datetime
import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import (
    accuracy,
    attention,
    candidates,
    compilation,
    jacobian,
    layouts,
    linear,
    memory,
    programs,
    segments,
    sparse,
    speed,
    targets,
    tokens,
)
from jaxsoft._demo.timing import Timing

CASE = candidates.Case((60, 8, 90), "float32")
ROWS = candidates.Case((3, 1000), "float32")
SEGMENTS = segments.Case((40, 2), "float32", is_sorted=True)
ABSENT = ("torch", "tokamax", "tunix", "jaxopt", "entmax")


def required(chosen):
    """Those candidates that are never left out."""
    return [candidate for candidate in chosen if candidate.optional is None]


REQUIRED = required((linear.PEER, *linear.CANDIDATES))
OF_TOKENS = {
    name: required((quantity.peer[0], *quantity.own, *quantity.others))
    for name, quantity in tokens.QUANTITIES.items()
}


@pytest.fixture(autouse=True)
def _as_a_user(monkeypatch):
    found = importlib.import_module

    def import_module(name, package=None):
        first = name.partition(".")[0]
        if first in ABSENT:
            raise ModuleNotFoundError(f"No module named {first!r}", name=first)
        return found(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    # What Optax computes relies on the promotion that conftest.py forbids.
    with jax.numpy_dtype_promotion("standard"):
        yield


def table(markdown, heading):
    """The rows of the table under this heading, by their first cell."""
    lines = markdown[markdown.index(f"| {heading} |") :].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows[2:]}


def timed(ratio):
    return Timing(ratio, 1.0, ratio, ratio, ratio)


@pytest.mark.slow
def test_results(monkeypatch, capsys, tmp_path):
    chosen = [speed.Cell(q, (6, 5), -1, "float32") for q in speed.QUANTITIES]
    chosen += [speed.Cell("softmax", (2, 3, 4), (0, 1), "float16")]
    chosen += [speed.Cell("loss", (4, 3), 0, "float32", jitted=False)]
    monkeypatch.setattr(speed, "cells", lambda *, quick: chosen)
    monkeypatch.setattr(accuracy, "ROWS", {"float32": ("gap 17",)})
    norms = [jacobian.Case(name, (4, 8), jacobian._dense_norm, 2) for name in ("dense", "alone")]
    norms[1] = dataclasses.replace(norms[1], peers=None)
    monkeypatch.setattr(jacobian, "cases", lambda *, quick: norms)
    monkeypatch.setattr(linear, "QUICK_SHAPES", (CASE.shape,))
    monkeypatch.setattr(layouts, "QUICK_SIZES", ((8, 4, 6),))
    monkeypatch.setattr(candidates, "SIXTEEN_BIT", 0)
    monkeypatch.setattr(tokens, "QUICK_SHAPES", (CASE.shape,))
    monkeypatch.setattr(tokens, "GAPS", (17,))
    monkeypatch.setattr(memory, "in_own_process", lambda module, args: 3 * 2**20)
    monkeypatch.setattr(sparse, "QUICK_SHAPES", ((3, 1000),))
    monkeypatch.setattr(sparse, "DTYPES", ("float32",))
    monkeypatch.setattr(sparse, "LEADS", (0.9375,))
    monkeypatch.setattr(sparse, "OFFSETS", (1e6,))
    monkeypatch.setattr(segments, "QUICK_SHAPES", ((40, 2),))
    monkeypatch.setattr(attention, "QUICK_LENGTHS", (3,))
    monkeypatch.setattr(attention, "GAPS", (17,))
    monkeypatch.setattr(attention, "QUANTITIES", {attention.GRADIENT: attention._loss_and_gradient})
    monkeypatch.setattr(attention, "_CHEAPER", ())
    program = compilation.Compiled((0.1, 0.2, 0.3, 0.6), 1000, 20)
    monkeypatch.setattr(attention, "compiled", lambda function, args: program)
    monkeypatch.setattr(compilation, "compiled", lambda function, args: program)
    monkeypatch.setattr(programs, "compiled", lambda function, args: program)
    output = tmp_path / "results.md"
    arguments = ["--quick", "--portable", "--seconds", "0.001", "--output", str(output)]
    assert command.main(arguments) == 0
    printed, written = capsys.readouterr().out, output.read_text()

    assert f"- command: python -m benchmarks {' '.join(arguments)}" in written
    assert f"jax {jax.__version__}," in written
    assert f"- date: {datetime.date.today().isoformat()}" in written

    times = table(written, "float32, last axis | 6×5 | geometric mean")
    many = [name for name, quantity in speed.QUANTITIES.items() if not quantity.few]
    few = [name for name in speed.QUANTITIES if name not in many]
    assert list(times) == many
    more = "float32, more quantities and a prime length | 6×5 | geometric mean"
    assert list(table(written, more)) == few
    for kind in ("last axis", "more quantities and a prime length"):
        ratios = table(written, f"portable: float32, {kind} | 6×5 | geometric mean")
        assert all(float(row[0]) == float(row[1]) > 0 for row in ratios.values())
    heading = "time / peer, geometric mean | float32, last axis | float32, more quantities"
    first = written.index(f"| {heading}")
    assert first < written.index("| float32, last axis | 6×5")
    assert f"| softmax | {times['softmax'][1]} | – |" in written[first:]
    assert all(float(row[0].split()[0]) == float(row[1]) > 0 for row in times.values())
    assert list(table(written, "float16, other axis | 2×3×4, axis (0, 1) | geometric mean")) == [
        "softmax"
    ]
    (eager,) = table(
        written, "float32, without jax.jit | 4×3, axis 0 | jaxsoft, µs | peer, µs"
    ).values()
    assert all(float(number) > 0 for number in eager[1:])

    of_jacobian = table(written, " | ".join(jacobian.COLUMNS))
    assert list(of_jacobian) == ["4×8, dense", "4×8, alone"]
    assert all(float(number) >= 0 for number in of_jacobian["4×8, dense"])
    assert of_jacobian["4×8, alone"][1:] == ["–", "–"]

    assert table(written, "2 layers, 16 keys | jaxsoft | jax.nn and optax | ratio") == {
        "trace, s": ["0.10", "0.10", "1.00 (1.00–1.00)"],
        "lower, s": ["0.20", "0.20", "1.00 (1.00–1.00)"],
        "compile, s": ["0.30", "0.30", "1.00 (1.00–1.00)"],
        "all three, s": ["0.60", "0.60", "1.00 (1.00–1.00)"],
        "equations of the jaxpr": ["1,000", "1,000", "1.00"],
        "instructions of the compiled HLO": ["20", "20", "1.00"],
    }

    sizes = table(written, " | ".join(programs.COLUMNS))
    assert len(sizes) == len(programs.QUANTITIES) * len(programs.DERIVATIVES)
    size = ["10", "1.00 (1000/1000)", "1.00 (20/20)", "1.0 (100/100)"]
    assert sizes["loss, gradient of that"] == size

    of_attention = table(written, " | ".join(attention.COLUMNS))
    assert list(of_attention) == [f"loss + gradient{c}, float32, 3" for c in ("", ", causal")]
    for milliseconds, ratio, *rest in of_attention.values():
        assert float(milliseconds) >= 0
        assert float(ratio.partition(" ")[0]) > 0
        assert (rest[0], rest[-1]) == ("–", "–")
    ((own, peer),) = table(written, "relative error of ∂loss/∂s | jaxsoft | jax.nn").values()
    assert float(own) < 1e-6
    assert peer == "all"
    compiling = table(
        written, "trace, lower and compile | jaxsoft, s | time / jax.nn | time / tokamax"
    )
    assert list(compiling.values()) == [["0.60", "1.00 (1.00–1.00)", "–"]] * 2

    layers = table(written, " | ".join(linear.COLUMNS))
    assert list(layers) == [f"float32, 60×8×90: {c.name}" for c in REQUIRED]
    rows = list(layers.values())
    assert [row[1] == "1" for row in rows] == [True, False, False, False]
    assert all(float(row[1].partition(" ")[0]) > 0 and float(row[3]) > 0 for row in rows)
    of_products = table(written, " | ".join(layouts.COLUMNS))
    assert list(of_products) == [f"{name}, 8×4×6" for name in layouts.PRODUCTS]
    assert all(float(row[1].partition(" ")[0]) > 0 for row in of_products.values())
    assert float(rows[0][3]) == 1
    assert {row[4] for row in rows} == {"3"}
    for candidate in linear.CANDIDATES:
        if candidate.optional:
            line = f"{candidate.name}: left out, not installed (pip install {candidate.optional})"
            assert line in written
            assert line in printed

    for name, chosen in OF_TOKENS.items():
        of_quantity = table(written, " | ".join(tokens.columns(name)))
        assert list(of_quantity) == [f"float32, 60×8×90: {c.name}" for c in chosen]
        rows = list(of_quantity.values())
        assert [row[1] == "1" for row in rows] == [True] + [False] * (len(rows) - 1)
        assert float(rows[0][3]) == 1
        others = len(tokens.QUANTITIES[name].others)
        assert any(float(row[4]) == 1 for row in rows[-others:])  # the fastest of them
    assert "tunix on x @ w: left out, not installed (pip install google-tunix)" in written
    assert "| jaxsoft.linear_log_probs: temporary memory | ≤ 0.1 | " in written
    digits = table(written, "relative error | jaxsoft | jax.nn")
    assert len(digits) == 5
    assert all(float(own) < 1e-6 for own, _ in digits.values())
    assert digits["log p of the dominant class, gap 17"][1] == "all"
    assert digits["gradient of KL by the student, gap 17"][1] == "all"

    for name in sparse.QUANTITIES:
        *headings, _ = candidates.columns(name, "softmax", "rows×n")
        of_rows = table(written, " | ".join((*headings, "time / jax.nn")))
        names = [f"float32, 3×1000: {c.name}" for c in required(sparse.chosen(name, ROWS))]
        assert [title for title in of_rows if not title.endswith("optax")] == names
        rows = list(of_rows.values())
        assert [row[1] == "1" for row in rows] == [True] + [False] * (len(rows) - 1)
        assert rows[1][-1] == "1.00"
        headings = candidates.columns(f"{name} of segments", "formula", "entries")
        assert [row[1] == "1" for row in table(written, " | ".join(headings)).values()] == [
            True,
            False,
            False,
        ] * 2
    assert "jaxopt: left out, not installed (pip install jaxopt)" in written
    assert "| jaxsoft.entmax, float32, n = 1000 | ≤ 4 | " in written
    assert "| jaxsoft.segment_softmax | ≤ 1.1 | " in written
    digits = table(written, "error of sparsemax in eps | jaxsoft | optax")
    assert len(digits) == 6
    assert all(float(own) <= 1 for own, _ in digits.values())
    ((own, peer),) = table(written, "relative error of the loss | jaxsoft | optax").values()
    assert float(own) < 1e-6
    assert peer == "all"


@pytest.mark.slow
def test_accuracy_of_jaxsoft_is_within_the_contract_and_that_of_others_is_not():
    cases = [accuracy.Case(q, "float32", "gap 17") for q in accuracy.QUANTITIES]
    cases += [accuracy.Case("its gradient", "bfloat16", "gap 10")]
    errors = {case: accuracy.measure(case) for case in cases}
    for found in errors.values():
        assert found["jaxsoft"] <= found["allowed"]
    assert errors[cases[4]]["optax"] > 1e6  # the loss is exactly 0
    shown = {name: values for name, *values in accuracy.grid(errors).rows}
    columns = accuracy.grid(errors).columns[1:]
    gradient = dict(zip(columns, shown["its gradient, bfloat16, gap 10"], strict=True))
    assert gradient["jax.nn"] == gradient["optax"] == "all"
    assert float(gradient["jaxsoft"]) <= float(gradient["allowed"]) == 0.6
    assert "torch" not in columns  # it is not installed here


def test_only_one_section_and_no_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(accuracy, "ROWS", {"float16": ("gap 10",)})
    monkeypatch.setattr(command, "RESULTS", tmp_path / "RESULTS.md")
    assert command.main(["--only", "accuracy"]) == 0
    assert not command.RESULTS.exists()
    printed = capsys.readouterr().out
    assert "its gradient, float16, gap 10" in printed
    assert "time / peer" not in printed


@pytest.mark.slow
def test_a_section_is_written_in_its_place(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(accuracy, "ROWS", {"float16": ("gap 10",)})
    monkeypatch.setattr(command, "RESULTS", tmp_path / "RESULTS.md")
    command.RESULTS.write_text("# Results\n\n- date: once\n\n## The Jacobian\n\nold\n")
    assert command.main(["--only", "accuracy", "--quick"]) == 0
    assert "old\n" in command.RESULTS.read_text()  # a quick run writes nothing
    assert "Accuracy" not in command.RESULTS.read_text()
    for _ in range(2):  # the second run replaces what the first has written
        assert command.main(["--only", "accuracy"]) == 0
        introduction, first, second = command.RESULTS.read_text().split("\n\n## ")
        assert introduction == "# Results\n\n- date: once"
        assert first.startswith("Accuracy\n\n- date: ")
        assert first.count("- command: python -m benchmarks --only accuracy\n") == 1
        assert "| its gradient, float16, gap 10 |" in first
        assert second == "The Jacobian\n\nold\n"
    assert f"written to {command.RESULTS}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_deep_models_compute_the_same():
    case = compilation.Case(1, 4, 1)
    args = jax.jit(lambda: compilation.arguments(case))()
    own, peer = (jax.jit(compilation.step(*program))(*args) for program in compilation.PROGRAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), own, peer)
    assert 6 < float(own[-1]) < 9  # log 1000 = 6.9


def test_sizes_of_a_program(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))  # others need them

    def function(x):
        return jax.lax.cond(x[0] > 0, jnp.sin, jax.jit(lambda x: jnp.cos(x) + 1), x)

    args = (jax.ShapeDtypeStruct((3,), np.float32),)
    found = compilation.compiled(function, args)
    # x[0]: slice, squeeze; >; the index of the branch; sin; cos and +
    assert found.equations == 7
    assert found.instructions > 3
    assert sum(found.seconds[:3]) == pytest.approx(found.seconds[3])
    assert min(found.seconds) > 0
    assert cleared == [True]


def test_hint_without_what_the_benchmarks_need():
    program = "import sys, runpy; sys.modules['mpmath'] = None; runpy.run_module('benchmarks')"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith('python -m benchmarks needs mpmath: pip install ".[bench]" in a ')


def test_targets():
    cell = lambda *args, **kw: speed.Cell(args[0], (args[1], 3), -1, args[2], **kw)
    timings = {
        cell("softmax + VJP", 1, "float32"): timed(0.4),
        cell("softmax + VJP", 2, "float32"): timed(1.6),
        cell("loss", 1, "float32"): timed(0.75),
        cell(speed.FROM_P, 1, "float32"): timed(9.0),
        cell("loss", 1, "float32", jitted=False): timed(0.1),
    }
    bare = {"softmax + VJP": timed(0.9), "loss": timed(0.5)}
    measured = {
        cell: speed.Measured(own, bare.get(cell.quantity) if cell.jitted else None)
        for cell, own in timings.items()
    }
    rows = {name: rest for name, *rest in targets.verdicts(measured).rows}
    assert rows == {
        "softmax + VJP: float32, last axis": ["≤ 0.8", "0.80", "met", "0.90", "0.60"],
        "loss: float32, last axis": ["≤ 0.5", "0.75", "missed by 50 %", "0.50", "0.50"],
        "all: float32, without jax.jit": ["≤ 0.3", "0.10", "met", "–", "–"],
        "the largest mean, softmax + VJP: float32, last axis": ["≤ 1.0", "0.80", "met", "–", "–"],
        "the slowest of 4 cells": ["≤ 1.4", "1.60", "missed by 14 %", "–", "–"],
    }
    over = targets.over(timings)
    assert over.columns[0] == "1 of 4 cells over 1.05"
    assert over.rows == (("softmax + VJP", "1 of 2", "1.60", "1.60", "float32, 2×3"),)


def test_targets_of_tokens(monkeypatch):
    peer, own, other = (candidates.Candidate(name, None) for name in ("peer", "own", "other"))
    quantity = tokens.Quantity((peer, "logits"), (own,), (other,))
    small = dataclasses.replace(quantity, smaller=False)
    quantities = {"entropy": quantity, "statistics": small}
    monkeypatch.setattr(tokens, "QUANTITIES", quantities)

    def result(ratio, share):
        measured = {
            peer: candidates.Measured(timed(1.0), 100, 1.0),
            own: candidates.Measured(timed(ratio), 10, share),
            other: candidates.Measured(timed(2 * ratio), 100, 1.0),
        }
        return candidates.Result(CASE, measured, ())

    results = [result(1.21, 0.05), result(0.5, 0.1), result(0.4, None)]
    assert targets.of_tokens(dict.fromkeys(quantities, results)).rows == (
        ("own: time", "≤ 1.1", "1.21", "missed by 10 %"),
        ("own: temporary memory", "≤ 0.1", "0.10", "met"),
        ("own: time", "≤ 1.1", "1.21", "missed by 10 %"),
    )
    ratios = [row[-1] for row in tokens.grid("entropy", results[:1]).rows]
    assert ratios == ["0.41", "0.50", "1.00"]


def test_targets_of_sparse():
    def result(case, **ratios):
        measured = {
            candidates.Candidate(f"jaxsoft.{name}", None): candidates.Measured(timed(r), 1, 1.0)
            for name, r in ratios.items()
        }
        return candidates.Result(case, measured, ())

    others = candidates.Case((3, 10), "float32"), candidates.Case((3, 1000), "bfloat16")
    rows = [result(case, sparsemax=9.0, entmax=9.0) for case in others]
    rows.append(result(ROWS, sparsemax=5.0, entmax=2.0))
    of_segments = [result(SEGMENTS, segment_softmax=ratio) for ratio in (1.0, 1.1)]
    assert targets.of_sparse(rows, of_segments).rows == (
        ("jaxsoft.sparsemax, float32, n = 1000", "≤ 4", "5.00", "missed by 25 %"),
        ("jaxsoft.entmax, float32, n = 1000", "≤ 4", "2.00", "met"),
        ("jaxsoft.segment_softmax", "≤ 1.1", "1.10", "met"),
    )
    assert len(targets.of_sparse(rows[:2], of_segments).rows) == 1


def test_bandwidth():
    cell = speed.Cell("loss + gradient", (1000, 500), -1, "bfloat16")
    assert speed.bandwidth(cell, timed(1e-3)) == pytest.approx(2 * 1000 * 500 * 2 / 1e-3 / 1e9)


@pytest.mark.slow
def test_the_peers_compute_the_same():
    for name, quantity in speed.QUANTITIES.items():
        cell = speed.Cell(name, (3, 5, 2), 1, "float32")
        args = (*speed.arguments(cell, 0), cell.axis)
        for other in filter(None, (quantity.peer, quantity.bare)):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6),
                quantity.own(*args),
                other(*args),
            )


def test_candidates_compute_the_same():
    args = linear.arguments(CASE, 0)
    expected, *others = (c.program(args).call(*args) for c in REQUIRED)
    for computed in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-7), computed, expected)


@pytest.mark.parametrize("name", layouts.PRODUCTS)
def test_layouts_compute_the_same(name):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (4, 3), (2, 4, 5), (2, 3, 5)  # of x, ȳ and w in chunks
    x, y_bar, w = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    plain = layouts.LAYOUTS["as it is"].of(w)
    function, in_numpy = layouts.PRODUCTS[name]
    expected = np.zeros({"x w": (2, 4, 5), "ȳ wᵀ": (4, 3), "xᵀ ȳ": (3, 10)}[name], np.float32)
    in_numpy(*map(np.asarray, (x, y_bar, plain)), expected)
    if name == "x w":
        np.testing.assert_allclose(np.hstack([*expected]), x @ plain, rtol=1e-5, atol=1e-6)
    for layout in layouts.LAYOUTS.values():
        found = function(layout, x, y_bar, layout.of(w))
        if name == "xᵀ ȳ":
            found = jnp.hstack([layout.part(found, i, 5) for i in range(2)])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_candidates_compute_the_same_of_tokens(name):
    args = tokens.QUANTITIES[name].arguments(CASE, 0)
    found = [c.program(args).call(*args) for c in OF_TOKENS[name]]
    # With statistics the loss comes first in a pair of both.
    losses, statistics = [], []
    for value, gradients in found:
        loss, *more = value if isinstance(value, tuple) else (value,)
        losses.append((loss, gradients))
        statistics += more
    for same in (losses, [tuple(more) for more in statistics]):
        for computed in same[1:]:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-7), computed, same[0]
            )


@pytest.mark.parametrize("name", sparse.QUANTITIES)
def test_candidates_compute_the_same_of_rows_and_segments(name):
    x, g, _ = sparse.timing.arguments(ROWS.shape, ROWS.dtype, 0)
    of_rows = {c.name: c.program((x, g)).call(x, g) for c in required(sparse.chosen(name, ROWS))}
    args = segments.arguments(SEGMENTS, 0)
    assert np.all(np.diff(args[-1]) >= 0)
    of_segments = [c.program(args).call(*args) for c in segments.chosen(name, SEGMENTS)]
    for computed, expected in (
        (of_rows[sparse.PEER], of_rows[sparse.FLOOR]),
        *((computed, of_segments[0]) for computed in of_segments[1:]),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), computed, expected)
    p = of_rows[sparse.OWN[0]]
    p = p[0] if name == sparse.VJP else p
    np.testing.assert_allclose(p, sparse._optax(x), 1e-4, 1e-6)


def test_sparsemax_against_rational_numbers():
    assert sparse.probabilities(np.float32([1, 0.5, -1])) == [0.75, 0.25, 0]
    assert sparse._loss(np.float32([1, 0.5, -1])) == 0.0625
    entry, total = sparse.errors(np.full(1000, 0.7, np.float32))["jaxsoft"]
    assert entry < 0.01
    assert total < 1
    for offset in (0.0, 1e6):
        found = sparse.loss_errors(1.0, offset)
        assert found["jaxsoft"] == 0  # the loss is exactly 0


@pytest.mark.slow
@pytest.mark.parametrize("quantity", attention.QUANTITIES)
def test_attentions_compute_the_same(quantity):
    case = attention.Case(quantity, 3, "float32", causal=True)
    args = attention.arguments(case, 0)
    own, peer = (
        jax.jit(attention.program(case, name))(*args) for name in (attention.OWN, attention.PEER)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), own, peer)


def test_attention_at_the_largest_size_is_timed_where_it_is_affordable():
    rounds = {case.title: case.rounds for case in attention.cases(quick=False)}
    assert rounds["loss + gradient, causal, float32, 2048"] > 2
    assert rounds["loss + gradient, causal, float32, 8192"] == 2
    assert rounds["jvp, float32, 8192"] == 0
    assert "forward, bfloat16, 2048" in rounds


def test_attention_without_a_derivative_or_too_large_has_no_time(monkeypatch):
    def fails(*args, **options):
        raise TypeError("no such derivative\nand more")

    sizes = iter((None, attention._LIMIT + 1))
    monkeypatch.setattr(attention, "scratch_bytes", lambda compiled: next(sizes))
    attentions = dict.fromkeys((attention.OWN, attention.PEER), lambda q, k, v, is_causal: q)
    monkeypatch.setattr(attention, "ATTENTIONS", attentions | {attention.OPTIONAL: fails})
    monkeypatch.setattr(attention, "_installed", lambda: attention.NAMES)
    found = attention.measure(attention.Case("jvp", 2, "float32", rounds=2), 0.001, 0)
    title, milliseconds, *ratios, own, peer, optional = found.row
    assert title == "jvp, float32, 2"
    assert float(milliseconds) >= 0
    assert ratios == ["–", "–"]
    assert (own, peer, optional) == ("–", "5120", "–")
    assert found.left_out == "tokamax, jvp: left out, TypeError: no such derivative"


@pytest.mark.slow
def test_peak_memory_in_a_process_of_its_own():
    peak = linear._peak(candidates.Case((1280, 8, 8192), "float32"), linear.PEER, 0)
    if peak is None:
        pytest.skip("only Linux tells the peak")
    logits = 1280 * 8192 * 4
    assert logits < peak < 4 * logits


def test_a_candidate_that_fails_is_left_out(monkeypatch):
    def fails(args):
        raise NotImplementedError("not on this device\nand more")

    broken = linear.Candidate("broken", fails, "broken")
    monkeypatch.setattr(
        linear, "CANDIDATES", (dataclasses.replace(linear.PEER, name="again"), broken)
    )
    monkeypatch.setattr(memory, "in_own_process", lambda module, args: None)
    result = linear.measure(candidates.Case((4, 2, 3), "bfloat16"), 0.001, 0)
    assert result.left_out == ("broken: left out, NotImplementedError: not on this device",)


@pytest.mark.parametrize(
    "case", programs.cases(quick=True), ids=lambda case: f"{case.quantity}-{case.derivative}"
)
def test_programs_of_derivatives_are_small(case):
    x, derivative = jnp.ones((programs.ROWS, case.n)), programs.DERIVATIVES[case.derivative]
    own, peer = (
        compilation.equations(jax.make_jaxpr(derivative(function))(x).jaxpr)
        for function in programs.QUANTITIES[case.quantity]
    )
    assert 10 < own <= 2 * peer
