"""Pan and scan: a whole view, and a row of crops of an oblong image.

Gemma 3 (arXiv:2503.19786, section 2.1), at inference.
"""

import dataclasses
import math

import numpy as np

from research.errors import UserError
from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import Resample, Size, resize


@dataclasses.dataclass(frozen=True)
class PanAndScan(Tiling):
  """The whole image as a square, then crops along its longer side.

  Attributes:
    ratio: of the sides, from which on there are crops.
    min_crop: a crop's sides, in the image's pixels, at least.
    most_crops: crops, at most.
  """

  tile: int = 896
  ratio: float = 1.2
  min_crop: int = 256
  most_crops: int = 4
  patch: int = 14
  pool: int = 4
  resample: Resample = "bilinear"

  def _plan(self, height, width):
    rows, columns = self._grid(height, width)
    patches, tokens = square(self.tile, self.patch, self.pool)
    views = 1 + rows * columns
    return Plan(
      size=(height, width), content=(height, width), canvas=(height, width),
      rows=rows, columns=columns, views=views, view=(self.tile, self.tile),
      patches=patches, grids=(tokens,) * views,
    )  # fmt: skip

  def _views(self, image, plan):
    parts = [image]
    if plan.rows:
      high, wide = self._crop(plan.size, (plan.rows, plan.columns))
      parts += [
        image[
          row * high : (row + 1) * high, column * wide : (column + 1) * wide
        ]
        for row in range(plan.rows)
        for column in range(plan.columns)
      ]
    return np.stack([resize(part, plan.view, self.resample) for part in parts])

  def _grid(self, height: int, width: int) -> Size:
    """Returns (rows, columns) of crops, one of which is 1; or (0, 0)."""
    longer, shorter = max(height, width), min(height, width)
    if longer / shorter < self.ratio:
      return 0, 0
    # Half rounds up here, as it does in the published code.
    count = min(longer // self.min_crop, math.floor(longer / shorter + 0.5))
    count = min(self.most_crops, max(2, count))
    grid = (1, count) if width >= height else (count, 1)
    crop = self._crop((height, width), grid)
    if min(crop) < self.min_crop:
      return 0, 0
    if max(crop) * (count - 1) >= longer:
      raise UserError(
        f"an image of {height} x {width} pixels (height x width): the last of "
        f"{count} crops is empty; raise min_crop, {self.min_crop}"
      )
    return grid

  def _crop(self, size: Size, grid: Size) -> Size:
    """Returns a crop's sides; the last one of a row may be narrower."""
    return math.ceil(size[0] / grid[0]), math.ceil(size[1] / grid[1])
