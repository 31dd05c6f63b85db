"""Weights that other programs have quantized, read and written."""
