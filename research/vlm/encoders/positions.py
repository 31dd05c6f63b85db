"""Learned position embeddings of image patches, and their resampling."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from scipy import ndimage

from research import weights
from research.typing import Array, Float, Int


class PositionTable(nn.Module):
  """One learned vector per cell of a grid.

  Attributes:
    rows, columns: of the grid.
    kernel_init: initialiser of the table.
  """

  rows: int
  columns: int
  kernel_init: Callable[..., Array] = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(
    self, coordinates: Int[Array, "B N 2"], width: int, class_token: bool
  ) -> Float[Array, "B M D"]:
    """Returns the vectors at `coordinates`, after that of the class token.

    Args:
      coordinates: row and column of each patch; -1 for padding.
      width: D.
      class_token: whether the table starts with a vector for a class token.
    """
    count = self.rows * self.columns + class_token
    table = weights.weight(self, "table", self.kernel_init, (count, width))
    index = coordinates[..., 0] * self.columns + coordinates[..., 1]
    index = jnp.maximum(index, 0) + class_token
    if class_token:
      index = jnp.pad(index, ((0, 0), (1, 0)))
    return weights.take(table, index)


Resize = Callable[[np.ndarray, int, int], np.ndarray]
"""`resize(grid [R, C, D], rows, columns) -> [rows, columns, D]`, in fp32."""


def corner_aligned(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Bilinear, corners on corners, as big_vision resizes its tables."""
  zoom = rows / grid.shape[0], columns / grid.shape[1], 1
  return ndimage.zoom(grid.astype(np.float32), zoom, order=1)


def bicubic(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Bicubic without antialiasing, as transformers interpolates its tables.

  The kernel is Keys' with a = -0.75 (`torch.nn.functional.interpolate` with
  `align_corners=False`), and samples outside of the grid repeat its edge.
  """

  def along(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    weight = _cubic_weights(x.shape[axis], size)
    return np.moveaxis(np.tensordot(weight, x, (1, axis)), 0, axis)

  wide = grid.astype(np.float64)
  return along(along(wide, 0, rows), 1, columns).astype(np.float32)


def _cubic_weights(old: int, new: int) -> np.ndarray:
  """Returns the `[new, old]` matrix of a bicubic resize along one axis."""
  at = (np.arange(new) + 0.5) * old / new - 0.5
  first, a = np.floor(at).astype(int), -0.75
  out = np.zeros((new, old))
  for tap in range(-1, 3):
    x = np.abs(at - (first + tap))
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    value = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    np.add.at(out, (np.arange(new), np.clip(first + tap, 0, old - 1)), value)
  return out


def resized(
  table: Float[np.ndarray, "N D"] | jax.Array,
  old: tuple[int, int],
  new: tuple[int, int],
  resize: Resize,
  class_token: bool = False,
) -> np.ndarray:
  """Returns a position table for another grid.

  Args:
    table: `[old rows * old columns (+ 1), D]`.
    old: rows and columns of its grid.
    new: rows and columns of the new grid.
    resize: `corner_aligned` or `bicubic`.
    class_token: whether its first row is a class token's, which is kept.
  """
  table = np.asarray(table)
  first, rest = table[: int(class_token)], table[int(class_token) :]
  grid = resize(rest.reshape(*old, -1), *new)
  return np.concatenate([first, grid.reshape(new[0] * new[1], -1)])
