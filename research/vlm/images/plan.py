"""What becomes of an image of one size: the one count of its views and tokens.

A prompt's string, the number of views and the length of a sequence all follow
from a `Plan`, which follows from the image's size alone: an image's header is
enough to place it in a batch. Processors that count a second time disagree
with their models by a row (transformers issues 34522, 34625, 35775, 35779).
"""

import abc
import dataclasses

import numpy as np
from jaxtyping import Int32, UInt8

from research.errors import UserError
from research.vlm.images.resize import Pixels, Size, resize


@dataclasses.dataclass(frozen=True)
class Plan:
  """Integers that follow from an image's size. Sizes are (height, width).

  Attributes:
    size: of the image.
    content: what the image is resized to.
    canvas: `content` after padding, or before what a crop cuts off.
    rows: of tiles on the canvas; 0 where it is not cut into tiles.
    columns: of tiles; 0 with `rows`.
    views: how many images the encoder sees.
    view: the size of each.
    patches: (rows, columns) of the encoder's patches in a view.
    grids: (rows, columns) of soft tokens, in the order in which the language
      model reads them.
    row_ends: soft tokens besides: learned ends of rows, of the last grid.
  """

  size: Size
  content: Size
  canvas: Size
  rows: int
  columns: int
  views: int
  view: Size
  patches: Size
  grids: tuple[Size, ...]
  row_ends: int = 0

  @property
  def soft_tokens(self) -> int:
    """How many positions the image's features take among the text."""
    return sum(rows * columns for rows, columns in self.grids) + self.row_ends

  @property
  def encoder_tokens(self) -> int:
    """How many patches the encoder reads, over all views."""
    return self.views * self.patches[0] * self.patches[1]


@dataclasses.dataclass(frozen=True)
class Views:
  """What an encoder sees of an image, before normalisation.

  Attributes:
    pixels: uint8 `[N, H, W, 3]`. Tiles are square; of a native resolution
      there is one view, of the image's own shape.
    plan: from which they follow; it has the image's original size.
  """

  pixels: UInt8[np.ndarray, "N H W 3"]
  plan: Plan


@dataclasses.dataclass(frozen=True)
class Tiling(abc.ABC):
  """How an image becomes views; a kind is a file in `tiling/`.

  Kinds have some fields in common, all numbers of pixels but `pool`:

  Attributes:
    tile: side of a view, where all are square.
    patch: the encoder's patch.
    pool: patches, each way, that become one soft token.
    resample: the filter that resizes.
  """

  @property
  def native_square(self) -> int | None:
    """Side, in patches, of what becomes one soft token at native resolution.

    None where all views are of one size. At native resolution an image has one
    view, of a size of its own, which an encoder takes as `patches` of pixels.
    """
    return None

  def groups(self, plan: Plan) -> Int32[np.ndarray, "S G"] | None:
    """Returns the patches that each soft token pools.

    None where they are squares of one view each. Else indices into all views'
    patches, [views * patches]; -1 where a group reaches over the edge.
    """
    del plan
    return None

  def plan(self, height: int, width: int) -> Plan:
    """Returns what becomes of an image of this size.

    Raises:
      UserError: the image is empty, or of a shape that the kind refuses.
    """
    if height < 1 or width < 1:
      raise UserError(
        f"an image of {height} x {width} pixels (height x width): expected at "
        "least one; leave it out"
      )
    return self._plan(height, width)

  def views(self, image: Pixels, plan: Plan | None = None) -> Views:
    """Returns the image's views.

    Args:
      image: RGB, as `open_image` returns it.
      plan: of its size, if there is one already.
    """
    size = image.shape[:2]
    plan = plan or self.plan(*size)
    if plan.size != size:
      raise UserError(
        f"a plan for an image of {plan.size} (height, width), an image of "
        f"{size}: plan with the size of the upright image, as `image_size` "
        "returns it"
      )
    return Views(self._views(image, plan), plan)

  @abc.abstractmethod
  def _plan(self, height: int, width: int) -> Plan: ...

  def _views(self, image: Pixels, plan: Plan) -> UInt8[np.ndarray, "N H W 3"]:
    return resize(image, plan.content, self.resample)[None]


def square(tile: int, patch: int, pool: int) -> tuple[Size, Size]:
  """Returns the patches and the soft tokens of a square view.

  Args:
    patch: the encoder's patch, in pixels; what is left over is not seen.
    pool: how many patches, each way, the connector makes one token of.
  """
  side = tile // patch
  return (side, side), (side // pool, side // pool)
