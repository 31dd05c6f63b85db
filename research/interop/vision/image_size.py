"""A vision language model for images of another size than it was trained on."""

import dataclasses
import functools
from typing import Any

import jax

from research import tree
from research.interop.loaded import Loaded
from research.interop.vision import config as vision_config
from research.io import folders
from research.typing import UserError
from research.vlm.encoders.positions import PositionTable
from research.vlm.encoders.resize_positions import (
  Interpolation,
  bicubic,
  resized_positions,
)
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.centre_crop import CentreCrop
from research.vlm.images.tiling.internvl import InternVL
from research.vlm.images.tiling.pad_to_square import PadToSquare
from research.vlm.images.tiling.pan_and_scan import PanAndScan
from research.vlm.images.tiling.square import Square
from research.vlm.model import VisionLanguageModel

TILINGS = (Square, PadToSquare, PanAndScan, InternVL)
"""Ways of making views whose size is one number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSize:
  """Changes the size of views: learned positions are resized.

  Everything else that follows from the size is as the family has it: Gemma 3
  pools larger squares, for as many soft tokens; LLaVA gets more of them.

  Attributes:
    pixels: side of a view, a multiple of the encoder's patch.
    interpolation: of the positions: `bicubic`, transformers', or
      `corner_aligned`, big_vision's.
  """

  pixels: int
  interpolation: Interpolation = bicubic

  def __call__(self, loaded: Loaded) -> Loaded:
    """Returns the model with the size changed, its preprocessor as well.

    Args:
      loaded: a vision language model out of a directory, all its towers.

    Raises:
      UserError: it is none, its encoder has no learned positions, the patch
        does not divide the size, or images are not made views of one size.
    """
    model = loaded.model
    _check(model, self.pixels)
    other = _described(loaded, self.pixels)
    old, new = (
      (x.vision.positions.rows, x.vision.positions.columns)
      for x in (model, other)
    )
    folders.warn(
      f"learned positions of {old[0]} x {old[1]} patches are resized to"
      f" {new[0]} x {new[1]}"
    )

    def resize(path: str, x: Any) -> Any:
      if path != "vision/positions/table":
        return x
      one = functools.partial(
        resized_positions,
        old=old,
        new=new,
        interpolation=self.interpolation,
        class_token=model.vision.class_token,
      )
      unread = isinstance(x, jax.ShapeDtypeStruct)
      return jax.eval_shape(one, x) if unread else one(x)

    return dataclasses.replace(
      loaded,
      model=dataclasses.replace(
        model,
        vision=model.vision.clone(positions=other.vision.positions),
        connector=other.connector,
      ),
      params=tree.map_paths(resize, loaded.params),
      preprocessor=with_views_of(
        loaded.preprocessor,
        self.pixels,
        pool=getattr(other.connector, "side", 1),
      ),
    )


def _check(model: Any, pixels: int) -> None:
  if not isinstance(model, VisionLanguageModel):
    raise UserError(
      f"ImageSize: found a {type(model).__name__}, expected a vision language"
      " model with all its towers (towers='all')"
    )
  if not isinstance(model.vision.positions, PositionTable):
    raise UserError(
      "ImageSize: found an encoder without a table of learned positions, which"
      " takes images of any size as it is; leave image_size out"
    )
  patch = model.vision.patch
  if pixels < patch or pixels % patch:
    raise UserError(
      f"ImageSize.pixels: found {pixels}, expected a multiple of the patch,"
      f" {patch}, such as {max(pixels // patch, 1) * patch}"
    )


def _described(loaded: Loaded, pixels: int) -> VisionLanguageModel:
  source = loaded.source.get("base", loaded.source)  # an adapter's base
  config = source["config"]
  inner = dict(config.get("vision_config") or {}) | {"image_size": pixels}
  return vision_config.vision_language_model(
    dict(config) | {"vision_config": inner},
    f"{source['path']}/config.json with image_size {pixels}",
    loaded.model.language.dtype,
  )


def with_views_of(
  found: Preprocessor | None, pixels: int, pool: int
) -> Preprocessor | None:
  """Returns the preprocessor whose views have so many pixels.

  Args:
    pool: patches, each way, that become one soft token.

  Raises:
    UserError: images are not made views of one size.
  """
  if found is None:
    return None
  tiling = found.tiling
  sizes = dict(tile=pixels, pool=pool)
  if isinstance(tiling, CentreCrop):
    sizes["shortest"] = round(tiling.shortest * pixels / tiling.tile)
  elif not isinstance(tiling, TILINGS):
    known = ", ".join(x.__name__ for x in (*TILINGS, CentreCrop))
    raise UserError(
      f"views of {pixels} pixels: found images cut by {type(tiling).__name__},"
      f" expected one of {known}"
    )
  tiling = dataclasses.replace(tiling, **sizes)
  return dataclasses.replace(found, tiling=tiling)
