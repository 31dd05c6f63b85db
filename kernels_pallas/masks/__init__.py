"""Attention masks, and which tiles of queries and keys they leave visible."""

from kernels_pallas.masks.interval_masks import (
  autoregressive_blocks,
  bidirectional_tokens,
  image_blocks,
  latest_image,
  message_tree,
  prefix_blocks,
  tree_positions,
)
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
  "autoregressive_blocks",
  "bidirectional_tokens",
  "image_blocks",
  "latest_image",
  "message_tree",
  "prefix_blocks",
  "slice_axis",
  "tree_positions",
]
