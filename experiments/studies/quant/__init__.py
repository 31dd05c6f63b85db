"""Studies of quantized weights and caches."""
