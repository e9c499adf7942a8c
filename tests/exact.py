"""Rows of logits and what 50-digit arithmetic makes of them."""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import ml_dtypes
import mpmath
import numpy as np

# 50 digits of a number as small as 1 - p where p is nearly 1: exp(-80) takes 35 more.
mpmath.mp.dps = 90

DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
EPS = {name: float(ml_dtypes.finfo(dtype).eps) for name, dtype in DTYPES.items()}


def rows(dtype: str) -> dict[str, np.ndarray]:
    """The table of rows: random, tied, offset, saturated, masked; n from 1 to 5000.

    Few lengths, for each one is compiled.
    """
    rng = np.random.default_rng(0)
    table = {
        "two equal": np.zeros(2),
        "all tied": np.full(1000, 0.7),
        "two tied tops": np.array([3.0, 3.0, -1.0, 0.5, 2.0]),
        "tied tops, saturated": np.array([30.0, 30.0, 0.0, 1.0, -2.0]),
        "near tie": np.array([1.0, 1.0 + 1e-6, 0.0]),
        "iris": np.array([1.43, -0.40, 0.23]),
        "-inf entries": np.array([-np.inf, 2.0, -np.inf, 0.5, -np.inf]),
        "one finite": np.array([-np.inf, 5.0, -np.inf]),
        "one class": np.array([3.7]),
        "negative": -np.abs(rng.normal(size=50)) * 5 - 3,
        "lse near 0": np.log(rng.dirichlet(np.ones(20))),
    }
    for n in (2, 3, 10, 128, 1000, 5000):
        table[f"random n={n}"] = 2 * rng.normal(size=n)
    for gap in (5, 8, 10, 15, 17, 20, 30, 40, 50, 60, 70, 80):
        table[f"gap {gap}"] = np.array([gap, 0.0, 0.0])
        table[f"gap {gap}, spread"] = np.concatenate([[gap], rng.normal(size=9) - 2])
    if dtype in ("float32", "float64"):
        for offset in (1e4, -1e4, 1e6, -1e6):
            table[f"offset {offset:g}"] = offset + 2 * rng.normal(size=50)
            table[f"offset {offset:g}, saturated"] = offset + np.array([25.0, 0.0, 1.0, -3.0, 2.0])
        table["saturated n=1000"] = np.concatenate([[24.0], rng.normal(size=999)])
    return {name: row.astype(DTYPES[dtype]) for name, row in table.items()}


@dataclass(frozen=True)
class Exact:
    """One row, with every quantity as a list or a number of 50 digits."""

    row: np.ndarray

    @cached_property
    def x(self) -> list:
        return [mpmath.mpf(float(v)) for v in self.row]

    @cached_property
    def top(self):
        return max(self.x)

    @cached_property
    def exponentials(self) -> dict:
        """Those of the values of the row, each made once."""
        # exp(-inf) is 0; an argument beyond 1e5 digits would take for ever.
        exp = lambda v: mpmath.exp(v - self.top) if v > -mpmath.inf else mpmath.mpf(0)
        return {v: exp(v) for v in set(self.x)}

    @cached_property
    def total(self):
        return mpmath.fsum(self.exponentials[v] for v in self.x)

    @cached_property
    def p(self) -> list:
        p = {v: e / self.total for v, e in self.exponentials.items()}
        return [p[v] for v in self.x]

    @cached_property
    def logsumexp(self):
        return self.top + mpmath.log(self.total)

    @cached_property
    def log_p(self) -> list:
        return [v - self.logsumexp for v in self.x]

    @cached_property
    def gaps(self) -> np.ndarray:
        """Maximum minus entry; 0 for an entry of -inf."""
        return np.array([float(self.top - v) if v > -mpmath.inf else 0.0 for v in self.x])

    def rounded(self, numbers: list) -> np.ndarray:
        """Exact numbers to compare with results of the row's dtype, 11 bits longer or more.

        numpy subtracts them a hundred times as fast as the 50 digits.
        """
        if self.row.dtype != np.float64:
            return np.array([float(a) for a in numbers])
        if np.finfo(np.longdouble).nmant < 63:
            return np.array(numbers, object)
        high = [float(a) for a in numbers]
        low = [float(a - b) if isfinite(b) else 0.0 for a, b in zip(numbers, high, strict=True)]
        return np.array(high, np.longdouble) + np.array(low, np.longdouble)

    def jacobian_product(self, v: np.ndarray) -> tuple[list, np.ndarray]:
        """J v, and the scale p_i Σ_j p_j |v_i - v_j| of its error."""
        exact_v = [mpmath.mpf(float(a)) for a in v]
        mean = mpmath.fsum(a * b for a, b in zip(self.p, exact_v, strict=True))
        product = [p * (a - mean) for p, a in zip(self.p, exact_v, strict=True)]
        return product, _spread(np.array([float(a) for a in self.p]), v)


def _spread(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """p_i Σ_j p_j |v_i - v_j|, which needs no 50 digits."""
    v = np.asarray(v, np.float64)
    if p.size <= 20_000:
        sums = [(p * np.abs(a - v)).sum() for a in v]
    else:  # sorted, prefix sums instead of n² terms; they would cancel in a saturated row
        order = np.argsort(v)
        mass, moment = np.cumsum(p[order]), np.cumsum((p * v)[order])
        below = v[order] * mass - moment
        above = (moment[-1] - moment) - v[order] * (mass[-1] - mass)
        sums = np.empty_like(p)
        sums[order] = below + above
    return p * sums
