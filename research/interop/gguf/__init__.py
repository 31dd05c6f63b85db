"""GGUF files, read and written."""

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
