"""Square: the whole image at one square size, its aspect ratio lost.

PaliGemma (arXiv:2407.07726, section 3.1), SigLIP, Gemma 3 without pan and scan.
"""

import dataclasses

from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import Resample


@dataclasses.dataclass(frozen=True)
class Square(Tiling):
  """One view, stretched to a square.

  Attributes:
    queries: soft tokens of the view, where they are not made of its patches one
      by one (a Q-Former's); None for `pool`'s.
  """

  tile: int = 224
  patch: int = 14
  pool: int = 1
  resample: Resample = "bicubic"
  queries: int | None = None

  def _plan(self, height, width):
    size = (self.tile, self.tile)
    patches, tokens = square(self.tile, self.patch, self.pool)
    if self.queries is not None:
      tokens = (1, self.queries)
    return Plan(
      size=(height, width), content=size, canvas=size, rows=0, columns=0,
      views=1, view=size, patches=patches, grids=(tokens,),
    )  # fmt: skip
