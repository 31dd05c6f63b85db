"""What a generator of scenes returns: images, a question, and the truth.

A sample carries everything that its answer was computed from, so that rules
(`research/vlm/scenes/rules.py`) can answer from a part of it, and tests can
check its stratum.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from research.typing import UInt8, UserError

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""

YES_NO = ("yes", "no")


@dataclasses.dataclass(frozen=True)
class Object:
  """One thing in an image.

  Attributes:
    name: its shape, digit or text.
    colour: its name in `drawing.COLOURS`; "" where it does not matter.
    box: what it is drawn in.
    image: index of its image in the sample.
    source: index in the data set that it comes from; -1 for a drawn one.
    points: corners of a line, in pixels.
  """

  name: str
  colour: str
  box: Box
  image: int = 0
  source: int = -1
  points: tuple[tuple[int, int], ...] = ()

  @property
  def centre(self) -> tuple[float, float]:
    """Horizontal and vertical centre, in pixels."""
    left, top, right, bottom = self.box
    return (left + right) / 2, (top + bottom) / 2


@dataclasses.dataclass(frozen=True)
class Sample:
  """A question about images, its answer, and what both were made of.

  Attributes:
    images: uint8 RGB, each `[H, W, 3]`; one but for multi-image tasks.
    question: as the model reads it, without response-format suffix.
    kind: which of the task's questions it is, such as "count".
    stratum: group within the kind that scores are reported for.
    program: what the question names, such as `{"colour": "red"}`.
    objects: of all images.
    choices: every answer that the question admits; empty for free text.
  """

  images: tuple[UInt8[np.ndarray, "..."], ...]
  question: str
  answer: str
  kind: str
  stratum: str
  program: Mapping[str, str | int]
  objects: tuple[Object, ...]
  choices: tuple[str, ...] = ()

  @property
  def image(self) -> UInt8[np.ndarray, "H W 3"]:
    """The image of a sample that has one.

    Raises:
      UserError: it has several.
    """
    if len(self.images) != 1:
      raise UserError(
        f"Sample.image: found {len(self.images)} images; use Sample.images."
      )
    return self.images[0]

  def count(self, colour: str = "", name: str = "", image: int = 0) -> int:
    """Returns how many objects of an image match; "" matches all."""
    return sum(
      x.image == image and colour in ("", x.colour) and name in ("", x.name)
      for x in self.objects
    )


if TYPE_CHECKING:
  Samples = Sequence[Sample]
else:
  # A check of types at run time would read one of them: a drawing's time, or a
  # picture of a package that is not installed.
  Samples = Sequence
