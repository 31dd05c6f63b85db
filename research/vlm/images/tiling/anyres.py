"""AnyRes: the best of a few canvases, padded and cut, after a whole view.

LLaVA-NeXT (LLaVA 1.6; `select_best_resolution` and `unpad_image` of LLaVA's
`mm_utils.py` and `llava_arch.py`).
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Int32

from research.errors import UserError
from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import (
  Resample,
  Size,
  cut,
  pad_centred,
  resize,
)

LLAVA_NEXT = (
  (336, 672),
  (672, 336),
  (672, 672),
  (1008, 336),
  (336, 1008),
)


@dataclasses.dataclass(frozen=True)
class AnyRes(Tiling):
  """A whole view first, then the tiles of a padded canvas, row by row.

  The tiles' features are joined to one map; its rows that are padding alone are
  cut off, and each row that is left ends with a learned vector (`sources`).

  Attributes:
    canvases: (height, width) of those to choose from, whole tiles each.
  """

  tile: int = 336
  canvases: tuple[Size, ...] = LLAVA_NEXT
  patch: int = 14
  pool: int = 1
  resample: Resample = "bicubic"

  def __post_init__(self):
    for canvas in self.canvases:
      if min(canvas) < 1 or any(side % self.tile for side in canvas):
        raise UserError(
          f"AnyRes: a canvas of {canvas} (height, width), expected multiples "
          f"of tile, {self.tile}"
        )

  def _plan(self, height, width):
    canvas = best_canvas(height, width, self.canvases)
    rows, columns = canvas[0] // self.tile, canvas[1] // self.tile
    patches, whole = square(self.tile, self.patch, self.pool)
    kept = _unpadded((height, width), (whole[0] * rows, whole[1] * columns))
    return Plan(
      size=(height, width), content=_fitted(height, width, canvas),
      canvas=canvas, rows=rows, columns=columns, views=1 + rows * columns,
      view=(self.tile, self.tile), patches=patches, grids=(whole, kept),
      row_ends=kept[0],
    )  # fmt: skip

  def _views(self, image, plan):
    whole = resize(image, plan.view, self.resample)
    content = resize(image, plan.content, self.resample)
    tiles = cut(pad_centred(content, plan.canvas), self.tile)
    return np.concatenate([whole[None], tiles])

  def sources(self, plan: Plan) -> Int32[np.ndarray, "T"]:
    """Returns which feature each soft token is.

    An index into the views' pooled features, `[views * tokens]`; -1 is the
    learned vector that ends a row.
    """
    (height, width), (kept_height, kept_width) = plan.grids
    index = height * width + np.arange(
      plan.rows * plan.columns * height * width, dtype=np.int32
    )
    index = index.reshape(plan.rows, plan.columns, height, width)
    index = index.swapaxes(1, 2).reshape(plan.rows * height, -1)
    # What is cut off is even, so that both margins are equal.
    top = (index.shape[0] - kept_height) // 2
    left = (index.shape[1] - kept_width) // 2
    index = index[top : top + kept_height, left : left + kept_width]
    ended = np.pad(index, ((0, 0), (0, 1)), constant_values=-1)
    whole = np.arange(height * width, dtype=np.int32)
    return np.concatenate([whole, ended.reshape(-1).astype(np.int32)])


def best_canvas(height: int, width: int, canvases: tuple[Size, ...]) -> Size:
  """Returns the canvas that shows most of the image, and wastes least of those.

  Pixels that enlargement would invent do not count as shown.
  """

  best, most = canvases[0], (-1, 0)
  for canvas in canvases:
    scale = min(canvas[1] / width, canvas[0] / height)
    shown = int(width * scale) * int(height * scale)
    shown = min(shown, width * height)
    worth = shown, shown - canvas[0] * canvas[1]
    if worth > most:
      best, most = canvas, worth
  return best


def _fitted(height: int, width: int, canvas: Size) -> Size:
  """Returns the largest size of the image's shape inside of the canvas."""
  across, down = canvas[1] / width, canvas[0] / height
  if across < down:
    return min(math.ceil(height * across), canvas[0]), canvas[1]
  return canvas[0], min(math.ceil(width * down), canvas[1])


def _unpadded(size: Size, grid: Size) -> Size:
  """Returns how much of a padded map of features the image covers.

  Rounding to seven digits decides by a row, and model and processor have to do
  the same arithmetic: transformers issues 34522 and 35775.
  """
  (height, width), (rows, columns) = size, grid
  if width / height > columns / rows:
    kept = int(round(height * (columns / width), 7))
    return rows - (rows - kept) // 2 * 2, columns
  kept = int(round(width * (rows / height), 7))
  return rows, columns - (columns - kept) // 2 * 2
