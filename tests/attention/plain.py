"""Attention as one writes it, and one query of it with 50 digits."""

from functools import cached_property

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

import tests.exact  # noqa: F401  (sets the digits)


def attention(query, key, value, bias=None, mask=None, scale=None, sink=None, softcap=None):
    """The output and the logsumexp, with all the weights."""
    groups = query.shape[-2] // key.shape[-2]
    k, v = (jnp.repeat(x, groups, -2) for x in (key, value))
    s = jnp.einsum("btnh,bsnh->bnts", query, k)
    s = s * (query.shape[-1] ** -0.5 if scale is None else scale)
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    s = s if bias is None else s + jnp.broadcast_to(bias, s.shape)
    s = s if mask is None else jnp.where(mask, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True))
    e = jnp.exp(s - top)
    total = jnp.sum(e, -1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(jnp.broadcast_to(sink, s.shape[1:2])[None, :, None, None] - top)
    out = jnp.einsum("bnts,bsnh->btnh", e / total, v)
    return out, jnp.swapaxes((top + jnp.log(total))[..., 0], 1, 2)


def visible(t, s, is_causal=False, window=None, queries=None, keys=None):
    """The mask of causality, a window and lengths, [b, 1, t, s]."""
    row, column = np.arange(t)[:, None], np.arange(s)[None]
    left, right = window if isinstance(window, tuple) else (window, window)
    see = column <= row if is_causal else np.ones((t, s), bool)
    if window is not None:
        see = see & (column >= row - left) & (column <= row + right)
    see = see[None, None]
    for lengths, place in ((queries, row), (keys, column)):
        if lengths is not None:
            see = see & (place[None, None] < np.asarray(lengths)[:, None, None, None])
    return see


class Query:
    """One query: the derivatives of c · O by its scores s and by the values, and their scales.

    The sink, if there is one, is the last key, and has the value 0.
    """

    def __init__(self, s, v, c, sink=None):
        number = lambda x: mpmath.mpf(float(x))
        self.s = [number(x) for x in s] + ([] if sink is None else [number(sink)])
        zeros = [] if sink is None else [[mpmath.mpf(0)] * len(c)]
        self.v = [[number(x) for x in row] for row in v] + zeros
        self.c = [number(x) for x in c]
        self.n = len(s)

    @cached_property
    def p(self):
        top = max(self.s)
        e = [mpmath.exp(x - top) for x in self.s]
        total = mpmath.fsum(e)
        return [x / total for x in e]

    @cached_property
    def centred(self):
        """c · (V_j - O), a sum of differences."""
        u = [mpmath.fdot(self.c, row) for row in self.v]
        return [mpmath.fdot(self.p, [a - b for b in u]) for a in u]

    @cached_property
    def distances(self):
        """Σ_k p_k ‖c‖ ‖V_j - V_k‖."""
        size = float(mpmath.norm(self.c))
        v, p = np.array(self.v, float), np.array(self.p, float)
        return size * np.linalg.norm(v[:, None] - v[None], axis=-1) @ p

    def gradient(self):
        """By the scores, and the scale of its error."""
        p = np.array(self.p, float)
        exact = [a * b for a, b in zip(self.p, self.centred, strict=True)]
        return exact[: self.n], (p * self.distances)[: self.n]

    def hessian(self):
        """By the scores twice, and the scale of its error."""
        p, d = np.array(self.p, float), self.distances
        pairs = [(i, j) for i in range(self.n) for j in range(self.n)]
        one = lambda i, j: (
            (self.p[i] * self.centred[i] if i == j else 0)
            - self.p[i] * self.p[j] * (self.centred[i] + self.centred[j])
        )
        scale = np.diag(p * d) + np.outer(p, p) * (d[:, None] + d[None])
        return [one(i, j) for i, j in pairs], scale[: self.n, : self.n].reshape(-1)

    def mixed(self):
        """By a score and a feature of a value that is 1 in c: the Jacobian of softmax."""
        pairs = [(i, j) for i in range(self.n) for j in range(self.n)]
        others = lambda i: mpmath.fsum(p for j, p in enumerate(self.p) if j != i)
        one = lambda i, j: self.p[i] * (others(i) if i == j else -self.p[j])
        exact = [one(i, j) for i, j in pairs]
        return exact, np.abs(np.array(exact, float))


def error(found, exact, scale, eps):
    """The largest error in eps of the scale."""
    found = np.asarray(found, np.float64).reshape(-1)
    differences = [abs(mpmath.mpf(a) - b) for a, b in zip(found, exact, strict=True)]
    return np.max(np.array(differences, float) / scale) / eps
