"""FlashAttention for CPUs, in C++."""

from kernels_pallas.flash_attention.cpu.attention import (
  DTYPES,
  FEWEST,
  FULL,
  ISAS,
  LIBRARY,
  CpuTiles,
  available,
  cpu_attention,
  cpu_gradients,
  unsupported,
)

__all__ = [
  "CpuTiles",
  "DTYPES",
  "FEWEST",
  "FULL",
  "ISAS",
  "LIBRARY",
  "available",
  "cpu_attention",
  "cpu_gradients",
  "unsupported",
]
