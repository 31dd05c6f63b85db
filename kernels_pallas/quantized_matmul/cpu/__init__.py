"""Products with packed weights for CPUs, in C++."""

from kernels_pallas.quantized_matmul.cpu.cpu import (
  ISAS,
  LIBRARY,
  TARGET,
  available,
  cpu_matmul,
  supports,
)

__all__ = [
  "ISAS",
  "LIBRARY",
  "TARGET",
  "available",
  "cpu_matmul",
  "supports",
]
