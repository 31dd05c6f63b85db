"""Attention and packed products: Pallas kernels for TPU and GPU, XLA, C++."""
