"""What a softmax classifier's Jacobian says about every example, and about the model."""

from jaxsoft.analysis._curvature import fisher_vp, ggn_vp
from jaxsoft.analysis._heads import attention_jacobian
from jaxsoft.analysis._inputs import input_jacobian, input_sensitivity
from jaxsoft.analysis._report import JacobianReport, jacobian_report
from jaxsoft.analysis._sharpness import AttentionStatistics, attention_statistics

__all__ = [
    "AttentionStatistics",
    "JacobianReport",
    "attention_jacobian",
    "attention_statistics",
    "fisher_vp",
    "ggn_vp",
    "input_jacobian",
    "input_sensitivity",
    "jacobian_report",
]
