"""nanoVLM's splitting: a whole view first, then tiles of whole tiles' size.

huggingface/nanoVLM, `data/custom_transforms.py` of October 2025.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import Resample, cut, resize


@dataclasses.dataclass(frozen=True)
class NanoVLM(Tiling):
  """The whole image, then its tiles row by row; one tile stands for both.

  The published whole view is resized in floats, so that ours, in uint8, is up
  to one level away.

  Attributes:
    longest: the longer side, in pixels, at most: whole tiles.
    resample: the filter for the canvas.
    whole_resample: the filter from there to the whole view.
    scale: `exact` makes the longer side `longest`; `shrink` never enlarges,
      beyond whole tiles.
  """

  longest: int = 2048
  tile: int = 512
  patch: int = 16
  pool: int = 4
  resample: Resample = "bicubic"
  whole_resample: Resample = "bilinear"
  scale: Literal["exact", "shrink"] = "exact"

  def _plan(self, height, width):
    longer, shorter = max(height, width), min(height, width)
    long = self.longest
    if self.scale == "shrink":
      long = min(long, math.ceil(longer / self.tile) * self.tile)
    short = math.ceil(shorter * (long / longer) / self.tile) * self.tile
    canvas = (short, long) if width >= height else (long, short)
    rows, columns = canvas[0] // self.tile, canvas[1] // self.tile
    if rows * columns == 1:
      rows = columns = 0
    views = rows * columns + 1
    patches, tokens = square(self.tile, self.patch, self.pool)
    return Plan(
      size=(height, width), content=canvas, canvas=canvas, rows=rows,
      columns=columns, views=views, view=(self.tile, self.tile),
      patches=patches, grids=(tokens,) * views,
    )  # fmt: skip

  def _views(self, image, plan):
    canvas = resize(image, plan.content, self.resample)
    if not plan.rows:
      return canvas[None]
    whole = resize(canvas, plan.view, self.whole_resample)
    return np.concatenate([whole[None], cut(canvas, self.tile)])
