"""Centre crop: the shorter side at one size, and the middle of the longer one.

CLIP (openai/CLIP, `clip.py`: Resize, CenterCrop), LLaVA-1, and stage 1 of
LLaVA-1.5.
"""

import dataclasses

from research.ranges import Ranged
from research.vlm.images.plan import Plan, Tiling, square
from research.vlm.images.resize import (
  Resample,
  centre_crop,
  resize,
  shortest_side,
)


@dataclasses.dataclass(frozen=True)
class CentreCrop(Ranged, Tiling):
  """One square view of the image's middle.

  Attributes:
    shortest: what the image's shorter side becomes, in pixels.
  """

  shortest: int = 336
  tile: int = 336
  patch: int = 14
  pool: int = 1
  resample: Resample = "bicubic"

  def __post_init__(self):
    super().__post_init__()
    self.expect("shortest", self.tile, why="nothing is padded")

  def _plan(self, height, width):
    canvas = shortest_side(height, width, self.shortest)
    patches, tokens = square(self.tile, self.patch, self.pool)
    return Plan(
      size=(height, width), content=canvas, canvas=canvas, rows=0, columns=0,
      views=1, view=(self.tile, self.tile), patches=patches, grids=(tokens,),
    )  # fmt: skip

  def _views(self, image, plan):
    return centre_crop(resize(image, plan.content, self.resample), plan.view)[
      None
    ]
