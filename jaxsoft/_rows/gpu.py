"""What accelerators do differently: their time goes into passes over memory, not exponentials."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._core.axes import ClassAxis
from jaxsoft._core.sizes import known
from jaxsoft._rows import jacobian_product, statistics
from jaxsoft._rows.jacobian_product import Probabilities, Vector, of_present
from jaxsoft._rows.logits import Logits, nan_unless
from jaxsoft._rows.statistics import Normalizer, Row, united

_GPU = ("cuda", "rocm")
_ACCELERATORS = (*_GPU, "tpu")
_ONE_KERNEL = 16_384  # the length of the longest row that XLA:GPU holds in one kernel


# XLA:GPU (jax 0.10, H100) reads a row once for a reduction of two arrays at once, and twice for the
# maximum and a sum: 1 and 2 passes over memory for logsumexp. The error grows with the number of
# entries that one thread takes after another, some tens; on a CPU that would be the row.
def row_statistics(logits: Logits, *, axis: ClassAxis) -> Row:
    """The statistics, from one reading of the logits."""
    z = logits.z
    nothing = jnp.asarray(jnp.finfo(z.dtype).min, z.dtype), jnp.asarray(-1, z.dtype)
    parts = (z, jnp.zeros_like(z))
    row = Row(*lax.reduce(parts, nothing, _united, (axis.position,)))
    if logits.sink is not None:
        row = united(row, Row(logits.sink, jnp.zeros_like(logits.sink)))
    # A row with +inf is NaN.
    return row._replace(rest=nan_unless(row.top != jnp.inf, row.rest))


def _united(a: tuple[Array, Array], b: tuple[Array, Array]) -> Row:
    return united(Row(*a), Row(*b))


# A row that fits into one kernel is read once by softmax as it stands; a longer one as above.
def normalizer(logits: Logits, *, axis: ClassAxis) -> Normalizer:
    """m and Z where the accuracy of Z - 1 does not matter."""
    if known(lambda: logits.z.shape[axis.position] <= _ONE_KERNEL, True):
        return statistics.plain_sum(logits, axis=axis)
    return row_statistics(logits, axis=axis).normalizer


# XLA:GPU makes one kernel of J v, three passes over memory in place of five (H100, jax 0.10, `make
# bench-deviceless`), if every sum meets the very array that is summed.
def product(p: Probabilities, v: Vector, *, axis: ClassAxis) -> Vector:
    """J v of rows that XLA holds in one kernel."""
    classes = p.classes
    short = known(lambda: classes.shape[-1] <= _ONE_KERNEL, False)
    one_kernel = short and axis.position == classes.ndim - 1 and p.sink is None
    total = _total_in_one_kernel if one_kernel else jacobian_product.total
    return jacobian_product.product(p, v, axis, total=total, present=of_present)


def _total_in_one_kernel(terms: list[Array], axis: ClassAxis) -> Array:
    return 0 * terms[0] + jacobian_product.total(terms, axis)


statistics.STATISTICS.lower(row_statistics, *_ACCELERATORS)
statistics.NORMALIZER.lower(normalizer, *_ACCELERATORS)
jacobian_product.PRODUCT.lower(product, *_GPU)
jacobian_product.PRODUCT_OF_FREE.lower(product, *_GPU)
