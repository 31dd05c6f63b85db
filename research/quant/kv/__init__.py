"""Quantized KV cache: grids, the cache, its errors and its memory."""
