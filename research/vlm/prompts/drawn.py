"""Questions that a model reads as a picture: a `reasoning.Prompting`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from research.reasoning.prompting import PromptWithArrays
from research.typing import UInt8, UserError
from research.vlm import data
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.model import ANY_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnQuestion:
  """The picture of a question, then a text that does not depend on it.

  Attributes:
    draw: the picture of a text, such as a `WordGrid`; it depends on nothing
      else.
    preprocessor: the model's, whose views are all of one size.
    text: after the picture, where the answer begins.
  """

  draw: Callable[[str], UInt8[np.ndarray, "H W 3"]]
  preprocessor: Preprocessor
  image_token: int
  text: str = ""

  def __post_init__(self):
    if self.preprocessor.tiling.native_square is not None:
      raise UserError(
        "DrawnQuestion.preprocessor: found a tiling that keeps each picture's"
        " size, expected one whose views are all of one size"
      )
    tiling = self.preprocessor.tiling
    if tiling.groups(tiling.plan(*ANY_SIZE)) is not None:
      raise UserError(
        f"DrawnQuestion.preprocessor: found the tiling {type(tiling).__name__},"
        " which pools groups of patches over its views, expected one that pools"
        " squares of each view, such as tilings.Square"
      )

  def __call__(self, tokenizer: Any, question: str) -> PromptWithArrays:
    """Returns the placeholders and the text, with `pixels` `[V, H, W, 3]`."""
    picture = self.draw(question)
    size = picture.shape[:2]
    views = self.preprocessor.plan(*size).views
    made = data.Prompt.from_images([picture], self.preprocessor, views)
    known, ids = self._ids.get(size, (None, ()))
    if known is not tokenizer:
      template = data.Template(question="{question}")
      ids = tuple(
        data.prompt_ids(
          self.text,
          made.pieces,
          tokenizer,
          self.image_token,
          template,
          self.preprocessor.prompt,
        )
      )
      self._ids[size] = tokenizer, ids
    return PromptWithArrays(ids, {"pixels": made.pixels})

  @functools.cached_property
  def _ids(self) -> dict[tuple[int, int], tuple[Any, tuple[int, ...]]]:
    """Tokenizer and ids by a picture's size: all that ids depend on."""
    return {}
