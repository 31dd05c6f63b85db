"""Decoding attention for CPUs, in C++."""

from kernels_pallas.decode_attention.cpu.decode import (
  ISAS,
  LANES,
  LIBRARY,
  NO_PAGES,
  TARGET,
  available,
  cpu_decode,
  unsupported,
)

__all__ = [
  "ISAS",
  "LANES",
  "LIBRARY",
  "NO_PAGES",
  "TARGET",
  "available",
  "cpu_decode",
  "unsupported",
]
