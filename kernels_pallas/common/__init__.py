"""Shared by all kernels: chips, platforms, the C++ build, memory, copies."""
