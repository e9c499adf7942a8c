"""The docstrings, written for `help` and an editor, as reStructuredText.

Their formulas and tables are blocks that stand indented after an empty line. Outside of the Google
sections these become literal blocks.
"""

import re

from sphinx.application import Sphinx

# Sections whose text is indented by the grammar of Google's style.
_SECTION = re.compile(
    r"(Args|Arguments|Attributes|Example|Examples|Note|Numerics|Raises|Returns|Yields):$"
)


def written_out(lines: list[str]) -> list[str]:
    """With a directive above each indented block that is no section's text, and |x| as it is."""
    out: list[str] = []
    in_section = in_block = in_doctest = False
    for line in lines:
        if line and not line.startswith(" "):
            in_section, in_block = bool(_SECTION.match(line)), False
        elif line.strip() and not in_section and not in_block and out and not out[-1]:
            out += [".. code-block:: text", ""]
            in_block = True
        in_doctest = bool(line.strip()) and (in_doctest or line.lstrip().startswith(">>>"))
        out.append(line if in_block or in_doctest else _escaped(line))
    return out


def _escaped(line: str) -> str:
    """A line of prose: outside of `code` a bar or an asterisk means itself."""
    prose_and_code = line.split("`")
    prose_and_code[::2] = [re.sub(r"([|*])", r"\\\1", prose) for prose in prose_and_code[::2]]
    return "`".join(prose_and_code)


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]):
    lines[:] = written_out(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    # Before napoleon, which reads what is left.
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}
