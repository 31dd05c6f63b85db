"""Overlapping tiles: each keeps its own cells of one map, after a whole view.

Molmo (arXiv:2409.17146, section 2; allenai/molmo, `model_preprocessor.py`) and
Molmo 2, which stretches where Molmo pads.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Int32

from research.errors import UserError
from research.vlm.images.plan import Plan, Tiling
from research.vlm.images.resize import (
  Pixels,
  Resample,
  Size,
  pad_centred,
  resize,
)


@dataclasses.dataclass(frozen=True)
class Overlap(Tiling):
  """The whole image, then tiles that overlap by their margins, row by row.

  Every patch of the canvas counts once: a tile's margins belong to its
  neighbours, save at the canvas's edge. `groups` says which patches a soft
  token pools.

  Molmo resizes in floats and keeps them; our uint8 is within one level of it.

  Attributes:
    max_tiles: tiles, at most, besides the whole view.
    margins: patches of a tile, left or above and right or below, that others
      have as well.
    fit: `pad` keeps the aspect ratio, with black around; `stretch` fills.
  """

  tile: int = 336
  max_tiles: int = 12
  margins: tuple[int, int] = (4, 4)
  patch: int = 14
  pool: int = 2
  resample: Resample = "bilinear"
  fit: Literal["pad", "stretch"] = "pad"

  def __post_init__(self):
    if self.tile % self.patch or min(self.margins) < 0 or self._window < 1:
      raise UserError(
        f"Overlap: tile {self.tile}, patch {self.patch}, margins "
        f"{self.margins}: expected a multiple of patch that is larger than "
        "both margins, which count patches"
      )

  @property
  def _window(self) -> int:
    """Patches of a tile that no other one has."""
    return self.tile // self.patch - sum(self.margins)

  def _plan(self, height, width):
    margin = sum(self.margins) * self.patch
    step = self._window * self.patch
    rows, columns = best_grid(
      height - margin, width - margin, step, self.max_tiles
    )
    canvas = (rows * step + margin, columns * step + margin)
    side = self.tile // self.patch
    return Plan(
      size=(height, width), content=self._content((height, width), canvas),
      canvas=canvas, rows=rows, columns=columns, views=1 + rows * columns,
      view=(self.tile, self.tile), patches=(side, side),
      grids=(self._pooled((side, side)), self._pooled(self._patches(canvas))),
    )  # fmt: skip

  def _views(self, image, plan):
    canvas = self._fitted(image, plan.canvas)
    step = self._window * self.patch
    tiles = [
      canvas[y * step : y * step + self.tile, x * step : x * step + self.tile]
      for y in range(plan.rows)
      for x in range(plan.columns)
    ]
    return np.stack([self._fitted(image, plan.view), *tiles])

  def _fitted(self, image: Pixels, size: Size) -> Pixels:
    content = self._content(image.shape[:2], size)
    return pad_centred(resize(image, content, self.resample), size)

  def _content(self, size: Size, canvas: Size) -> Size:
    if self.fit == "stretch":
      return canvas
    # In float32, as Molmo was trained: it decides by a pixel, rarely.
    sides = np.float32(size)
    height, width = sides * np.min(np.float32(canvas) / sides)
    return max(1, int(height)), max(1, int(width))

  def _patches(self, canvas: Size) -> Size:
    return canvas[0] // self.patch, canvas[1] // self.patch

  def _pooled(self, patches: Size) -> Size:
    return math.ceil(patches[0] / self.pool), math.ceil(patches[1] / self.pool)

  def groups(self, plan: Plan) -> Int32[np.ndarray, "S G"]:
    """Returns the patches, pool x pool, that each soft token pools.

    Indices into all views' patches, `[views * patches]`; -1 where a group
    reaches over the edge.
    """
    high, wide = plan.patches
    whole = np.arange(high * wide, dtype=np.int32).reshape(high, wide)
    before, after = self.margins
    index = high * wide + np.arange(
      plan.rows * plan.columns * high * wide, dtype=np.int32
    ).reshape(plan.rows, plan.columns, high, wide)
    lines = [
      np.concatenate(
        [
          index[y, x][
            before * (y > 0) : high - after * (y < plan.rows - 1),
            before * (x > 0) : wide - after * (x < plan.columns - 1),
          ]
          for x in range(plan.columns)
        ],
        axis=1,
      )
      for y in range(plan.rows)
    ]
    maps = whole, np.concatenate(lines)
    return np.concatenate([grouped(map_, self.pool) for map_ in maps])


def grouped(
  index: Int32[np.ndarray, "H W"], pool: int
) -> Int32[np.ndarray, "S G"]:
  """Returns a map's groups, row by row; an odd map is padded all around.

  Args:
    index: numbers of patches; -1 for none.
    pool: patches of a group, each way.
  """
  odd = [-side % pool for side in index.shape]
  margins = [(short // 2, short - short // 2) for short in odd]
  index = np.pad(index, margins, constant_values=-1)
  rows, columns = index.shape[0] // pool, index.shape[1] // pool
  groups = index.reshape(rows, pool, columns, pool).swapaxes(1, 2)
  return groups.reshape(rows * columns, pool * pool)


def best_grid(height: int, width: int, step: int, most: int) -> Size:
  """Returns (rows, columns) that enlarge the image least; else shrink it least.

  An image no larger than the margins has sides of 0 or less here, for which the
  published arithmetic is kept: the smallest grid, or the other side decides.
  """
  sides = range(1, most + 1)
  grids = [(i, j) for i in sides for j in sides if i * j <= most]
  grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
  canvases = (np.array(grids, np.int32) * np.int32(step)).astype(np.float32)
  with np.errstate(divide="ignore"):
    scales = (canvases / np.float32([height, width])).min(axis=-1)
  if (scales < 1).all():
    return grids[int(scales.argmax())]
  return grids[int(np.where(scales < 1, np.float32(10e9), scales).argmin())]
