"""A budget of soft tokens: the image's own shape, in whole pooled cells.

Gemma 4 (transformers' `Gemma4ImageProcessor`): patches of 16 pixels, pooled 3 x
3, in one of five budgets.
"""

import dataclasses
import math

from research.vlm.images.plan import Plan, Tiling
from research.vlm.images.resize import Resample, Size

GEMMA4_BUDGETS = (70, 140, 280, 560, 1120)


@dataclasses.dataclass(frozen=True)
class Budget(Tiling):
  """One view of about the image's own shape, of at most `budget` soft tokens.

  Attributes:
    budget: soft tokens, at most; Gemma 4 was trained with `GEMMA4_BUDGETS`.
  """

  budget: int = 280
  patch: int = 16
  pool: int = 3
  resample: Resample = "bicubic"

  @property
  def native_square(self) -> int:
    return self.pool

  def _plan(self, height, width):
    size = self._size(height, width)
    grid = size[0] // self.patch, size[1] // self.patch
    return Plan(
      size=(height, width), content=size, canvas=size, rows=0, columns=0,
      views=1, view=size, patches=grid,
      grids=((grid[0] // self.pool, grid[1] // self.pool),),
    )  # fmt: skip

  def _size(self, height: int, width: int) -> Size:
    """Returns whole cells each way, rounded down; a thin image has one."""
    cell = self.patch * self.pool
    pixels = self.budget * self.pool**2 * self.patch**2
    scale = math.sqrt(pixels / (height * width))
    rows = math.floor(scale * height / cell)
    columns = math.floor(scale * width / cell)
    if not rows:
      rows, columns = 1, min(width // height, self.budget)
    elif not columns:
      rows, columns = min(height // width, self.budget), 1
    return rows * cell, columns * cell
