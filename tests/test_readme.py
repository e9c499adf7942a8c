"""What the README shows is what comes out."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(code, directory):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout


def test_the_first_block_prints_what_stands_below_it(tmp_path):
    first, printed = blocks("python")[0], blocks("text")[0]
    assert len(first.splitlines()) <= 12
    assert run(first, tmp_path) == printed


def test_the_snippets_run_one_after_the_other(tmp_path):
    assert len(blocks("python")) >= 4
    assert run("\n".join(blocks("python")), tmp_path)
