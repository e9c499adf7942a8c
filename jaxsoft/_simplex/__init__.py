"""C(s, s0) = diag(s) - s sᵀ/(Σs + s0), the Jacobian of the softmax family, in O(n)."""
