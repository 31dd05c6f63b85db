"""Matmul with packed weights for CPUs, in C++."""

from kernels_pallas.quantized_matmul.cpu.matmul import (
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
