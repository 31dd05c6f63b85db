"""Matmul with packed weights for TPUs, in Pallas."""
