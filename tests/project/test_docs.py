"""The pages of docs/: their code prints what they show, they build, and no link is broken."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
# A block of code, and one of text if it follows at once.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
SEPARATOR = "-- the next block --"

pytestmark = [pytest.mark.docs, pytest.mark.slow]


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


WITH_CODE = [page for page in sorted((ROOT / "docs").glob("*.md")) if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_prints_what_stands_below_it(page, tmp_path):
    found = blocks(page)
    code = f"\nprint({SEPARATOR!r})\n".join(code for code, _ in found)
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    printed = ran.stdout.split(f"{SEPARATOR}\n")
    for (code, shown), got in zip(found, printed, strict=True):
        assert not shown or got == shown, code


class Targets(HTMLParser):
    """What a page refers to, and the anchors that it has."""

    def __init__(self, page):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.add(given.get("id"))
        self.links |= {given[key] for key in ("href", "src") if given.get(key)}


def test_the_pages_build_and_no_link_is_broken(tmp_path):
    options = ["--fail-on-warning", "--keep-going", "-q", "-d", tmp_path / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, ROOT / "docs", tmp_path / "html"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    written = (page for page in (tmp_path / "html").rglob("*.html") if "_static" not in page.parts)
    pages = {page: Targets(page) for page in written}
    assert len(pages) > 60
    broken = []
    for page, targets in pages.items():
        for link in targets.links:
            url = urlsplit(link)
            if url.scheme or url.netloc or link.startswith("#"):
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            anchors = pages[target].anchors if target in pages else {url.fragment}
            if not target.exists() or (url.fragment and unquote(url.fragment) not in anchors):
                broken.append(f"{page.relative_to(tmp_path)}: {link}")
    assert broken == []
