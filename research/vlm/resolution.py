"""The same model for larger images: its position table on another grid."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float, Params, UserError
from research.vlm.model import VisionLanguageModel


def resize_table(
  table: Float[Array, "N D"],
  before: tuple[int, int],
  after: tuple[int, int],
  class_token: bool = False,
) -> Float[Array, "M D"]:
  """Returns a table of positions on another grid, by bilinear interpolation.

  Corners stay corners, as in big_vision's `resample_posemb`. (transformers
  interpolates cubically, and between the centres of cells.)

  Args:
    table: a vector a cell, row by row.
    before: rows and columns of its grid.
    after: those of the new one.
    class_token: whether the first vector is a class token's, which stays.
  """
  own, cells = table[:class_token], table[class_token:]
  if len(cells) != before[0] * before[1]:
    raise UserError(
      f"resize_table: found {len(cells)} positions, expected"
      f" {before[0]} x {before[1]}"
    )
  grid = cells.astype(jnp.float32).reshape(*before, -1)
  for axis in (0, 1):
    matrix = jnp.asarray(_hats(before[axis], after[axis]))
    grid = jnp.moveaxis(jnp.tensordot(matrix, grid, (1, axis)), 0, axis)
  new = grid.reshape(after[0] * after[1], -1).astype(table.dtype)
  return jnp.concatenate([own, new])


def _hats(before: int, after: int) -> np.ndarray:
  """Returns the weights of `before` points at `after` points between them."""
  at = np.linspace(0, before - 1, after)
  distance = np.abs(at[:, None] - np.arange(before))
  return np.maximum(0, 1 - distance).astype(np.float32)


def at_resolution(
  model: VisionLanguageModel, params: Params, pixels: int
) -> tuple[VisionLanguageModel, Params]:
  """Returns a model and its parameters for square images of another size.

  Args:
    model: whose encoder has a table of positions.
    params: its parameters.
    pixels: along each side of the new images.

  Raises:
    UserError: the encoder has no table.
  """
  table = model.vision.positions
  if table is None:
    raise UserError(
      "at_resolution: found an encoder without a table of positions; it takes"
      " images of any size as it is"
    )
  side = pixels // model.vision.patch
  grid = (side, side)
  vision = model.vision.clone(positions=table.clone(rows=side, columns=side))
  resized = resize_table(
    params["vision"]["positions"]["table"],
    (table.rows, table.columns),
    grid,
    model.vision.class_token,
  )
  inside = params["vision"] | {"positions": {"table": resized}}
  return (
    dataclasses.replace(model, vision=vision),
    {**params, "vision": inside},
  )
