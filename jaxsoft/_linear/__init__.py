"""Losses of x @ w in chunks of tokens and classes, which never hold the logits."""
