"""Grounding: where is an object? The answer is its box.

Boxes are texts of four numbers, left, top, right and bottom in hundredths of
the image's sides; score them by `evaluation.box_score`. An object is asked for
that is alone with its pair of colour and shape.
"""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from research.typing import UInt8, UserError
from research.vlm.scenes import drawing
from research.vlm.scenes.rules import PerSample, Rule, question_part
from research.vlm.scenes.sample import Box, Sample
from research.vlm.scenes.shapes import place
from research.vlm.scenes.task import Task, pick

_UNITS = 100


def box_text(box: Box, size: int) -> str:
  """Returns a box of an image of `size` pixels as text, in hundredths."""
  return " ".join(str(round(_UNITS * side / size)) for side in box)


def _first(part: str) -> Rule:
  """Says the first object, row by row, with one of the asked attributes."""

  def answer(x: Sample) -> str:
    alike = [
      o.box
      for o in x.objects
      if question_part(x, part) == (o.colour if part == "colour" else o.name)
    ]
    box = min(alike, key=lambda box: (box[1], box[0]))
    return box_text(box, int(x.program["size"]))

  return PerSample(answer)


def _centre(x: Sample) -> str:
  """Says a box as large as objects are, in the middle of the image."""
  size, cells = int(x.program["size"]), int(x.program["cells"])
  half = size // cells * 3 // 8
  middle = size // 2
  return box_text((middle - half,) * 2 + (middle + half,) * 2, size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grounding(Task):
  """Where is the object? Strata: distinct, shared.

  In the second one, other objects have its colour, and others its shape.

  Attributes:
    colours: names of colours, at least two.
    shapes: names of shapes, at least two.
    max_objects: in a scene; there are three at least.
  """

  KINDS: ClassVar = ("locate",)
  RULES: ClassVar = {
    "centre": PerSample(_centre),
    "colour only": _first("colour"),
    "shape only": _first("shape"),
  }

  colours: tuple[str, ...] = ("red", "green", "blue")
  shapes: tuple[str, ...] = ("circle", "square", "triangle")
  max_objects: int = 6
  size: int = 64
  cells: int = 4

  def __post_init__(self):
    super().__post_init__()
    drawing.named(self.colours, "Grounding.colours")
    if len(set(self.colours)) < 2 or len(set(self.shapes)) < 2:
      raise UserError(
        f"Grounding: found colours {self.colours} and shapes {self.shapes},"
        " expected at least two of each."
      )
    self.expect("max_objects", 3, self.cells**2)
    self.expect("size", 8 * self.cells)

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    pairs = list(itertools.product(self.colours, self.shapes))
    colour, shape = pair = pairs[rng.integers(len(pairs))]
    stratum = ("distinct", "shared")[rng.integers(2)]
    total = int(rng.integers(3, self.max_objects + 1))
    same_colour = [x for x in pairs if x[0] == colour and x != pair]
    same_shape = [x for x in pairs if x[1] == shape and x != pair]
    others = [x for x in pairs if x[0] != colour and x[1] != shape]
    scene = [pair]
    if stratum == "shared":
      scene += [pick(rng, same_colour), pick(rng, same_shape)]
      others += same_colour + same_shape
    scene += [pick(rng, others) for _ in range(total - len(scene))]
    objects = place(rng, scene, self.size, self.cells)
    (box,) = [x.box for x in objects if (x.colour, x.name) == pair]
    program = {
      "colour": colour,
      "shape": shape,
      "size": self.size,
      "cells": self.cells,
    }
    text = f"Where is the {colour} {shape}?"
    return Sample(
      (), text, box_text(box, self.size), kind, stratum, program, objects
    )

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    return (drawing.scene(sample.objects, self.size, self.size),)
