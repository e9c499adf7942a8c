"""The notebooks run headless, were committed executed, and say what their outputs show."""

import base64
import os
import re
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LARGEST_FILE = 600_000  # bytes: GitHub shows a notebook of this size without delay

pytestmark = [
    pytest.mark.notebook,
    pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem),
]


def read(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows, without the content: text, figures, an error."""
    return {
        (output.output_type, output.get("name"), *sorted(output.get("data", {})))
        for output in cell.outputs
    }


def text(cell, name):
    return "".join(output.text for output in cell.outputs if output.get("name") == name)


@pytest.fixture
def kernel_environment(tmp_path, monkeypatch):
    # The kernel inherits these. JAX on the CPU: as committed, and no worker waits for a device.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # Less time for compiling: what is compared of the outputs are their kinds, not their numbers.
    flags = (os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0")
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags).strip())
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # older versions of jupyter_core warn without
    # A notebook finds the scripts beside it and among the examples, as in Jupyter, though it runs
    # in another directory.
    beside = NOTEBOOKS[0].parent
    paths = (str(beside), str(beside.parent / "examples"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    # On a fresh machine matplotlib would warn in the notebook that it builds its font cache.
    import matplotlib.font_manager  # noqa: F401


@pytest.mark.usefixtures("kernel_environment")
def test_runs(path, tmp_path):
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    committed, fresh = read(path), read(path)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    # Without directories of installed kernels, "python3" is the interpreter that runs the tests.
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    assert kernel.kernel_spec.argv[0] == sys.executable
    client = NotebookClient(
        fresh, km=kernel, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(cleanup_kc=True)  # raises CellExecutionError

    for i, (cell, ran) in enumerate(zip(code_cells(committed), code_cells(fresh), strict=True)):
        assert not text(ran, "stderr"), f"code cell {i} warns: {text(ran, 'stderr')}"
        assert kinds(cell) == kinds(ran), f"code cell {i} was not committed as executed"


def test_committed_executed(path):
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for i, cell in enumerate(cells):
        shown = kinds(cell)
        assert not shown & {("stream", "stderr"), ("error", None)}, f"code cell {i} warns or fails"
        if re.search(r"^ *print\(|\btqdm\(", cell.source, re.MULTILINE):
            assert text(cell, "stdout"), f"code cell {i} prints, and has no text"
        if "plt.show()" in cell.source:
            assert ("display_data", None, "image/png", "text/plain") in shown, f"code cell {i}"
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert base64.b64decode(output.data["image/png"]).startswith(b"\x89PNG")


def test_has_no_traces_of_a_machine(path):
    notebook = read(path)
    assert path.stat().st_size < LARGEST_FILE
    assert dict(notebook.metadata.kernelspec) == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}  # no version
    assert all(not cell.metadata for cell in notebook.cells)  # no times of execution


def test_prose_quotes_the_outputs(path):
    notebook = read(path)
    seen = "".join(cell.source + text(cell, "stdout") for cell in code_cells(notebook))
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"https?://\S+", "", prose)
    quoted = re.findall(r"\d+\.\d{3,}", prose)
    assert quoted
    assert [number for number in quoted if number not in seen] == []
