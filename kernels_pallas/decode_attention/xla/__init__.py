"""Decoding attention in JAX alone, for any device."""

from kernels_pallas.decode_attention.xla.decode import (
  xla_decode,
)

__all__ = [
  "xla_decode",
]
