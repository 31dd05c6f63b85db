"""Decoding attention for TPUs, in Pallas."""
