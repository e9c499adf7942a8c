"""What was measured, and on what: the device, the versions, the date and the command."""

import datetime
import importlib.util
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version

import jax

import jaxsoft

# By the name that is imported the name that is installed; jax.nn is there with jax.
PEERS = {
    "optax": "optax",
    "scipy": "scipy",
    "torch": "torch",
    "tokamax": "tokamax",
    "tunix": "google-tunix",
    "jaxopt": "jaxopt",
    "entmax": "entmax",
}


def missing() -> list[str]:
    """The peers that are not installed, and so are left out."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def header(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values, for the top of the results."""
    device = jax.devices()[0]
    kind = f"CPU, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    absent = missing()
    installed = [package for name, package in PEERS.items() if name not in absent]
    packages = [
        f"jaxsoft {jaxsoft.__version__}",
        *(f"{package} {version(package)}" for package in ("jax", "jaxlib", *installed)),
    ]
    return [
        ("date", datetime.date.today().isoformat()),
        ("device", kind),
        ("versions", ", ".join((*packages, f"Python {platform.python_version()}"))),
        ("left out, not installed", ", ".join(absent) or "none"),
        ("command", shlex.join(("python", "-m", "benchmarks", *argv))),
    ]
