"""Learned position embeddings of image patches."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

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
