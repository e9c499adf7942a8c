"""Figures of softmax and its derivative: each function draws on an Axes and returns it."""

import importlib

try:
    importlib.import_module("matplotlib")
except ModuleNotFoundError as error:
    raise ImportError(
        'jaxsoft.plot needs matplotlib: pip install ".[plot]" in a checkout of the repository'
    ) from error

from jaxsoft.plot._flow import simplex_flow
from jaxsoft.plot._heatmap import jacobian_heatmap
from jaxsoft.plot._reliability import reliability
from jaxsoft.plot._slopes import slopes

__all__ = ["jacobian_heatmap", "reliability", "simplex_flow", "slopes"]
