"""Matmul with packed weights for GPUs, in Pallas."""
