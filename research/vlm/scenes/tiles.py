"""A small letter in a large image, inside of a tile or across a border.

Tiling without overlap splits what stands across two tiles: each of them has a
part, so it is misread, or counted twice. The strata show both.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from research.ranges import Between
from research.typing import UInt8
from research.vlm.scenes import drawing
from research.vlm.scenes.rules import MAJORITY, PerSample
from research.vlm.scenes.sample import Box, Object, Sample
from research.vlm.scenes.task import Task

LETTERS = "ACEFHKLNPTXZ"


def tiles_of(box: Box, tile: int) -> int:
  """Returns how many tiles a box reaches into."""
  left, top, right, bottom = box
  across = (right - 1) // tile - left // tile + 1
  return across * ((bottom - 1) // tile - top // tile + 1)


def _tiles_alone(x: Sample) -> str:
  """Counts the letters of each tile, so that one in two tiles counts twice."""
  tile = int(x.program["tile"])
  found = sum(tiles_of(o.box, tile) for o in x.objects)
  return str(min(found, len(x.choices)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpotTiles(Task):
  """Reading one letter, and counting letters; strata are inside and border.

  Attributes:
    size: width and height of the image, in pixels.
    height: of the letters, in pixels.
    max_count: largest count, from 1.
  """

  KINDS: ClassVar = ("read", "count")
  RULES: ClassVar = {
    "majority": MAJORITY,
    "tiles alone": PerSample(_tiles_alone, ("count",)),
  }

  size: int = 1024
  tile: int = 512
  height: Between(4, 256) = 20
  max_count: Between(1, 8) = 4

  def __post_init__(self):
    super().__post_init__()
    self.expect("tile", 4 * self.height)
    self.expect("size", 2 * self.tile, 1 << 14)

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    border = bool(rng.integers(2))
    count = 1 if kind == "read" else int(rng.integers(1, self.max_count + 1))
    objects: list[Object] = []
    while len(objects) < count:
      letter = LETTERS[rng.integers(len(LETTERS))]
      box = self._box(rng, letter, border and not objects)
      if all(_separate(box, x.box, self.height) for x in objects):
        objects.append(Object(letter, "black", box))
    if kind == "read":
      text, answer = "Which letter is in the image?", objects[0].name
      choices = tuple(LETTERS)
    else:
      text, answer = "How many letters are in the image?", str(count)
      choices = tuple(str(i + 1) for i in range(self.max_count))
    stratum = "border" if border else "inside"
    program = {"tile": self.tile}
    return Sample(
      (), text, answer, kind, stratum, program, tuple(objects), choices
    )

  def _box(self, rng: np.random.Generator, letter: str, border: bool) -> Box:
    """Returns a box for a letter, across a border of tiles or inside of one."""
    left, top, right, bottom = drawing.text_box(0, 0, letter, self.height)
    wide, high = right - left, bottom - top
    while True:
      x, y = (int(rng.integers(self.size - s)) for s in (wide, high))
      if border:
        # Between a quarter and three quarters of it lie before the border.
        line = self.tile * int(rng.integers(1, self.size // self.tile))
        share = rng.uniform(0.25, 0.75)
        if rng.integers(2):
          x = line - round(share * wide)
        else:
          y = line - round(share * high)
      box = (x, y, x + wide, y + high)
      if (tiles_of(box, self.tile) > 1) == border:
        return box

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    canvas = Image.new("RGB", (self.size, self.size), drawing.BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for x in sample.objects:
      left, top, _, _ = drawing.text_box(0, 0, x.name, self.height)
      drawing.write(draw, x.box[0] - left, x.box[1] - top, x.name, self.height)
    return (np.asarray(canvas),)


def _separate(one: Box, two: Box, gap: int) -> bool:
  return (
    one[2] + gap <= two[0]
    or two[2] + gap <= one[0]
    or one[3] + gap <= two[1]
    or two[3] + gap <= one[1]
  )
