"""Softmax and everything its derivative touches, for JAX.

Functions of logits:
    softmax, log_softmax, logsumexp   drop-ins for `jax.nn`, exact where one logit is far ahead
    entropy, kl_divergence            in nats, from the logits
    cross_entropy                     class ids or target probabilities

Sparse relatives of softmax, whose small probabilities are exactly 0:
    sparsemax, entmax                 alpha = 2; any alpha from softmax (1) on, which may be learned
    entmax_loss                       what cross-entropy is for softmax, with a margin

Of segments of the first axis, for graphs and ragged batches:
    segment_softmax, segment_log_softmax, segment_logsumexp

Of a linear layer x @ w, in chunks that never hold the logits:
    linear_cross_entropy              the loss of a language model; with LossStatistics
    linear_log_probs                  TokenStatistics: log-probabilities, entropy, argmax
    linear_kl_divergence              of a student from its teacher

Attention:
    dot_product_attention             a drop-in for `jax.nn` that never holds the weights

The Jacobian of softmax:
    softmax_jvp, softmax_vjp, softmax_derivative   products and entries, from probabilities
    softmax_jacobian, softmax_and_jacobian         an operator of n numbers, from logits
    entmax_jacobian                                that of entmax, on its support
    SimplexJacobian                                norms, spectrum, inverse, factors, samples

Rules of differentiation:
    jvp_from_vjp                      makes a `jax.custom_vjp` function differentiable in every mode

Submodules, imported when they are first asked for:
    jaxsoft.testing                   checks of a function in every differentiation mode
    jaxsoft.analysis                  what the Jacobians say about examples and models
    jaxsoft.plot, jaxsoft.lineax      figures; a lineax operator (need matplotlib, lineax)
"""

import importlib
from typing import Any

from jaxsoft._attention.dot_product_attention import (
    dot_product_attention as dot_product_attention,
)
from jaxsoft._core.autodiff import jvp_from_vjp as jvp_from_vjp
from jaxsoft._functions.cross_entropy import cross_entropy as cross_entropy
from jaxsoft._functions.entmax import entmax as entmax
from jaxsoft._functions.entmax import sparsemax as sparsemax
from jaxsoft._functions.entmax_loss import entmax_loss as entmax_loss
from jaxsoft._functions.entropy import entropy as entropy
from jaxsoft._functions.kl_divergence import kl_divergence as kl_divergence
from jaxsoft._functions.log_softmax import log_softmax as log_softmax
from jaxsoft._functions.logsumexp import logsumexp as logsumexp
from jaxsoft._functions.products import softmax_derivative as softmax_derivative
from jaxsoft._functions.products import softmax_jvp as softmax_jvp
from jaxsoft._functions.products import softmax_vjp as softmax_vjp
from jaxsoft._functions.segments import segment_log_softmax as segment_log_softmax
from jaxsoft._functions.segments import segment_logsumexp as segment_logsumexp
from jaxsoft._functions.segments import segment_softmax as segment_softmax
from jaxsoft._functions.softmax import softmax as softmax
from jaxsoft._linear.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from jaxsoft._linear.linear_kl_divergence import linear_kl_divergence as linear_kl_divergence
from jaxsoft._linear.linear_log_probs import linear_log_probs as linear_log_probs
from jaxsoft._linear.token_losses import LossStatistics as LossStatistics
from jaxsoft._linear.token_statistics import TokenStatistics as TokenStatistics
from jaxsoft._simplex.entmax_jacobian import entmax_jacobian as entmax_jacobian
from jaxsoft._simplex.operator import SimplexJacobian as SimplexJacobian
from jaxsoft._simplex.softmax_jacobian import softmax_and_jacobian as softmax_and_jacobian
from jaxsoft._simplex.softmax_jacobian import softmax_jacobian as softmax_jacobian

__all__ = [
    "LossStatistics",
    "SimplexJacobian",
    "TokenStatistics",
    "cross_entropy",
    "dot_product_attention",
    "entmax",
    "entmax_jacobian",
    "entmax_loss",
    "entropy",
    "jvp_from_vjp",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_log_probs",
    "log_softmax",
    "logsumexp",
    "segment_log_softmax",
    "segment_logsumexp",
    "segment_softmax",
    "softmax",
    "softmax_and_jacobian",
    "softmax_derivative",
    "softmax_jacobian",
    "softmax_jvp",
    "softmax_vjp",
    "sparsemax",
]
__version__ = "0.1.0"

_SUBMODULES = ("analysis", "lineax", "plot", "testing")

# The place where users find a name is what tracebacks and `help` are to tell them.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES, "__version__"]
