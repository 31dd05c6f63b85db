"""Learned positions for another resolution: the table on a grid of its own.

Published code does it in two ways that give other numbers. big_vision keeps
the corners of the grid in place (`scipy.ndimage.zoom(order=1)`), transformers
keeps the image's edges (`interpolate(mode="bicubic", align_corners=False)`).
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float, UserError

Interpolation = Callable[[int, int], np.ndarray]
"""Cells of an axis, new cells of it -> weights, fp64 [new, old]."""


def corner_aligned(old: int, new: int) -> np.ndarray:
  """Returns linear interpolation: first and last cell stay (big_vision).

  New cell i lies at `i (old - 1) / (new - 1)`.
  """
  at = np.arange(new) * ((old - 1) / max(new - 1, 1))
  first = np.minimum(np.floor(at).astype(int), old - 1)
  share = at - first
  weights = np.zeros((new, old))
  rows = np.arange(new)
  np.add.at(weights, (rows, first), 1 - share)
  np.add.at(weights, (rows, np.minimum(first + 1, old - 1)), share)
  return weights


def bicubic(old: int, new: int) -> np.ndarray:
  """Returns cubic convolution, cells as areas of the image (transformers).

  New cell i lies at `(i + 1/2) old / new - 1/2`; cells beyond an edge are the
  one at the edge. The kernel is that of Keys 1981 (IEEE TASSP 29, 6) with
  a = -0.75, torch's; nothing is averaged where the grid gets smaller.
  """
  at = (np.arange(new) + 0.5) * (old / new) - 0.5
  first = np.floor(at).astype(int)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    cells = np.clip(first + tap, 0, old - 1)
    share = _keys(np.abs(at - first - tap))
    np.add.at(weights, (np.arange(new), cells), share)
  return weights


def _keys(x: np.ndarray, a: float = -0.75) -> np.ndarray:
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, far)


def resized_positions(
  table: Float[Array, "N D"],
  old: tuple[int, int],
  new: tuple[int, int],
  *,
  interpolation: Interpolation = corner_aligned,
  class_token: bool = False,
) -> Float[Array, "M D"]:
  """Returns a table of positions for another grid, computed in fp32.

  Args:
    table: a vector for each cell of the grid, row by row.
    interpolation: along each axis, `corner_aligned` or `bicubic`.
    class_token: whether the table starts with a class token's vector, which
      stays as it is (CLIP).

  Raises:
    UserError: the table is of another grid.
  """
  count = old[0] * old[1] + class_token
  if len(table) != count:
    raise UserError(
      f"resized_positions: found a table of {len(table)} positions, expected"
      f" {count} for a grid of {old[0]} x {old[1]}"
    )
  if old == new:
    return table
  own, cells = table[:class_token], table[class_token:]
  rows, columns = (
    jnp.asarray(interpolation(*sides), jnp.float32)
    for sides in zip(old, new, strict=True)
  )
  grid = jnp.einsum(
    "ri,cj,ijd->rcd",
    rows,
    columns,
    cells.astype(jnp.float32).reshape(*old, -1),
    precision="highest",
  )
  resized = grid.reshape(-1, table.shape[1]).astype(table.dtype)
  return jnp.concatenate([own, resized])
