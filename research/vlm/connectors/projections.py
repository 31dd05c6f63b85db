"""Connectors that treat each patch, or each small square of them, alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.nn.mlp import ACTIVATIONS, Activation
from research.nn.norm import Norm, UnitRMS
from research.typing import Array, Float, PRNGKey, UserError

Grid = tuple[int, int]
"""Rows and columns of patches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledNormal:
  """Draws a matrix so that soft tokens begin as large as a text's embeddings.

  Attributes:
    rms: root mean square of its outputs, where that of its inputs is 1.
  """

  rms: float

  def __call__(
    self, key: PRNGKey, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> Float[Array, "C D"]:
    return self.rms / shape[0] ** 0.5 * jax.random.normal(key, shape, dtype)


class Linear(nn.Module):
  """One matrix: LLaVA (Liu et al. 2023, arXiv:2304.08485) and PaliGemma.

  Attributes:
    bias: whether it has a bias.
    kernel_init: of the matrix; zeros for PaliGemma.
  """

  size: int
  bias: bool = True
  kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B N D"]:
    """Returns a soft token for each patch.

    Args:
      x: features of the patches, row by row.
    """
    del grid
    weights.weight(self, "project", self.kernel_init, (x.shape[-1], self.size))
    return weights.project(self, x, "project", self.size, self.bias)

  def tokens(self, grid: Grid) -> int:
    return grid[0] * grid[1]


class Mlp(nn.Module):
  """Two matrices with a GELU between: LLaVA-1.5 (arXiv:2310.03744).

  Attributes:
    size: width of the language model, `D`.
    hidden: inner width; None for `D`.
    activation: LLaVA's GELU is exact.
  """

  size: int
  hidden: int | None = None
  activation: Activation = "gelu"

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B N D"]:
    """Returns a soft token for each patch; arguments as for `Linear`."""
    del grid
    y = weights.project(self, x, "up", self.hidden or self.size, True)
    y = ACTIVATIONS[self.activation](y)
    return weights.project(self, y, "down", self.size, True)

  def tokens(self, grid: Grid) -> int:
    return grid[0] * grid[1]


class Squares(nn.Module):
  """Concatenates squares of patches: fewer and wider features, then `inner`.

  Pixel shuffle of Idefics3 and SmolVLM (with `Linear`), of InternVL (with a
  norm after it and `Mlp`), and Qwen2-VL's merger (with a norm before it and
  `Mlp`).

  Attributes:
    side: of a square, in patches: r.
    inner: connector of the concatenated features.
    before, after: norms of the features before and after concatenation.
  """

  side: int
  inner: Linear | Mlp
  before: Norm | None = None
  after: Norm | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    """Returns a soft token for each square; arguments as for `Linear`."""
    if self.before is not None:
      x = self.before(x)
    x = space_to_depth(x, grid, self.side)
    if self.after is not None:
      x = self.after(x)
    return self.inner(x, (grid[0] // self.side, grid[1] // self.side))

  def tokens(self, grid: Grid) -> int:
    return grid[0] * grid[1] // self.side**2


class Standardise(nn.Module):
  """`(x - bias) * scale`, by statistics of features that a file has."""

  @nn.compact
  def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
    shape = x.shape[-1:]
    bias = weights.weight(self, "bias", nn.initializers.zeros, shape)
    scale = weights.weight(self, "scale", nn.initializers.ones, shape)
    return (x - bias.astype(x.dtype)) * scale.astype(x.dtype)


class AveragePool(nn.Module):
  """The mean over squares of patches, a norm, and a matrix: Gemma 3's and 4's.

  Attributes:
    side: of a square, in patches.
    norm: of the means.
    inner: the matrix.
    factor: of the means, before all else.
    standardise: of the means, before the norm, or None.
  """

  side: int
  norm: Norm | UnitRMS
  inner: Linear
  factor: float = 1.0
  standardise: Standardise | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    """Returns a soft token for each square; arguments as for `Linear`."""
    squares = space_to_depth(x, grid, self.side)
    squares = squares.reshape(*squares.shape[:2], self.side**2, x.shape[-1])
    mean = squares.mean(axis=2)
    if self.factor != 1.0:
      mean = mean * self.factor
    if self.standardise is not None:
      mean = self.standardise(mean)
    return self.inner(
      self.norm(mean), (grid[0] // self.side, grid[1] // self.side)
    )

  def tokens(self, grid: Grid) -> int:
    return grid[0] * grid[1] // self.side**2


def space_to_depth(
  x: Float[Array, "B N C"], grid: Grid, side: int
) -> Float[Array, "B S X"]:
  """Concatenates the features of each square of patches.

  Args:
    x: features of the patches, row by row.
    side: of a square; divides both sides of the grid.

  Returns:
    `[B, N / side^2, side^2 C]`; within a square the order is row, column,
    channel.
  """
  rows, columns = grid
  if rows % side or columns % side:
    raise UserError(
      f"connector: found a grid of {rows} x {columns} patches, expected"
      f" multiples of {side}"
    )
  batch, _, channels = x.shape
  shape = batch, rows // side, side, columns // side, side, channels
  x = x.reshape(shape).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, -1, side * side * channels)
