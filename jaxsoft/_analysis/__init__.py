"""The parts of `jaxsoft.analysis`: each goes from logits through the structured Jacobian."""
