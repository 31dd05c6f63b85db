"""Codes in the order that kernels read."""
