"""Layers of an encoder that attend within square windows of patches."""

from collections.abc import Iterable

import jax.numpy as jnp

from research.nn.block import Block
from research.typing import Array, Bool, Int


class WindowedBlock(Block):
  """A layer whose patches see those of their own window: Qwen2.5-VL's.

  Bai et al. 2025 (arXiv:2502.13923), section 2.1.1. Windows start at the first
  row and column of an image; those at its ends are smaller.
  """

  side: int = 8


def window_side(block: Block) -> int:
  """Returns the side of a layer's windows; 0 if its patches see all others."""
  return block.side if isinstance(block, WindowedBlock) else 0


def windows_of(
  coordinates: Int[Array, "B N 2"], valid: Bool[Array, "B N"], side: int
) -> Int[Array, "B N"]:
  """Returns the number of each patch's window, row by row; -1 for padding."""
  row, column = coordinates[..., 0] // side, coordinates[..., 1] // side
  return jnp.where(valid, row * coordinates.shape[1] + column, -1)


def window_order(
  coordinates: Int[Array, "B N 2"],
  valid: Bool[Array, "B N"],
  blocks: Iterable[Block],
) -> Int[Array, "B N"]:
  """Returns an order in which the patches of a window follow each other.

  Attention then skips tiles of patches that have no window in common. Padding
  comes last.

  Args:
    blocks: the layers, of which one at least has windows; of several sizes the
      smallest count.
  """
  sides = set(map(window_side, blocks)) - {0}
  windows = windows_of(coordinates, valid, min(sides))
  last = jnp.iinfo(windows.dtype).max
  return jnp.argsort(jnp.where(valid, windows, last), axis=1, stable=True)
