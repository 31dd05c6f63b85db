"""Pad to square: margins of the mean colour, then one square size.

LLaVA-1.5, stage 2 (arXiv:2310.03744, section 3.2; `expand2square`).
"""

import dataclasses

from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import Resample, pad_centred, resize


@dataclasses.dataclass(frozen=True)
class PadToSquare(Tiling):
  """One square view of the whole image, its aspect ratio kept.

  The image is padded before it is resized, so that the margin's edge is soft.

  Attributes:
    colour: of the margins; CLIP's mean, in whole levels.
  """

  tile: int = 336
  patch: int = 14
  pool: int = 1
  resample: Resample = "bicubic"
  colour: tuple[int, int, int] = (122, 116, 104)

  def _plan(self, height, width):
    size = (self.tile, self.tile)
    patches, tokens = square(self.tile, self.patch, self.pool)
    longest = max(height, width)
    return Plan(
      size=(height, width), content=(height, width), canvas=(longest, longest),
      rows=0, columns=0, views=1, view=size, patches=patches, grids=(tokens,),
    )  # fmt: skip

  def _views(self, image, plan):
    padded = pad_centred(image, plan.canvas, self.colour)
    return resize(padded, plan.view, self.resample)[None]
