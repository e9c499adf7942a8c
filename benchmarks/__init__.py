"""Speed and memory of jaxsoft against jax.nn and optax: `python -m benchmarks`."""
