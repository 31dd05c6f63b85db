"""Native resolution: the image's own size, rounded to whole groups of patches.

Qwen2-VL (arXiv:2409.12191, section 2.1; `smart_resize`), and its successors.
"""

import dataclasses
import math

from research.errors import UserError
from research.ranges import PositiveInt, Ranged
from research.vlm.images.plan import Plan, Tiling
from research.vlm.images.resize import Resample, Size

MOST_OBLONG = 200
"""Times that one side may be the other."""


@dataclasses.dataclass(frozen=True)
class Native(Ranged, Tiling):
  """One view of the image's own shape, with a bounded number of pixels.

  Attributes:
    merge: patches, each way, that become one soft token. Their order is that
      of `patchify(view, patch, merge)`: groups follow each other.
    min_pixels: pixels, at least. Published files call it `min_pixels`, or
      `size.shortest_edge`, which is no edge.
  """

  patch: int = 14
  merge: int = 2
  min_pixels: PositiveInt = 56 * 56
  max_pixels: int = 28 * 28 * 1280
  resample: Resample = "bicubic"

  def __post_init__(self):
    super().__post_init__()
    self.expect("max_pixels", self.min_pixels)

  @property
  def native_square(self) -> int:
    return self.merge

  def _plan(self, height, width):
    if max(height, width) / min(height, width) > MOST_OBLONG:
      raise UserError(
        f"an image of {height} x {width} pixels (height x width): one side is "
        f"more than {MOST_OBLONG} times the other, crop it first"
      )
    size = self._rounded(height, width)
    grid = size[0] // self.patch, size[1] // self.patch
    return Plan(
      size=(height, width), content=size, canvas=size, rows=0, columns=0,
      views=1, view=size, patches=grid,
      grids=((grid[0] // self.merge, grid[1] // self.merge),),
    )  # fmt: skip

  def _rounded(self, height: int, width: int) -> Size:
    """Returns whole groups each way, rounded as Python does: half to even."""
    step = self.patch * self.merge
    rows, columns = round(height / step), round(width / step)
    if rows * columns * step**2 > self.max_pixels:
      beta = math.sqrt(height * width / self.max_pixels)
      rows = max(1, math.floor(height / beta / step))
      columns = max(1, math.floor(width / beta / step))
    elif rows * columns * step**2 < self.min_pixels:
      beta = math.sqrt(self.min_pixels / (height * width))
      rows = math.ceil(height * beta / step)
      columns = math.ceil(width * beta / step)
    return rows * step, columns * step
