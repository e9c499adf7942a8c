"""The example of several processes: it ends with the loss of one device, and it never hangs."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "many_devices.py"
STEPS = 8  # a state is saved after half of them

pytestmark = pytest.mark.example


def run(directory, timeout, *args):
    """Two processes with four devices each, on a twentieth of the text."""
    command = [sys.executable, EXAMPLE, "--files", "20", "--steps", str(STEPS)]
    command += ["--timeout", str(timeout), "--directory", directory, *args]
    # Less time for compiling.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=150, check=False
    )


def steps(result):
    return [int(step) for step in re.findall(r"step (\d+) loss", result.stdout)]


def assert_none_is_left(result):
    pids = re.findall(r"\d+", " ".join(re.findall("^processes .*", result.stdout, re.MULTILINE)))
    assert len(pids) >= 4  # two before the restore, two after it
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_others_go_on_where_a_process_died_and_end_with_the_loss_of_one_device(tmp_path):
    died = run(tmp_path, 60, "--drill", "die")
    assert died.returncode == 1, died.stderr
    assert "process 1 was ended by SIGKILL" in died.stdout
    assert re.search(r"process 0 (ended with code 1|was ended by SIGABRT): \S", died.stdout)
    assert "seconds of silence" not in died.stdout  # the other one ended by itself
    assert steps(died) == list(range(STEPS // 2 + 1))
    assert_none_is_left(died)

    result = run(tmp_path, 60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"restored the state after {STEPS // 2} steps" in result.stdout
    assert steps(result) == list(range(STEPS // 2, STEPS))
    many, one = map(float, re.findall(r"last loss on .*: +([\d.]+)", result.stdout))
    assert many == pytest.approx(one, rel=1e-5)
    assert many < 5.4  # and has learnt: it began at 5.47

    assert run(tmp_path, 60).returncode == 1  # there is nothing left to do


def test_a_process_that_stalls_ends_all_within_the_limit(tmp_path):
    limit = 20
    before = time.monotonic()
    result = run(tmp_path, limit, "--drill", "stall")
    assert result.returncode == 1, result.stderr
    # JAX finds out that it was not heard of, for what is left can only wait.
    assert re.search(r"process 0 was ended by SIGABRT: .*unhealthy.*heartbeats", result.stdout)
    assert f"process 1 was still there after {limit} seconds of silence" in result.stdout
    assert steps(result) == list(range(STEPS // 2 + 1))
    assert time.monotonic() - before < limit + 60  # the limit, and two starts
    assert_none_is_left(result)
