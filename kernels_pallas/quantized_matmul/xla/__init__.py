"""Matmul with packed weights in plain JAX."""

from kernels_pallas.quantized_matmul.xla.matmul import (
  PIECE,
  xla_input_gradient,
  xla_matmul,
)

__all__ = [
  "PIECE",
  "xla_input_gradient",
  "xla_matmul",
]
