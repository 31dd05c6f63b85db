"""Decoding attention for GPUs, in Pallas."""
