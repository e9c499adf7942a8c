"""What is distributed works where nothing else is installed."""

import json
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.release, pytest.mark.slow]


def run(*command, cwd):
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{command}: {(ran.stdout + ran.stderr)[-3000:]}"
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    run(sys.executable, "-m", "twine", "check", "--strict", *folder.iterdir(), cwd=folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_the_wheel_works_in_an_empty_environment(built, tmp_path):
    wheel, _ = built
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    program = "import jax, jaxsoft; print(jaxsoft.__file__, jaxsoft.softmax(jax.numpy.zeros(2)))"
    assert str(tmp_path) in run(python, "-c", program, cwd=tmp_path)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[demo]", cwd=tmp_path)
    report = run(python, "-m", "jaxsoft", "--quick", "--json", cwd=tmp_path)
    assert json.loads(report)


def test_the_tests_run_from_the_source_distribution(built, tmp_path):
    _, source = built
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    some = ["tests/project/test_package.py", "tests/core", "tests/functions/test_logsumexp.py"]
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow"]
    printed = run(sys.executable, "-m", "pytest", *options, *some, cwd=unpacked)
    assert " passed" in printed
