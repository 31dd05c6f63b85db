"""Questions about several images: which of them it is true of.

The right image is as often the first as any other, so a model that ignores the
order, or all images but one, scores chance.
"""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from research.ranges import Between
from research.typing import UInt8, UserError
from research.vlm.images.resize import Size
from research.vlm.scenes import drawing
from research.vlm.scenes.rules import (
  MAJORITY,
  BestGiven,
  PerSample,
  question_part,
)
from research.vlm.scenes.sample import Object, Sample
from research.vlm.scenes.shapes import place
from research.vlm.scenes.task import Task, pick

_MARGIN = 1.2
"""Least ratio of the largest area to the next."""


def _images(x: Sample) -> range:
  return range(len(x.choices))


def area(sample: Sample, colour: str, image: int) -> int:
  """Returns the square pixels of an image's squares of a colour."""
  return sum(
    (o.box[2] - o.box[0]) * (o.box[3] - o.box[1])
    for o in sample.objects
    if o.image == image and o.colour == colour
  )


def _most(x: Sample, colour: str, name: str) -> str:
  return x.choices[max(_images(x), key=lambda i: x.count(colour, name, i))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiImage(Task):
  """Which image has more of a colour, and which has an object.

  | kind | strata |
  | --- | --- |
  | more | close, far: the next largest area is more or less than half |
  | which | absent, unbound: neither attribute, or both, in the other images |

  Answers are the image's number, from 1.

  Attributes:
    colours: names of colours, at least two.
    shapes: names of shapes, at least two.
    max_objects: in an image; there are at least two.
  """

  KINDS: ClassVar = ("more", "which")
  RULES: ClassVar = {
    "majority": MAJORITY,
    # Where one image has the object, either image alone says which.
    "first image only": BestGiven(
      lambda x: x.count(question_part(x, "colour")), ("more",)
    ),
    "most objects": PerSample(lambda x: _most(x, "", ""), ("more",)),
    "most of the colour": PerSample(
      lambda x: _most(x, question_part(x, "colour"), "")
    ),
    "most of the shape": PerSample(
      lambda x: _most(x, "", question_part(x, "shape")), ("which",)
    ),
  }

  images: Between(2, 16) = 2
  colours: tuple[str, ...] = ("red", "green", "blue")
  shapes: tuple[str, ...] = ("circle", "square", "triangle")
  max_objects: int = 6
  size: int = 48
  cells: int = 3

  def __post_init__(self):
    super().__post_init__()
    drawing.named(self.colours, "MultiImage.colours")
    if len(set(self.colours)) < 2 or len(set(self.shapes)) < 2:
      raise UserError(
        f"MultiImage: found colours {self.colours} and shapes {self.shapes},"
        " expected at least two of each."
      )
    self.expect("max_objects", 2, self.cells**2)
    self.expect("size", 8 * self.cells)

  def _more(self, rng: np.random.Generator) -> Sample:
    colour = pick(rng, self.colours)
    while True:
      scenes = [
        place(
          rng,
          [
            (pick(rng, self.colours), "square")
            for _ in range(rng.integers(2, self.max_objects + 1))
          ],
          self.size,
          self.cells,
        )
        for _ in range(self.images)
      ]
      drawn = self._sample("more", scenes, {"colour": colour}, "")
      areas = [area(drawn, colour, i) for i in _images(drawn)]
      second, first = sorted(areas)[-2:]
      if first >= _MARGIN * second and first:
        break
    answer = int(np.argmax(areas))
    stratum = "close" if 2 * second > first else "far"
    text = f"Which image has more {colour}?"
    return dataclasses.replace(
      drawn, question=text, answer=drawn.choices[answer], stratum=stratum
    )

  def _which(self, rng: np.random.Generator) -> Sample:
    colour, other = (self.colours[i] for i in _two(rng, self.colours))
    shape, other_shape = (self.shapes[i] for i in _two(rng, self.shapes))
    stratum = pick(rng, ("absent", "unbound"))
    answer = int(rng.integers(self.images))
    fillers = [
      (c, s)
      for c, s in itertools.product(self.colours, self.shapes)
      if (c, s) != (colour, shape)
      and (stratum == "unbound" or (c != colour and s != shape))
    ]
    scenes = []
    for image in range(self.images):
      if image == answer:
        pairs = [(colour, shape), (other, other_shape)]
      elif stratum == "unbound":
        pairs = [(colour, other_shape), (other, shape)]
      else:
        pairs = [pick(rng, fillers), pick(rng, fillers)]
      rest = int(rng.integers(self.max_objects - 1))
      pairs += [pick(rng, fillers) for _ in range(rest)]
      scenes.append(place(rng, pairs, self.size, self.cells))
    program = {"colour": colour, "shape": shape}
    drawn = self._sample("which", scenes, program, stratum)
    text = f"Which image has a {colour} {shape}?"
    return dataclasses.replace(
      drawn, question=text, answer=drawn.choices[answer]
    )

  def _sample(
    self,
    kind: str,
    scenes: list[tuple[Object, ...]],
    program: dict[str, str | int],
    stratum: str,
  ) -> Sample:
    objects = tuple(
      dataclasses.replace(x, image=i)
      for i, scene in enumerate(scenes)
      for x in scene
    )
    choices = tuple(str(i + 1) for i in range(self.images))
    return Sample((), "", "", kind, stratum, program, objects, choices)

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    return self._more(rng) if kind == "more" else self._which(rng)

  def image_sizes(self, sample: Sample) -> tuple[Size, ...]:
    return ((self.size, self.size),) * len(sample.choices)

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    return tuple(
      drawing.scene(
        [x for x in sample.objects if x.image == i], self.size, self.size
      )
      for i in _images(sample)
    )


def _two(rng: np.random.Generator, values: tuple[str, ...]) -> list[int]:
  return rng.permutation(len(values))[:2].tolist()
