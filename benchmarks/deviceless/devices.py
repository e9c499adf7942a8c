"""Accelerators to compile for that need not be there."""

import dataclasses
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Of libtpu, which otherwise asks the network, for minutes, which machine this is.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class MissingPlugin(Exception):
    """The compiler of a device is not installed; the message says what to install."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that programs can be compiled for.

    Attributes:
        name: what it is called in the tables.
        sharding: places an argument on it.
    """

    name: str
    sharding: NamedSharding

    def argument(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An argument of a program for the device: no data."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def compile(self, function: Callable[..., Any], *args: Any) -> Any:
        """The program, compiled; it cannot run here."""
        return jax.jit(function).lower(*args).compile()


def h100() -> Device:
    """An NVIDIA H100, described in `h100.txtpb`. Nothing is tuned by trial on the device."""
    wanted = version("jaxlib")
    if _version("jax-cuda12-plugin") != wanted:  # JAX ignores any other
        raise MissingPlugin(
            f"h100: no CUDA compiler for jaxlib {wanted}; pip install jax-cuda12-plugin=={wanted}"
        )
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # it reports, many times, that there is no driver
    jax.devices()  # registers the plugin
    target = Path(__file__).with_name("h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    return _first("H100", topology)


def tpu() -> Device:
    """A TPU v5p."""
    if _version("libtpu") is None:
        raise MissingPlugin(
            f'tpu: no TPU compiler; pip install "jax[tpu]=={jax.__version__}" (Linux on x86-64)'
        )
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return _first("TPU v5p", topologies.get_topology_desc("v5p:2x2x1", "tpu"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first(name: str, topology: Any) -> Device:
    """One device of a topology."""
    mesh = Mesh(topology.devices[:1], ("x",))
    return Device(name, NamedSharding(mesh, PartitionSpec()))


DEVICES = {"h100": h100, "tpu": tpu}
