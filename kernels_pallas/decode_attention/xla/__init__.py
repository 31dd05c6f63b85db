"""Decode attention in plain JAX, on any device."""

from kernels_pallas.decode_attention.xla.decode import (
  xla_decode,
)

__all__ = [
  "xla_decode",
]
