"""Every row of docs/coming_from.md: what is called here computes what is called there."""

import ast
import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
# Each side may be off by 4 eps, of its entry or of 1, whichever is more.
EPS = float(np.finfo(np.float32).eps)
TOLERANCE = 8 * EPS


def rows():
    """How the library is imported, if it is, and both expressions of each row."""
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        imports = re.search(r"^There: `(import .*)`", section, re.MULTILINE)
        for there, here in re.findall(r"^\| `([^`]*)` \| `([^`]*)` \|", section, re.MULTILINE):
            library = section.splitlines()[0]
            yield pytest.param(imports and imports[1], there, here, id=f"{library}: {there}")


ROWS = list(rows())


@functools.cache
def arrays():
    """The names that the page defines."""
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), names)
    return names


def tensors(names):
    """The same with tensors for arrays, and ids of 64 bits, as PyTorch wants them."""
    import torch

    def tensor(value):
        if not isinstance(value, jax.Array):
            return value
        value = torch.from_numpy(np.array(value))
        return value.long() if value.dtype == torch.int32 else value

    return {name: tensor(value) for name, value in names.items()}


def leaves(expression, names):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eval(expression, dict(names)))]


@pytest.fixture
def names(precision):
    """The page is run as a user runs it: in float32, with JAX's own promotion."""
    jax.config.update("jax_enable_x64", False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield arrays()


def test_the_page_has_a_row_for_each_function():
    assert len(ROWS) >= 60
    lines = re.findall(r"^\| `", PAGE, re.MULTILINE)
    assert len(lines) == len(ROWS), "a row is not `there` | `here` | what differs"


@pytest.mark.filterwarnings("ignore")  # those of other libraries
@pytest.mark.parametrize(("imports", "there", "here"), ROWS)
def test_both_sides_of_a_row_are_equal(names, imports, there, here):
    found = leaves(here, names)
    assert all(np.isfinite(leaf).all() for leaf in found)
    if imports:
        modules = [alias.name for alias in ast.parse(imports).body[0].names]
        for module in modules:
            pytest.importorskip(module, exc_type=ImportError)
        names = tensors(names) if "torch" in modules else dict(names)
        exec(imports, names)
    for actual, wanted in zip(found, leaves(there, names), strict=True):
        assert actual.shape == wanted.shape
        error = np.abs(actual - wanted) / np.maximum(1, np.abs(wanted))
        assert error.max() <= TOLERANCE, f"{error.max() / EPS:.3g} eps"
