"""Drawn scenes and their captions: every object, row by row.

A caption says more of an image than an answer does: an encoder that is trained
on captions, as language models are, learns from each object of each image
(CapPa, arXiv:2306.07915).
"""

import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np

from research.ranges import PositiveInt
from research.typing import UInt8, UserError
from research.vlm.scenes import drawing
from research.vlm.scenes.rules import MAJORITY, BestGiven
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.shapes import place
from research.vlm.scenes.task import Task

QUESTION = "What is in the picture?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeCaptions(Task):
  """Coloured shapes, and a caption such as "red circle, blue square".

  The caption names the objects in the order of their cells, row by row. With
  one object it is one of `len(colours) * len(shapes)` classes, uniform.

  | kind | strata |
  | --- | --- |
  | caption | the number of objects |

  Attributes:
    min_objects, max_objects: objects in a scene; their number is uniform.
  """

  KINDS: ClassVar = ("caption",)
  RULES: ClassVar = {
    "majority": MAJORITY,
    "number of objects": BestGiven(lambda x: len(x.objects)),
  }

  colours: tuple[str, ...] = ("red", "green", "blue")
  shapes: tuple[str, ...] = ("circle", "square", "triangle")
  min_objects: int = 1
  max_objects: int = 8
  size: int = 64
  cells: PositiveInt = 4

  def __post_init__(self):
    super().__post_init__()
    drawing.named(self.colours, "ShapeCaptions.colours")
    unknown = [x for x in self.shapes if x not in drawing.SHAPES]
    if unknown or not self.shapes or not self.colours:
      raise UserError(
        f"ShapeCaptions.shapes: found {self.shapes} and the colours"
        f" {self.colours}, expected one or more of"
        f" {', '.join(drawing.SHAPES)}, and of colours."
      )
    self.expect("min_objects", 1, self.max_objects)
    self.expect("max_objects", 1, self.cells**2)
    self.expect("size", 8 * self.cells)

  @functools.cached_property
  def classes(self) -> tuple[str, ...]:
    pairs = itertools.product(self.colours, self.shapes)
    return tuple(" ".join(pair) for pair in pairs)

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    total = int(rng.integers(self.min_objects, self.max_objects + 1))
    drawn = rng.integers(len(self.classes), size=total)
    pairs = [tuple(self.classes[i].split(" ")) for i in drawn]
    objects = place(rng, pairs, self.size, self.cells)
    cell = self.size // self.cells
    in_order = sorted(objects, key=lambda x: (x.box[1] // cell, x.box[0]))
    text = ", ".join(f"{x.colour} {x.name}" for x in in_order)
    choices = self.classes if self.max_objects == 1 else ()
    stratum = "1 object" if total == 1 else f"{total} objects"
    return Sample((), QUESTION, text, kind, stratum, {}, objects, choices)

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    return (drawing.scene(sample.objects, self.size, self.size),)
