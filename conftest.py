"""Strict JAX for every test: no silent promotion of ranks or dtypes, float64 at hand."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

# Tracing makes and keeps millions of small objects; looking through them all for cycles as often as
# Python does by default takes a tenth of the time of the tests.
gc.set_threshold(100_000, 50, 50)

# Devices for the tests of many.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# No deadline, since the first call compiles; the same examples in every run.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
# Other examples in every run, and many.
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=100_000)

# Two thirds of the time of the tests is that of XLA's compiler. What asks for equality, messages
# or shapes needs no fast programs; digits, memory and what is fused are marked as `optimised`.
_UNOPTIMISED = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later ones have this compiler alone
    _UNOPTIMISED.append("--xla_cpu_use_fusion_emitters=false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of `make test`."""
    parser.addoption("--unoptimised", action="store_true", help="compile without optimisation")
    parser.addoption("--keep-programs", action="store_true", help="compiled, for next time")


def pytest_configure(config: pytest.Config) -> None:
    """Sets the flags before XLA reads them; processes that a test starts inherit them."""
    if config.getoption("--unoptimised"):
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_UNOPTIMISED])
    if config.getoption("--keep-programs") and config.cache is not None:
        # JAX finds a program again by its text, the flags and its own version.
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """The examples of the documentation run as a user runs them, in float32."""
    jax.config.update("jax_enable_x64", not isinstance(request.node, pytest.DoctestItem))
    yield
    jax.config.update("jax_enable_x64", True)


_MAPPINGS = Path("/proc/self/maps")  # a line for each
_MANY_MAPPINGS = 20_000


# A compiled program takes mappings of memory, of which Linux allows a process 65,530; beyond them
# XLA's compiler crashes. JAX keeps the programs of all tests.
@pytest.fixture(autouse=True, scope="module")
def programs() -> Iterator[None]:
    """Forgets what has been compiled, after a module with which there is too much of it."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()


# Tests that take longer than the rest together: `make test` leaves them to `make test-all`.
_SLOW = {"notebook", "example", "peer"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow by its kind."""
    for item in items:
        if _SLOW & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.slow)
