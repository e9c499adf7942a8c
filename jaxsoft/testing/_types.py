"""How `jaxsoft.testing` works: errors in eps, the modes, the exact blocks, and what is reported.

A block is an array that a mode returns under a name: a value, a product with the Jacobian, or a
partial derivative of one result by one argument.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64

Wide = Float64[np.ndarray, "..."]
Named = dict[str, Any]
# A function of differentiated leaves and of held leaves that returns its floating leaves, by name.
Function = Callable[[Named, Named], Named]
