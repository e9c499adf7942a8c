"""The functions of logits and of probabilities, a file each: function, rule and derivation."""
