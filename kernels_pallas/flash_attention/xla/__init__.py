"""FlashAttention in JAX alone: blocks in loops, for any device."""
