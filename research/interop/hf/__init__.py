"""Directories in Hugging Face's format, read and written."""

from research.interop.hf.read import (
  DTYPES,
  Slot,
  difference,
  filler,
  model_from_directory,
  open_model,
  read_params,
  read_parts,
  slots,
  table,
  text_part,
  unread_params,
)

__all__ = [
  "DTYPES",
  "Slot",
  "difference",
  "filler",
  "model_from_directory",
  "open_model",
  "read_params",
  "read_parts",
  "slots",
  "table",
  "text_part",
  "unread_params",
]
