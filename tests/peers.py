"""`python -m tests.peers MODULE`: runs the unit tests in a module of another package on jaxsoft.

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
import sys
import unittest

import numpy as np

import jaxsoft

# Where other packages find the functions for which jaxsoft stands in.
REPLACED = {
    "jax.nn": ("softmax", "log_softmax", "logsumexp"),
    "jax.scipy.special": ("logsumexp",),
}


def main(tested: str) -> None:
    calls = replace()
    np.random.seed(0)  # noqa: NPY002  (others draw from this generator and leave it unseeded)
    # Imported only now, so that `from jax.nn import softmax` too imports that of jaxsoft.
    suite = unittest.defaultTestLoader.loadTestsFromName(tested)
    result = unittest.TextTestRunner(verbosity=0).run(suite)
    report = {
        "run": result.testsRun - len(result.skipped),
        "failures": {test.id(): text for test, text in result.failures + result.errors},
        "calls": calls,
    }
    print(json.dumps(report))


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


if __name__ == "__main__":
    main(*sys.argv[1:])
