"""Square: the whole image at one square size, its aspect ratio lost.

PaliGemma (arXiv:2407.07726, section 3.1), SigLIP, Gemma 3 without pan and scan.
"""

import dataclasses

from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import Resample, resize


@dataclasses.dataclass(frozen=True)
class Square(Tiling):
  """One view, stretched to a square.

  Attributes:
    tile: the side of the view, in pixels.
    patch: the encoder's patch, in pixels.
    pool: patches, each way, that become one soft token.
    resample: the filter.
  """

  tile: int = 224
  patch: int = 14
  pool: int = 1
  resample: Resample = "bicubic"

  def _plan(self, height, width):
    size = (self.tile, self.tile)
    patches, tokens = square(self.tile, self.patch, self.pool)
    return Plan(
      size=(height, width), content=size, canvas=size, rows=0, columns=0,
      views=1, view=size, patches=patches, grids=(tokens,),
    )  # fmt: skip

  def _views(self, image, plan):
    return resize(image, plan.content, self.resample)[None]
