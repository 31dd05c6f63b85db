"""NaFlex: the image's own shape at the most patches that a budget allows.

SigLIP 2 (arXiv:2502.14786, section 2.4.2); after NaViT (arXiv:2307.06304).
"""

import dataclasses
import math

from research.vlm.images.plan import Plan, Tiling
from research.vlm.images.resize import Resample, Size

_PRECISION = 1e-5
_LARGEST_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class NaFlex(Tiling):
  """One view of about the image's own shape, of at most `budget` patches.

  An encoder pads the patches to `budget`; soft tokens are those of the image.

  Attributes:
    budget: patches, at most.
  """

  budget: int = 256
  patch: int = 16
  resample: Resample = "bilinear"

  @property
  def native_square(self) -> int:
    return 1

  def _plan(self, height, width):
    grid = self._grid(height, width)
    size = grid[0] * self.patch, grid[1] * self.patch
    return Plan(
      size=(height, width), content=size, canvas=size, rows=0, columns=0,
      views=1, view=size, patches=grid, grids=(grid,),
    )  # fmt: skip

  def _grid(self, height: int, width: int) -> Size:
    """Returns the patches at the largest scale within the budget.

    The scale is found by halving, as published, and each side rounded up.
    """
    low, high, best = _PRECISION / 10, _LARGEST_SCALE, (1, 1)
    while high - low >= _PRECISION:
      middle = (low + high) / 2
      rows = math.ceil(height * middle / self.patch)
      columns = math.ceil(width * middle / self.patch)
      if rows * columns <= self.budget:
        low, best = middle, (rows, columns)
      else:
        high = middle
    return best
