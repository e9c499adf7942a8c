"""The memory that a computation takes at its peak, for a process of its own."""

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).parent.parent
_PROCESS = Path("/proc/self")


# Not by `resource.getrusage`: its peak is at first that of the process that started this one, and
# nothing takes it back to what is held now. Linux does both, and the C library hands back to it
# what was freed: else that would be used again, unseen.
def rise(compute: Callable[[], Any]) -> int | None:
    """Bytes by which the peak of the resident memory is above what is held before the call."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")  # the peak becomes what is held now
        before = _resident("VmRSS")
    except (OSError, AttributeError, TypeError, LookupError):
        return None  # Another system or C library.
    jax.block_until_ready(compute())
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(field)
    return int(found[1]) * 1024


def in_own_process(module: str, args: Sequence[str]) -> int | None:
    """What `python -m module args` prints in its last line: a number of bytes, or None."""
    command = [sys.executable, "-m", module, *args]
    ran = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {ran.stderr.strip()}")
    last = ran.stdout.split()[-1]
    return None if last == "None" else int(last)


def mebibytes(size: int | None) -> str:
    """A number of bytes, for a table."""
    return "–" if size is None else f"{size / 2**20:.0f}"
