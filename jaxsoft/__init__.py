"""Softmax and everything its derivative touches, for JAX."""

from jaxsoft._autodiff import jvp_from_vjp as jvp_from_vjp
from jaxsoft._information import entropy as entropy
from jaxsoft._information import kl_divergence as kl_divergence
from jaxsoft._jacobian import SimplexJacobian as SimplexJacobian
from jaxsoft._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from jaxsoft._logarithms import log_softmax as log_softmax
from jaxsoft._logsumexp import logsumexp as logsumexp
from jaxsoft._losses import cross_entropy as cross_entropy
from jaxsoft._products import softmax_derivative as softmax_derivative
from jaxsoft._products import softmax_jvp as softmax_jvp
from jaxsoft._products import softmax_vjp as softmax_vjp
from jaxsoft._softmax import softmax as softmax
from jaxsoft._softmax_jacobian import softmax_and_jacobian as softmax_and_jacobian
from jaxsoft._softmax_jacobian import softmax_jacobian as softmax_jacobian

__version__ = "0.1.0"
