"""FlashAttention for TPUs, in Pallas."""
