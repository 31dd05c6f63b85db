"""All that a model expects of its images, as a value; `describe` counts it."""

import dataclasses

import numpy as np
from jaxtyping import Float32

from research.errors import UserError
from research.vlm.images.normalise import HALF, Normalisation
from research.vlm.images.plan import Plan, Tiling, Views
from research.vlm.images.prompts import (
  Layout,
  Piece,
  PromptFormat,
  Text,
  Wrapped,
  token_count,
)

_SIZES = (64, 64), (512, 2048), (2048, 2048)
"""Of a small, a long and a large image: some tilings cut only some of them."""


@dataclasses.dataclass(frozen=True)
class Preprocessor:
  """How a model wants its images.

  Attributes:
    tiling: makes the views.
    normalise: makes floats of them, where the encoder takes floats.
    layout: what stands for the image in a prompt.
    placeholder: the token that stands for one feature.
    prompt: what a prompt has beside its images and its text.
    class_token: whether the class token's feature, too, is a soft token of each
      view, the first (LLaVA's `vision_feature_select_strategy: full`).
  """

  tiling: Tiling
  normalise: Normalisation = HALF
  layout: Layout = Wrapped()
  placeholder: str = "<image>"
  prompt: PromptFormat = PromptFormat()
  class_token: bool = False

  def plan(self, height: int, width: int) -> Plan:
    plan = self.tiling.plan(height, width)
    if not self.class_token:
      return plan
    grids = tuple((1, 1 + rows * columns) for rows, columns in plan.grids)
    return dataclasses.replace(plan, grids=grids)

  def views(self, image: np.ndarray, plan: Plan | None = None) -> Views:
    return self.tiling.views(image, plan or self.plan(*image.shape[:2]))

  def pieces(self, plan: Plan) -> tuple[Piece, ...]:
    return self.layout(plan)

  def check_patches(self, where: str, patches: int | None) -> None:
    """Raises UserError unless rows have places for the patches of images.

    Args:
      patches: the most of an image, at native resolution; None where all views
        are of one size.
    """
    square, kind = self.tiling.native_square, type(self.tiling).__name__
    if square is None and patches is not None:
      raise UserError(
        f"{where}.patches: found {patches}, expected None, since all views of"
        f" {kind} are of one size"
      )
    if square is not None and (
      patches is None or patches < 1 or patches % square**2
    ):
      raise UserError(
        f"{where}.patches: found {patches}, expected the most patches of an"
        f" image ({kind} keeps each image's size), a multiple of {square**2}:"
        f" the connector reads squares of {square} x {square}"
      )

  def check_one_view(self, where: str) -> None:
    """Raises UserError if the tiling cuts images into several views."""
    for height, width in _SIZES:
      views, kind = self.plan(height, width).views, type(self.tiling).__name__
      if views > 1:
        raise UserError(
          f"{where}: found the tiling {kind}, which makes {views} views of"
          f" {height} x {width} pixels, expected one view of each image, such"
          " as of tilings.Square"
        )

  def check_normalise(self, where: str, normalise: Normalisation) -> None:
    """Checks that training sees the pixels that evaluations see.

    Raises:
      UserError: they are not the preprocessor's.
    """
    if self.normalise != normalise:
      raise UserError(
        f"{where}.normalise: found {normalise}, expected {self.normalise}, as"
        " the model's preprocessor has"
      )

  def floats(self, views: Views) -> Float32[np.ndarray, "N H W 3"]:
    return self.normalise(views.pixels)


def describe(
  preprocessor: Preprocessor, height: int, width: int, name: str = "image"
) -> str:
  """Returns a text of what an image of this size costs, in tokens.

  Args:
    height: of the image, upright, in pixels.
    name: of the preset, for the first line.
  """
  plan = preprocessor.plan(height, width)
  pieces = preprocessor.pieces(plan)
  total = token_count(pieces)
  wrappers = total - plan.soft_tokens
  words = " ".join(x.text.strip() for x in pieces if isinstance(x, Text))
  lines = [
    f"{name}: {height} x {width} pixels (height x width)",
    f"  resized to      {plan.content[0]} x {plan.content[1]}",
    f"  views           {plan.views} of {plan.view[0]} x {plan.view[1]}"
    + (f", {plan.rows} x {plan.columns} tiles" if plan.rows else ""),
    f"  encoder tokens  {plan.patches[0] * plan.patches[1]} per view, "
    f"{plan.encoder_tokens} in all",
    f"  soft tokens     {_grids(plan)} = {plan.soft_tokens}",
    f"  wrapper tokens  {wrappers}",
    f"  total           {total}",
  ]
  if words:
    lines.append(f"  and the words   {words!r}")
  return "\n".join(lines)


def _grids(plan: Plan) -> str:
  """Returns the sum of grids as a text; equal ones in a row are a product."""
  terms, grids = [], list(plan.grids)
  while grids:
    first, same = grids[0], 1
    while same < len(grids) and grids[same] == first:
      same += 1
    factor = f"{same} x " if same > 1 else ""
    terms.append(f"{factor}{first[0]} x {first[1]}")
    del grids[:same]
  terms += [f"{plan.row_ends} ends of rows"] if plan.row_ends else []
  return " + ".join(terms)
