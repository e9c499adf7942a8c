"""`python -m benchmarks`: what it measures and prints of the loss of a large vocabulary."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import jacobian, linear, memory

CASE = linear.Case((60, 8, 90), "float32")
REQUIRED = [c for c in (linear.PEER, *linear.CANDIDATES) if c.optional is None]


@pytest.fixture(autouse=True)
def _as_a_user(monkeypatch):
    for package in linear.OPTIONAL:
        monkeypatch.setitem(sys.modules, package, None)
    # What Optax computes relies on the promotion that conftest.py forbids.
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(command, "cells", lambda *, quick: [])
    norms = [jacobian.Case(name, (4, 8), jacobian._dense_norm, 2) for name in ("dense", "alone")]
    norms[1] = dataclasses.replace(norms[1], peers=None)
    monkeypatch.setattr(jacobian, "cases", lambda *, quick: norms)
    monkeypatch.setattr(linear, "QUICK_SHAPES", (CASE.shape,))
    monkeypatch.setattr(linear, "SIXTEEN_BIT", 0)
    monkeypatch.setattr(memory, "in_own_process", lambda module, args: 3 * 2**20)
    assert command.main(["--quick", "--seconds", "0.001", "--markdown"]) == 0
    printed = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split(" | ") for line in printed if line.startswith("| ")]
    of_jacobian = {row[0]: row[1:] for row in cells if row[0].startswith("4×8")}
    assert list(of_jacobian) == ["4×8, dense", "4×8, alone"]
    assert all(float(number) >= 0 for number in of_jacobian["4×8, dense"])
    assert of_jacobian["4×8, alone"][1:] == ["–", "–"]
    rows = [row for row in cells if row[0].startswith("float32")]
    assert [row[0] for row in rows] == [f"float32, 60×8×90: {c.name}" for c in REQUIRED]
    assert [len(row) for row in rows] == [len(linear.COLUMNS)] * len(rows)
    assert [row[2] == "1" for row in rows] == [True, False, False]
    assert all(float(row[2].partition(" ")[0]) > 0 and float(row[4]) > 0 for row in rows)
    assert float(rows[0][4]) == 1
    assert {row[5] for row in rows} == {"3"}
    for candidate in linear.CANDIDATES:
        if candidate.optional:
            line = f"{candidate.name}: left out, not installed (pip install {candidate.optional})"
            assert line in printed


def test_candidates_compute_the_same():
    args = linear.arguments(CASE, 0)
    expected, *others = (c.program(args).call(*args) for c in REQUIRED)
    for computed in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-7), computed, expected)


def test_peak_memory_in_a_process_of_its_own():
    peak = linear._peak(linear.Case((1280, 8, 8192), "float32"), linear.PEER, 0)
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
    result = linear.measure(linear.Case((4, 2, 3), "bfloat16"), 0.001, 0)
    assert result.left_out == ("broken: left out, NotImplementedError: not on this device",)
