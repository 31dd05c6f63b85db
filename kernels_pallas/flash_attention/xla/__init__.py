"""FlashAttention in plain JAX: blockwise, on any device."""
