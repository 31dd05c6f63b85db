"""The same model for larger images: its position table on another grid."""

import dataclasses

from research.typing import Params, UserError
from research.vlm.encoders.positions import PositionTable
from research.vlm.encoders.resize_positions import (
  Interpolation,
  corner_aligned,
  resized_positions,
)
from research.vlm.model import VisionLanguageModel


def at_resolution(
  model: VisionLanguageModel,
  params: Params,
  pixels: int,
  interpolation: Interpolation = corner_aligned,
) -> tuple[VisionLanguageModel, Params]:
  """Returns a model and its parameters for square images of another size.

  Raises:
    UserError: the encoder has no table of one grid.
  """
  table = model.vision.positions
  if not isinstance(table, PositionTable):
    raise UserError(
      "at_resolution: found an encoder without a table of positions, or that"
      " resizes it for each image; it takes images of any size as it is"
    )
  side = pixels // model.vision.patch
  grid = (side, side)
  vision = model.vision.clone(positions=table.clone(rows=side, columns=side))
  resized = resized_positions(
    params["vision"]["positions"]["table"],
    (table.rows, table.columns),
    grid,
    interpolation=interpolation,
    class_token=model.vision.class_token,
  )
  inside = params["vision"] | {"positions": {"table": resized}}
  return (
    dataclasses.replace(model, vision=vision),
    {**params, "vision": inside},
  )
