"""Attention masks, and which tiles of queries and keys they leave visible."""

from kernels_pallas.masks.masks import (
  Mask,
  Segments,
  Tile,
  Window,
  slice_axis,
)

__all__ = [
  "Mask",
  "Segments",
  "Tile",
  "Window",
  "slice_axis",
]
