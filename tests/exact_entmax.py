"""Rows of entmax, and what 50-digit and rational arithmetic make of them."""

from fractions import Fraction

import mpmath
import numpy as np


def rows(n: int, alpha: float) -> dict[str, np.ndarray]:
    """Random, tied, dense and steep rows, and entries close to where they enter the support."""
    rng, edge = np.random.default_rng(n), 1 / max(alpha - 1, 0.05)
    k, middle = np.arange(n), np.where(np.arange(n) < 2, 0.0, -0.6)
    return {
        "random": 2 * rng.normal(size=n),
        "close": 0.1 * rng.normal(size=n),
        "tied": np.zeros(n),
        "two tops": np.where(k < 2, 0.0, -0.4 * edge),
        "in the middle": edge * middle,
        "steps": -edge * k / n,
        "dense at the top": -edge * (k / n) ** 8,
        "dense at the edge": -edge * (k / n) ** 0.05,
        "harmonic": -edge / (1.0 + k),
        "halves": edge * (2.0 ** -np.minimum(k, 60) - 1),
        "heavy": -np.abs(rng.standard_cauchy(size=n)),
    }


def sparsemax(row: np.ndarray) -> list[Fraction]:
    """Entries less the threshold, not cut off at 0: by the entries in descending order."""
    z = sorted(map(Fraction, row.astype(float).tolist()), reverse=True)
    total, threshold = Fraction(0), Fraction(0)
    for k, entry in enumerate(z, 1):
        total += entry
        if 1 + k * entry > total:
            threshold = (total - 1) / k
    return [Fraction(x) - threshold for x in row.astype(float).tolist()]


class Row:
    """One row of finite logits; α as the dtype has it."""

    def __init__(self, row: np.ndarray, alpha: float) -> None:
        x = [mpmath.mpf(v) for v in row.astype(float).tolist()]
        self.alpha = mpmath.mpf(alpha)
        self.z = [v - max(x) for v in x]
        self.level = self._level()
        self.p = self.at(self.level)

    def at(self, level: mpmath.mpf) -> list:
        a = self.alpha - 1
        if a == 0:
            return [mpmath.exp(v - level) for v in self.z]
        known = {}
        for v in set(self.z):
            u = 1 + a * (v - level)
            known[v] = u ** (1 / a) if u > 0 else mpmath.mpf(0)
        return [known[v] for v in self.z]

    def _level(self) -> mpmath.mpf:
        a = self.alpha - 1
        if a == 0:
            return mpmath.log(mpmath.fsum(map(mpmath.exp, self.z)))
        low, high = mpmath.mpf(0), (1 - mpmath.mpf(len(self.z)) ** -a) / a
        if a <= 1:  # from below Newton's method climbs
            low = self._roughly(float(a))
        for _ in range(6 if a <= 1 else 200):
            p = self.at(low if a <= 1 else (low + high) / 2)
            excess = mpmath.fsum(p) - 1
            if a <= 1:
                low += excess / mpmath.fsum(q ** (1 - a) for q in p if q > 0)
            else:
                low, high = ((low + high) / 2, high) if excess > 0 else (low, (low + high) / 2)
        return low

    def _roughly(self, a: float) -> mpmath.mpf:
        z = np.array([float(v) for v in self.z])
        low, high = 0.0, (1 - len(z) ** -a) / a
        for _ in range(45):
            middle = (low + high) / 2
            above = (np.maximum(1 + a * (z - middle), 0) ** (1 / a)).sum() > 1
            low, high = (middle, high) if above else (low, middle)
        return mpmath.mpf(low)

    def loss(self, label: int) -> mpmath.mpf:
        """For α = 1 that of cross-entropy."""
        gap = self.level - self.z[label]
        return gap - (1 - mpmath.fsum(q**self.alpha for q in self.p)) / self.alpha
