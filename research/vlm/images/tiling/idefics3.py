"""Idefics3's splitting: a grid of tiles of the enlarged image, then all of it.

Idefics3 (arXiv:2408.12637, section 3.2) and SmolVLM (arXiv:2504.05299).
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import Resample, Size, cut, resize

LARGEST = 4096
"""Longer sides are shortened to this one, whatever `longest` is."""


@dataclasses.dataclass(frozen=True)
class Idefics3(Tiling):
  """Tiles row by row, then the whole image; or the whole image alone.

  The image is resized thrice, each time to whole pixels: to `longest`, to whole
  tiles, and from there to the whole view.

  Attributes:
    longest: what the image's longer side becomes, in pixels.
    scale: `exact` makes the longer side `longest`, whatever it was, so that a
      thumbnail costs as much as a page (huggingface/smollm issue 146); `shrink`
      never enlarges, beyond whole tiles.
    splitting: `tiles`, or `none` for the whole view alone.
  """

  longest: int = 2048
  tile: int = 512
  patch: int = 16
  pool: int = 4
  resample: Resample = "lanczos"
  scale: Literal["exact", "shrink"] = "exact"
  splitting: Literal["tiles", "none"] = "tiles"

  def _plan(self, height, width):
    first = self._first(height, width)
    patches, tokens = square(self.tile, self.patch, self.pool)
    view = (self.tile, self.tile)
    canvas = view if self.splitting == "none" else self._whole_tiles(*first)
    rows, columns = canvas[0] // self.tile, canvas[1] // self.tile
    if rows * columns == 1:
      rows = columns = 0
    views = rows * columns + 1
    return Plan(
      size=(height, width), content=first, canvas=canvas, rows=rows,
      columns=columns, views=views, view=view, patches=patches,
      grids=(tokens,) * views,
    )  # fmt: skip

  def _views(self, image, plan):
    content = resize(image, plan.content, self.resample)
    canvas = resize(content, plan.canvas, self.resample)
    if not plan.rows:
      return canvas[None]
    whole = resize(canvas, plan.view, self.resample)
    return np.concatenate([cut(canvas, self.tile), whole[None]])

  def _first(self, height: int, width: int) -> Size:
    """Returns the size whose longer side is `longest`, the other one even."""
    longest = self.longest
    if self.scale == "shrink":
      longest = min(longest, max(height, width))
    aspect = width / height
    if width >= height:
      width, height = longest, int(longest / aspect)
      height += height % 2
    else:
      height, width = longest, int(longest * aspect)
      width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > LARGEST:
      height, width = int(LARGEST / aspect), LARGEST
    elif height > width and height > LARGEST:
      height, width = LARGEST, int(LARGEST * aspect)
    return max(height, 1), max(width, 1)

  def _whole_tiles(self, height: int, width: int) -> Size:
    """Returns the size with each side rounded up to tiles, the longer first."""
    aspect, tile = width / height, self.tile
    if width >= height:
      width = math.ceil(width / tile) * tile
      return math.ceil(int(width / aspect) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * aspect) / tile) * tile
