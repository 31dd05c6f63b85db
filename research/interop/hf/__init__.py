"""Directories in Hugging Face's format, read and written.

A family's fields of config.json are in `config`, its names of tensors in
`names`.
"""

from research.interop.hf.names import table
from research.interop.hf.read import (
  DTYPES,
  filler,
  language_model,
  mismatch,
  model_from_directory,
  open_model,
  read_params,
  read_parts,
  unread_params,
)

__all__ = [
  "DTYPES",
  "mismatch",
  "filler",
  "model_from_directory",
  "open_model",
  "read_params",
  "read_parts",
  "table",
  "language_model",
  "unread_params",
]
