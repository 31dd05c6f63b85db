"""GGUF files, read and written.

A new architecture is a row of `architectures`; its keys are in `config`, its
names of tensors in `names`.
"""

from research.interop.gguf.container import (
  GGUF,
  MAGIC,
  Pending,
  Tensor,
  nbytes,
  open_gguf,
  write_gguf,
)

__all__ = [
  "GGUF",
  "MAGIC",
  "Pending",
  "Tensor",
  "nbytes",
  "open_gguf",
  "write_gguf",
]
