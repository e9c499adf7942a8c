"""What a softmax classifier's Jacobian says about every example, and about the model."""

from jaxsoft._analysis.attention import attention_jacobian
from jaxsoft._analysis.curvature import fisher_vp, ggn_vp
from jaxsoft._analysis.inputs import input_jacobian, input_sensitivity
from jaxsoft._analysis.report import JacobianReport, jacobian_report

__all__ = [
    "JacobianReport",
    "attention_jacobian",
    "fisher_vp",
    "ggn_vp",
    "input_jacobian",
    "input_sensitivity",
    "jacobian_report",
]
