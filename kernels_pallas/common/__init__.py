"""What kernels share: chips, platforms, the C++ build, memory."""
