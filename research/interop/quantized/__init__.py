"""Weights that other programs have quantized, read and written."""

from research.interop.quantized.read import (
  CONFIG,
  FILES,
  METHODS,
  PackedTensor,
  Tensor,
  is_quantized,
  open_modules,
  open_tensors,
  split_config,
  stack,
  stack_weights,
  without_zero_biases,
)

__all__ = [
  "CONFIG",
  "FILES",
  "METHODS",
  "PackedTensor",
  "Tensor",
  "split_config",
  "is_quantized",
  "stack_weights",
  "open_modules",
  "open_tensors",
  "stack",
  "without_zero_biases",
]
