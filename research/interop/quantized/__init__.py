"""Weights that other programs have quantized, read and written."""

from research.interop.quantized.read import (
  CONFIG,
  FILES,
  METHODS,
  PackedTensor,
  Tensor,
  config_of,
  is_quantized,
  joined,
  open_modules,
  opened,
  stack,
  without_zero_biases,
)

__all__ = [
  "CONFIG",
  "FILES",
  "METHODS",
  "PackedTensor",
  "Tensor",
  "config_of",
  "is_quantized",
  "joined",
  "open_modules",
  "opened",
  "stack",
  "without_zero_biases",
]
