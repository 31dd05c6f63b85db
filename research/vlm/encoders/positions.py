"""Learned position embeddings of image patches."""

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.typing import Array, Float, Int, UserError


class PositionTable(nn.Module):
  """One learned vector per cell of a grid."""

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
    """
    count = self.rows * self.columns + class_token
    table = weights.weight(self, "table", self.kernel_init, (count, width))
    index = coordinates[..., 0] * self.columns + coordinates[..., 1]
    index = jnp.maximum(index, 0) + class_token
    if class_token:
      index = jnp.pad(index, ((0, 0), (1, 0)))
    return weights.take(table, index)


def _grid(module: Any, width: int, class_token: bool) -> Array:
  """Returns the learned grid of a module, `[rows * columns, D]`.

  Raises:
    UserError: there is a class token, which has no place in a grid.
  """
  if class_token:
    raise UserError(
      f"{type(module).__name__}: found a class token, expected patches alone"
    )
  shape = module.rows * module.columns, width
  return weights.weight(module, "table", module.kernel_init, shape)


class InterpolatedTable(nn.Module):
  """A learned grid, resampled for each image to the image's own: Qwen3-VL's.

  Bilinear, with corners on corners: the first and the last row of patches have
  those of the grid (`align_corners` of `torch.nn.functional.interpolate`).
  """

  rows: int
  columns: int
  kernel_init: Callable[..., Array] = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(
    self, coordinates: Int[Array, "B N 2"], width: int, class_token: bool
  ) -> Float[Array, "B N D"]:
    """Returns the vectors at `coordinates` of each image's own grid.

    Args:
      coordinates: row and column of each patch; -1 for padding. The largest are
        the image's last row and column.
      width: D.

    Raises:
      UserError: there is a class token, which has no place in a grid.
    """
    table = _grid(self, width, class_token)
    ends = jnp.array([self.rows, self.columns]) - 1
    last = jnp.max(coordinates, axis=1, keepdims=True)
    at = jnp.maximum(coordinates, 0).astype(jnp.float32)
    at = at * ends / jnp.maximum(last, 1)
    low = jnp.floor(at).astype(jnp.int32)
    share = at - low
    taps = [(low, 1 - share), (jnp.minimum(low + 1, ends), share)]
    out = jnp.zeros((*at.shape[:2], width), jnp.float32)
    for (rows, own), (columns, other) in itertools.product(taps, taps):
      index = rows[..., 0] * self.columns + columns[..., 1]
      share = own[..., 0] * other[..., 1]
      out = out + weights.take(table, index) * share[..., None]
    return out


class AntialiasedTable(nn.Module):
  """A learned grid, resized for each image to the image's own: NaFlex's.

  SigLIP 2 (Tschannen et al. 2025, arXiv:2502.14786), section 2.4.2. Bilinear,
  with edges on edges; where an image has fewer patches than the grid has cells,
  each is a weighted mean of several (`scale_and_translate` of `jax.image`, with
  antialiasing).
  """

  rows: int
  columns: int
  kernel_init: Callable[..., Array] = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(
    self, coordinates: Int[Array, "B N 2"], width: int, class_token: bool
  ) -> Float[Array, "B N D"]:
    """Returns the vectors at `coordinates` of each image's own grid.

    Args:
      coordinates, width, class_token: as for `InterpolatedTable`.

    Raises:
      UserError: there is a class token, which has no place in a grid.
    """
    table = _grid(self, width, class_token)
    sizes = jnp.max(coordinates, axis=1, keepdims=True) + 1
    at = jnp.maximum(coordinates, 0)
    rows, columns = (
      _shares(at[..., axis], jnp.maximum(sizes[..., axis], 1), cells)
      for axis, cells in enumerate((self.rows, self.columns))
    )
    shares = rows[..., :, None] * columns[..., None, :]
    return weights.einsum(
      "...d,df->...f", shares.reshape(*at.shape[:2], -1), table
    )


def _shares(
  at: Int[Array, "B N"], sizes: Int[Array, "B 1"], cells: int
) -> Float[Array, "B N R"]:
  """Returns how much of each cell of an axis there is in each place."""
  scale = cells / sizes
  centre = (at + 0.5) * scale - 0.5
  distance = jnp.abs(jnp.arange(cells) - centre[..., None])
  shares = jnp.maximum(1 - distance / jnp.maximum(scale, 1)[..., None], 0)
  return shares / jnp.sum(shares, axis=-1, keepdims=True)


class FactoredTable(nn.Module):
  """A learned vector per column and one per row, which are added: Gemma 4's.

  Attributes:
    size: columns, and rows, that it has vectors for.
    kernel_init: initialiser of the table: first columns, then rows.
  """

  size: int
  kernel_init: Callable[..., Array] = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(
    self, coordinates: Int[Array, "B N 2"], width: int, class_token: bool
  ) -> Float[Array, "B N D"]:
    """Returns the vectors at `coordinates`.

    Args:
      coordinates, width, class_token: as for `InterpolatedTable`.

    Raises:
      UserError: there is a class token, which is in no row and no column.
    """
    if class_token:
      raise UserError(
        "FactoredTable: found a class token, expected patches alone"
      )
    shape = 2 * self.size, width
    table = weights.weight(self, "table", self.kernel_init, shape)
    row, column = (jnp.maximum(coordinates[..., i], 0) for i in range(2))
    return weights.take(table, column) + weights.take(table, self.size + row)


Positions = PositionTable | InterpolatedTable | AntialiasedTable | FactoredTable
