"""softmax(q kᵀ) v, in chunks of queries and keys that never hold all of the weights."""
