"""What attention computes for each query, with its derivatives by all operands."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft._attention import contractions, scores
from jaxsoft._attention.contractions import mixed
from jaxsoft._attention.division import Division, Pair, over_pairs, query_chunk
from jaxsoft._attention.dominant import NONE, SINK, Found
from jaxsoft._attention.scores import Constants, Operands
from jaxsoft._core import devices
from jaxsoft._core.autodiff import instantiated, jvp_from_vjp, transposable, valued, values_and_live
from jaxsoft._rows.logits import product_dtype


class Rows(NamedTuple):
    """What attention computes for each query.

    Attributes:
        relative: R, the output less the value of the dominant key, or the output without one.
        log_total: log Σ exp(s_j - m) with m held fixed.
        surprisal: -log p_t of the dominant key. The same number, but with s_t for m, so that its
            derivative is a sum over the other keys: that of the logarithm of 1 plus their sum.
    """

    relative: Float[Array, "b t k g h"]
    log_total: Float[Array, "b t k g"]
    surprisal: Float[Array, "b t k g"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Live:
    """By which operands a derivative is wanted."""

    operands: Operands

    def of(self, given: Operands) -> Operands:
        """None in place of those for which there is none."""
        both = zip(given, self.operands, strict=True)
        return Operands._make(x if live else None for x, live in both)


class _Factors(NamedTuple):
    """What the probabilities of a query need besides its scores.

    Attributes:
        top: m.
        log_total: log Σ exp(s_j - m).
        dominant: the dominant key, `SINK` or `NONE`.
        complement: of the dominant key, p_t - 1.
    """

    top: Float[Array, "..."]
    log_total: Float[Array, "..."]
    dominant: Int[Array, "..."]
    complement: Float[Array, "..."]


class _Bars(NamedTuple):
    """What the cotangent of a score takes from its query: linear in the cotangents of the rows.

    Attributes:
        relative: r̄, the cotangent of R.
        added: to r̄ · V_j, for a key that is not dominant.
        at_top: the cotangent of the score of the dominant key.
    """

    relative: Float[Array, "..."]
    added: Float[Array, "..."]
    at_top: Float[Array, "..."]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows(operands: Operands, constants: Constants, found: Found, division: Division) -> Rows:
    log_total = found.row.log_normalizer
    return Rows(found.relative, log_total, log_total)


rows = jvp_from_vjp(_rows)


def _rows_fwd(operands: Any, constants: Any, found: Any, division: Division) -> tuple[Rows, Any]:
    args, (live, *_) = values_and_live((operands, constants, found))
    return rows(*args, division), (args, _Live(live))


# With c = V_t, or c = 0 without a dominant key, λ = `log_total`, σ = `surprisal` and
# p_j = exp(s_j - m - λ),
#
#     Ṙ = Σ_j p_j ṡ_j (V_j - c - R) + Σ_j w_j V̇_j,  λ̇ = Σ_j p_j ṡ_j,  σ̇ = Σ_j w_j ṡ_j
#
# where w_j is p_j, but p_t - 1 for the dominant key. The transpose is
#
#     s̄_j = p_j (r̄·(V_j - c) - r̄·R + λ̄) + w_j σ̄,   V̄_j = Σ_i w_ij r̄_i (over the queries).
#
# For the dominant key V_t - c is 0, so that s̄_t is p_t (λ̄ - r̄·R) + (p_t - 1) σ̄, and both of its
# probabilities come from σ: p_t = exp(-σ) and p_t - 1 = expm1(-σ). Nothing is subtracted from 1,
# here or in the derivatives of this rule: r̄·O, which the usual formula subtracts from r̄·V_j, is
# never formed.
def _rows_bwd(division: Division, residuals: Any, bar: Any) -> Any:
    (operands, constants, found), live = residuals
    given = rows(operands, constants, found, division)
    bar = instantiated(bar)
    r_bar = bar.relative
    mean = jnp.sum(r_bar * given.relative, -1)
    centre = jnp.sum(r_bar * dominant_values(operands, constants, found), -1)
    complement = jnp.expm1(-given.surprisal)
    factors = _Factors(found.row.top, given.log_total, found.dominant, complement)
    common = bar.log_total - mean
    at_top = jnp.exp(-given.surprisal) * common + complement * bar.surprisal
    bars = _Bars(r_bar, common + bar.surprisal - centre, at_top)

    def gradients(bars: _Bars) -> Operands:
        of_all = functools.partial(_gradients_of_pair, operands, constants, factors, division)
        of_pair = jax.checkpoint(lambda *args: live.of(of_all(*args)), prevent_cse=False)

        # What is linear is cut before the checkpoint: within it, a gradient of the gradient would
        # keep whole arrays for every pair.
        def step(sums: Operands, pair: Pair) -> tuple[Operands, None]:
            here = query_chunk(bars, pair[0], division)
            return scores.added(sums, of_pair(here, pair), pair), None

        zeros = lambda x: jnp.zeros(x.shape, mean.dtype)
        start = jax.tree.map(zeros, live.of(operands)._replace(sink=None))
        return over_pairs(step, devices.typed(start, operands.q), operands.q, division)

    sums = transposable(gradients, bars)
    if operands.sink is not None:  # one more key with the value 0
        u = -jnp.sum(r_bar * constants.offset[:, :, :, None].astype(r_bar.dtype), -1)
        s_bar, _ = _entries(operands.sink[None, None], SINK, u, factors, *bars[1:])
        sums = sums._replace(sink=jnp.sum(s_bar, (0, 1)))
    both = zip(live.of(sums), operands, strict=True)
    return Operands._make(x if x is None else x.astype(y.dtype) for x, y in both), None, None


_rows.defvjp(_rows_fwd, _rows_bwd, symbolic_zeros=True)


def _gradients_of_pair(
    operands: Operands,
    constants: Constants,
    factors: _Factors,
    division: Division,
    bars: _Bars,
    pair: Pair,
) -> Operands:
    """What a pair of chunks adds to the gradients."""
    part = scores.part(operands, constants, division, pair)
    of_products = functools.partial(scores.from_products, part=part)
    products = contractions.queries_times_keys(part.q, part.k)
    s, pullback = jax.vjp(of_products, products, part.bias, operands.scale, operands.softcap)
    r_bar = bars.relative.astype(product_dtype(part.v.dtype))
    u = mixed(contractions.queries_times_keys, r_bar, part.v)
    here = query_chunk(factors, pair[0], division)
    of_scores = jax.tree.map(scores.by_score, (here, bars.added, bars.at_top))
    key = pair[1] * division.key_chunk + lax.broadcasted_iota(jnp.int32, s.shape, s.ndim - 1)
    s_bar, weights = _entries(s, key, u, *of_scores)
    if part.see is not None:  # a query that is NaN spoils the entries of keys that it does not see
        s_bar, weights = (jnp.where(part.see, x, 0) for x in (s_bar, weights))
    products_bar, bias_bar, scale_bar, softcap_bar = pullback(s_bar)
    return Operands(
        mixed(contractions.weights_times_keys, products_bar, part.k),
        mixed(contractions.queries_times_weights, part.q, products_bar),
        mixed(contractions.queries_times_weights, r_bar, weights),
        bias_bar,
        scale_bar,
        softcap_bar,
        sink=None,
    )


def _entries(
    s: Array, key: Array | int, u: Array, factors: _Factors, added: Array, at_top: Array
) -> tuple[Array, Array]:
    """s̄ and w of the scores of keys, given u = r̄ · V_j."""
    p = jnp.exp(s - factors.top) * jnp.exp(-factors.log_total)
    is_top = key == factors.dominant
    s_bar = jnp.where(is_top, at_top, p * (u + added))
    return s_bar, jnp.where(is_top, factors.complement, p)


def dominant_values(
    operands: Operands, constants: Constants, found: Found
) -> Float[Array, "b t k g h"]:
    """c: the value of the dominant key, or sink, less the offset; 0 without one."""
    values = scores.values_at(operands, constants, found.dominant)
    return valued(jnp.where((found.dominant == NONE)[..., None], 0, values), found.value)
