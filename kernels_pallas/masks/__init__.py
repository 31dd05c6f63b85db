"""What may see what, and which tiles hold any of it."""

from kernels_pallas.masks.masks import (
  Mask,
  Segments,
  Tile,
  Window,
  cut,
)

__all__ = [
  "Mask",
  "Segments",
  "Tile",
  "Window",
  "cut",
]
