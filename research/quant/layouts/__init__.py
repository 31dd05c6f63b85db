"""Memory layouts of packed weights: bytes, words, and kernels' layouts."""
