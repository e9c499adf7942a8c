"""`python -m tests.peers MODULE`: runs the tests in a module of another package on jaxsoft.

Those of SciPy, `scipy.special.tests.test_logsumexp`, are run by pytest, with a logsumexp that takes
and returns NumPy arrays as SciPy's does; those of all others by unittest.

This wants a process of its own: what JAX has traced and what a module has imported would outlive
a patch, and the strict settings of these tests are not those of others. It prints one line of JSON:

    run       how many tests ran
    failures  for each test that failed, the traceback
    calls     for each module that called them, how often it called which functions of jaxsoft
"""

import collections
import functools
import importlib
import inspect
import json
import os
import sys
import unittest
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsoft

# Where other packages find the functions for which jaxsoft stands in.
REPLACED = {
    "jax.nn": ("softmax", "log_softmax", "logsumexp"),
    "jax.scipy.special": ("logsumexp",),
}


def main(tested: str) -> None:
    report = of_scipy(tested) if tested.startswith("scipy.") else of_unittest(tested)
    print(json.dumps(report))


def of_unittest(tested):
    calls = replace()
    np.random.seed(0)  # noqa: NPY002  (others draw from this generator and leave it unseeded)
    # Imported only now, so that `from jax.nn import softmax` too imports that of jaxsoft.
    suite = unittest.defaultTestLoader.loadTestsFromName(tested)
    result = unittest.TextTestRunner(verbosity=0).run(suite)
    return {
        "run": result.testsRun - len(result.skipped),
        "failures": {test.id(): text for test, text in result.failures + result.errors},
        "calls": calls,
    }


def replace() -> dict[str, collections.Counter[str]]:
    """Replaces the functions of JAX; returns a table of the calls, which fills as they come."""
    calls: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def counted(name):
        function = getattr(jaxsoft, name)

        @functools.wraps(function)
        def call(*args, **kwargs):
            caller = inspect.currentframe().f_back.f_globals["__name__"]
            calls[caller][name] += 1
            return function(*args, **kwargs)

        return call

    for module, names in REPLACED.items():
        for name in names:
            setattr(importlib.import_module(module), name, counted(name))
    return calls


# By JAX's promotion, which ours follows, integers take the dtype of the others; by NumPy's, which
# these tests want, those of 32 bits and more make float64 of float32.
PROMOTED_OTHERWISE = {
    f"test_dtypes_ab[numpy-{a}-{b}]"
    for integer in ("int32", "int64")
    for other in ("float32", "complex64")
    for a, b in ((integer, other), (other, integer))
}


class OnJaxsoft:
    """A plugin of pytest that replaces the logsumexp of the modules tested, and counts."""

    def __init__(self):
        self.run, self.failures, self.calls = 0, {}, collections.defaultdict(collections.Counter)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.name not in PROMOTED_OTHERWISE]

    def pytest_collection_finish(self, session):
        # Not before: SciPy looks its own function up in a table as the module is imported.
        for module in {item.module for item in session.items}:
            module.logsumexp = functools.partial(self.logsumexp, module.__name__)

    def pytest_runtest_logreport(self, report):
        self.run += report.when == "call" and not report.skipped
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext

    def logsumexp(self, caller, a, axis=None, b=None, keepdims=False, return_sign=False):
        self.calls[caller]["logsumexp"] += 1
        out = jaxsoft.logsumexp(
            np.asarray(a), axis, None if b is None else np.asarray(b), keepdims, return_sign
        )
        # Of 0 dimensions NumPy has scalars, for which the tests look.
        return jax.tree.map(lambda x: np.asarray(x)[()], out)


def of_scipy(tested):
    import scipy

    jax.config.update("jax_enable_x64", True)
    top, plugin = Path(scipy.__file__).parent, OnJaxsoft()
    path = top.joinpath(*tested.split(".")[1:]).with_suffix(".py")
    # Neither the settings of this project nor its conftest.py.
    alone = ["-c", os.devnull, f"--rootdir={top}", f"--confcutdir={top}", "-p", "no:cacheprovider"]
    pytest.main([*alone, "-q", str(path), "-k", "TestLogSumExp"], [plugin])
    return {"run": plugin.run, "failures": plugin.failures, "calls": plugin.calls}


if __name__ == "__main__":
    main(*sys.argv[1:])
