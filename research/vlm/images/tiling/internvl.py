"""InternVL's dynamic tiling: the grid of the nearest shape, then a thumbnail.

InternVL 1.5 (arXiv:2404.16821, section 3.3); transformers does it for InternVL
by the processor of GOT-OCR2.
"""

import dataclasses

import numpy as np

from research.ranges import PositiveInt, Ranged
from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import Resample, Size, cut, resize


@dataclasses.dataclass(frozen=True)
class InternVL(Ranged, Tiling):
  """Tiles of the stretched image, row by row, then the whole image.

  Attributes:
    min_tiles: tiles, at least.
    max_tiles: tiles, at most; 12 in training, up to 40 in use. A whole view
      comes on top where there are several.
  """

  tile: int = 448
  min_tiles: PositiveInt = 1
  max_tiles: int = 12
  patch: int = 14
  pool: int = 2
  resample: Resample = "bicubic"

  def __post_init__(self):
    super().__post_init__()
    self.expect("max_tiles", self.min_tiles)

  def _plan(self, height, width):
    rows, columns = self._grid(height, width)
    canvas = (rows * self.tile, columns * self.tile)
    patches, tokens = square(self.tile, self.patch, self.pool)
    views = rows * columns + (rows * columns > 1)
    return Plan(
      size=(height, width), content=canvas, canvas=canvas, rows=rows,
      columns=columns, views=views, view=(self.tile, self.tile),
      patches=patches, grids=(tokens,) * views,
    )  # fmt: skip

  def _views(self, image, plan):
    tiles = cut(resize(image, plan.content, self.resample), self.tile)
    if plan.views == 1:
      return tiles
    whole = resize(image, plan.view, self.resample)
    return np.concatenate([tiles, whole[None]])

  def _grid(self, height: int, width: int) -> Size:
    """Returns (rows, columns) of the shape nearest to the image's.

    Of equal ones, a larger grid is taken while it has less than twice the
    image's pixels.
    """
    sides = range(1, self.max_tiles + 1)
    grids = [
      (rows, columns)
      for columns in sides
      for rows in sides
      if self.min_tiles <= rows * columns <= self.max_tiles
    ]
    best, nearest = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
      distance = abs(width / height - columns / rows)
      enlarged = 0.5 * self.tile * self.tile * rows * columns
      if distance < nearest:
        best, nearest = (rows, columns), distance
      elif distance == nearest and height * width > enlarged:
        best = (rows, columns)
    return best
