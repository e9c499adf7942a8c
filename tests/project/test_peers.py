"""The tests of Optax and SciPy pass when their softmax, log_softmax, logsumexp are jaxsoft's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(tested, *, caller=None, functions=(), path=ROOT):
    """Runs the tests of a module on jaxsoft, and asserts that they pass and what is called."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.peers", tested],
        cwd=ROOT,
        # On the CPU: an accelerator belongs to the process that runs these tests.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    failures = report["failures"]
    assert not failures, "\n".join((f"{tested} fails on jaxsoft in", *failures, *failures.values()))
    assert report["run"] > 0, f"{tested} holds no tests"
    called = report["calls"].get(caller, {})
    assert called.keys() == set(functions), f"{caller} calls {called}"


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "functions"),
    [("_classification", ("softmax", "log_softmax", "logsumexp")), ("_ranking", ("log_softmax",))],
)
def test_optax(name, functions):
    check(f"optax.losses.{name}_test", caller=f"optax.losses.{name}", functions=functions)


@pytest.mark.peer
def test_scipy():
    tested = "scipy.special.tests.test_logsumexp"
    check(tested, caller=tested, functions=["logsumexp"])


# ------------------------------------------------------------------------------ when it is wrong

FAILING = """
import unittest
from jax.nn import softmax


class Softmax(unittest.TestCase):
    def test_is_twice_what_it_is(self):
        self.assertEqual(softmax(1.0, ()), 2.0)

    def test_is_what_it_is(self):
        self.assertEqual(softmax(1.0, ()), 1.0)
"""


@pytest.mark.parametrize(
    ("source", "functions", "message"),
    [
        pytest.param(FAILING, ["softmax"], "others.Softmax.test_is_twice_what_it_is", id="fails"),
        pytest.param("", [], "holds no tests", id="holds no tests", marks=pytest.mark.slow),
        pytest.param(
            "import numby",
            [],
            "No module named 'numby'",
            id="cannot be imported",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            FAILING.replace("2.0", "1.0"),
            ["logsumexp"],
            "calls {'softmax': 2}",
            id="calls another function",
        ),
    ],
)
def test_what_is_wrong_is_told(tmp_path, source, functions, message):
    (tmp_path / "others.py").write_text(source)
    with pytest.raises(AssertionError, match=f"(?s)^others .*{re.escape(message)}") as caught:
        check("others", caller="others", functions=functions, path=tmp_path)
    assert "test_is_what_it_is" not in str(caught.value)
