"""What the pages take from the package and the notebooks: gallery, tables of options, pictures."""

import base64
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import pictures
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import jaxsoft

ROOT = Path(__file__).parents[2]
FILES = "https://github.com/jaxsoft/jaxsoft/blob/main"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def _cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _title(path: Path) -> str:
    return "".join(_cells(path)[0]["source"]).partition("\n")[0].removeprefix("# ")


def _figures(path: Path) -> list[bytes]:
    outputs = [output for cell in _cells(path) for output in cell.get("outputs", [])]
    images = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return [base64.b64decode("".join(image)) for image in images]


def _page(path: Path) -> str:
    """The notebook, with links to headings and files as this site has them."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\]\(#([^)]+)\)", _to_heading, "".join(cell["source"]))
            text = re.sub(r"\]\(\.\./(examples/[^)]+)\)", rf"]({FILES}/\1)", text)
            cell["source"] = re.sub(r"\]\((\w+\.(?:py|json))\)", rf"]({FILES}/notebooks/\1)", text)
    return json.dumps(notebook)


def _to_heading(link: re.Match[str]) -> str:
    """Jupyter's anchor is the heading with hyphens, that of MyST has no signs and capitals."""
    return f"](#{re.sub(r'[^a-z0-9_-]', '', link[1].lower())})"


class Gallery(SphinxDirective):
    """A card for each notebook, with its richest figure."""

    def run(self) -> list[nodes.Node]:
        cards = []
        for path in NOTEBOOKS:
            title = _title(path)
            cards.append(
                f":::{{grid-item-card}} {title}\n:link: notebooks/{path.stem}\n:link-type: doc\n"
                f":img-bottom: _static/generated/{path.stem}.png\n:img-alt: {title}\n:::"
            )
        grid = "\n".join(["::::{grid} 1 2 2 3", ":gutter: 3", *cards, "::::"])
        return self.parse_text_to_nodes(grid)


class Options(SphinxDirective):
    """Which functions have which options, read off their signatures."""

    has_content = True
    option_spec: ClassVar = {"options": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        options = self.options["options"].split()
        head = "| function | " + " | ".join(f"`{option}`" for option in options) + " |"
        rows = [head, "|---|" + ":-:|" * len(options)]
        for name in " ".join(self.content).split():
            has = inspect.signature(getattr(jaxsoft, name)).parameters
            marks = " | ".join("✓" if option in has else "" for option in options)
            rows.append(f"| {{py:obj}}`~jaxsoft.{name}` | {marks} |")
        return self.parse_text_to_nodes("\n".join(rows))


def _generate(app: Sphinx) -> None:
    source = Path(app.srcdir)
    shutil.rmtree(source / "notebooks", ignore_errors=True)
    (source / "notebooks").mkdir()
    static = source / "_static" / "generated"
    static.mkdir(exist_ok=True)
    for path in NOTEBOOKS:
        (source / "notebooks" / path.name).write_text(_page(path), encoding="utf-8")
        (static / f"{path.stem}.png").write_bytes(max(_figures(path), key=len))
    pictures.draw(static)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _generate, priority=100)
    app.add_directive("gallery", Gallery)
    app.add_directive("options", Options)
    return {"parallel_read_safe": True}
