"""The divergence of tokens from sums over the classes of two models.

The statistics of both models come first; the sums are relative to them, as in `kl_divergence`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.devices import Mesh
from jaxsoft._functions import kl_divergence
from jaxsoft._functions.kl_divergence import Sums
from jaxsoft._linear.chunks import Found
from jaxsoft._linear.operands import Classes, Layer, PerModel, Tokens
from jaxsoft._rows import statistics
from jaxsoft._rows.logits import gaps_of_rows
from jaxsoft._rows.statistics import Row

RowPair = tuple[Row, Row]  # of p and of q: largest logits, and Z - 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Divergences:
    """KL(p ‖ q) of the first model and the second, as a `Loss`."""

    @property
    def relative(self) -> bool:
        """The statistics of both models come first."""
        return True

    def nothing(self, tokens: Tokens, layer: Layer) -> RowPair:
        """The statistics of no class."""
        row = statistics.of_no_entry(jnp.zeros(tokens.length, layer.dtype))
        return row, row

    def extended(
        self, so_far: RowPair, logits: PerModel, tokens: Tokens, classes: Classes
    ) -> RowPair:
        """With a chunk of classes more."""
        t = tokens.temperature
        p, q = (
            statistics.united(row, statistics.of_scaled(u, t), t)
            for row, u in zip(so_far, logits, strict=True)
        )
        return p, q

    def of_devices(self, part: RowPair, tokens: Tokens, layer: Layer, mesh: Mesh) -> RowPair:
        """Of all classes from those on each device."""
        p, q = (statistics.of_devices(row, mesh, tokens.temperature) for row in part)
        return p, q

    def found(self, so_far: RowPair) -> Found:
        """The statistics, and the sums of no class."""
        none = jnp.zeros_like(so_far[0].rest)
        return Found(so_far, Sums(none, none, none))

    def sums(self, logits: PerModel, constants: RowPair, tokens: Tokens, classes: Classes) -> Sums:
        """What a chunk of classes adds."""
        t, (z, w), (p, q) = tokens.temperature, logits, constants
        if t is not None:
            z, w = gaps_of_rows(z, p.top, t), gaps_of_rows(w, q.top, t)
            none = jnp.zeros_like(p.top)
            p, q = Row(none, p.rest), Row(none, q.rest)
        return kl_divergence.sums(z, w, p, q, ClassAxis(1))

    def loss(self, found: Found, tokens: Tokens, layer: Layer, mesh: Mesh | None) -> Array:
        """The divergence of each token."""
        out = kl_divergence.divergence_of(found.sums, *found.constants)
        return out if tokens.ignored is None else jnp.where(tokens.ignored, 0, out)
