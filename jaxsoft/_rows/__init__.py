"""The numerics of one row of logits, and the only place for what a platform does differently."""

from jaxsoft._rows import cpu as cpu  # sets its forms
from jaxsoft._rows import gpu as gpu
