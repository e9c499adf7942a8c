"""Strict JAX for every test: no silent promotion of ranks or dtypes, float64 at hand."""

import hypothesis
import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# No deadline, since the first call compiles; the same examples in every run.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
