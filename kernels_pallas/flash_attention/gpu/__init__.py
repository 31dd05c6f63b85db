"""FlashAttention for GPUs, in Pallas: Ampere, Hopper, Blackwell."""
