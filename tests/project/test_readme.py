"""What the README shows is what comes out."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(code, directory):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout


def test_the_snippets_run_one_after_the_other(tmp_path):
    snippets, printed = blocks("python"), blocks("text")[0]
    assert len(snippets) >= 4
    assert len(snippets[0].splitlines()) <= 12
    # The first prints what stands below it.
    assert run("\n".join(snippets), tmp_path).startswith(printed)
