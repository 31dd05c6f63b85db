"""Geometry that people see at a glance, after "VLMs are blind".

Rahmanzadehgervi et al. 2024: crossings of two lines, overlap of two circles,
nested squares, rows and columns of a grid. Answers are uniform given the text.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from research.ranges import Between
from research.typing import UInt8
from research.vlm.scenes import drawing
from research.vlm.scenes.rules import MAJORITY, BestGiven, PerSample, yes_no
from research.vlm.scenes.sample import YES_NO, Object, Sample
from research.vlm.scenes.task import Task

_LINE = 2
"""Width of what is drawn, in pixels."""
_APART = 5
"""Least vertical distance of two lines' corners, in pixels."""
_SQUARES = (2, 3, 4, 5)
_GRID = (3, 4, 5, 6, 7)
_SIGNS = {  # crossings -> which line is above at the left, middle and right
  0: ((1, 1, 1),),
  1: ((1, 1, -1), (1, -1, -1)),
  2: ((1, -1, 1),),
}


def _ends(x: Sample) -> bool:
  """Whether the line that is above at the left is so at the right."""
  one, two = (o.points for o in x.objects)
  return (one[0][1] < two[0][1]) == (one[-1][1] < two[-1][1])


def _boxes_overlap(x: Sample) -> str:
  one, two = (o.box for o in x.objects)
  return yes_no(
    max(one[0], two[0]) < min(one[2], two[2])
    and max(one[1], two[1]) < min(one[3], two[3])
  )


def _distance(x: Sample) -> int:
  one, two = (o.centre for o in x.objects)
  return round(math.dist(one, two)) // 2


def _innermost(x: Sample) -> int:
  return min(o.box[2] - o.box[0] for o in x.objects) // 4


def _other_axis(x: Sample) -> str:
  other = "columns" if x.program["axis"] == "rows" else "rows"
  return str(x.count(name=other) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlindTest(Task):
  """Lines, circles, squares and grids; see the module's docstring.

  | kind | asks | strata |
  | --- | --- | --- |
  | lines | how often two lines cross: 0 to 2 | none |
  | circles | whether two circles overlap | close, far: the gap, in pixels |
  | squares | how many squares are nested: 2 to 5 | none |
  | grid | how many rows or columns: 3 to 7 | rows, columns |
  """

  KINDS: ClassVar = ("lines", "circles", "squares", "grid")
  RULES: ClassVar = {
    "majority": MAJORITY,
    "ends only": BestGiven(_ends, ("lines",)),
    "boxes overlap": PerSample(_boxes_overlap, ("circles",)),
    "distance only": BestGiven(_distance, ("circles",)),
    "innermost only": BestGiven(_innermost, ("squares",)),
    "other axis": PerSample(_other_axis, ("grid",)),
  }

  size: Between(64, 2048) = 64

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    return getattr(self, f"_{kind}")(rng)

  def _lines(self, rng: np.random.Generator) -> Sample:
    crossings = int(rng.integers(3))
    signs = _SIGNS[crossings][rng.integers(len(_SIGNS[crossings]))]
    edge, flip = 3, int(rng.choice((-1, 1)))
    ys = []
    for sign in signs:
      while True:
        y = rng.integers(edge, self.size - edge, size=2)
        if (y[1] - y[0]) * sign * flip >= _APART:
          break
      ys.append(y)
    xs = (edge, self.size // 2, self.size - edge)
    objects = []
    for i, colour in enumerate(("blue", "red")):
      points = tuple((x, int(y[i])) for x, y in zip(xs, ys, strict=True))
      heights = [y for _, y in points]
      box = (xs[0], min(heights), xs[-1], max(heights))
      objects.append(Object("line", colour, box, points=points))
    text = "How many times do the blue and the red line cross?"
    return _sample("lines", text, crossings, "all", objects, range(3))

  def _circles(self, rng: np.random.Generator) -> Sample:
    answer = YES_NO[rng.integers(2)]
    stratum = ("close", "far")[rng.integers(2)]
    low, high = (2, 4) if stratum == "close" else (4, 8)
    while True:
      radii = rng.integers(self.size // 8, self.size // 4, size=2)
      distance = int(radii.sum()) + rng.uniform(low, high) * (
        -1 if answer == "yes" else 1
      )
      angle = rng.uniform(0, 2 * math.pi)
      one = rng.uniform(0, self.size, size=2)
      two = one + distance * np.array((math.cos(angle), math.sin(angle)))
      boxes = [
        tuple(int(v) for v in (*np.round(c - r), *(np.round(c - r) + 2 * r)))
        for c, r in zip((one, two), radii, strict=True)
      ]
      # Rounding moves circles: what is drawn has to be what was asked for.
      gap = _gap(*boxes)
      apart = low <= abs(gap) < high and yes_no(gap < 0) == answer
      inside = all(0 <= v <= self.size for box in boxes for v in box)
      if apart and inside and distance > abs(int(radii[0] - radii[1])) + 2:
        break
    objects = [
      Object("circle", colour, box)
      for colour, box in zip(("blue", "red"), boxes, strict=True)
    ]
    text = "Do the two circles overlap?"
    return _sample("circles", text, answer, stratum, objects, YES_NO)

  def _squares(self, rng: np.random.Generator) -> Sample:
    count = int(rng.choice(_SQUARES))
    objects = []
    unit = self.size / 64
    side = int(rng.integers(round(50 * unit), round(62 * unit) + 1))
    left, top = (int(x) for x in rng.integers(1, self.size - side, size=2))
    for i in range(count):
      if i:
        less = int(rng.integers(round(6 * unit), round(11 * unit) + 1))
        slack = less - 2 * _LINE - 1
        left += _LINE + 1 + int(rng.integers(slack))
        top += _LINE + 1 + int(rng.integers(slack))
        side -= less
      box = (left, top, left + side, top + side)
      objects.append(Object("square", "black", box))
    text = "How many squares are there?"
    return _sample("squares", text, count, "all", objects, _SQUARES)

  def _grid(self, rng: np.random.Generator) -> Sample:
    counts = {x: int(rng.choice(_GRID)) for x in ("rows", "columns")}
    axis = ("rows", "columns")[rng.integers(2)]
    lengths = rng.integers(self.size * 2 // 3, self.size - 3, size=2)
    left, top = (int(rng.integers(1, self.size - x - 1)) for x in lengths)
    right, bottom = left + int(lengths[0]), top + int(lengths[1])
    objects = [Object("outline", "black", (left, top, right, bottom))]
    for i in range(1, counts["rows"]):
      y = top + round(i * (bottom - top) / counts["rows"])
      objects.append(Object("rows", "black", (left, y, right, y)))
    for i in range(1, counts["columns"]):
      x = left + round(i * (right - left) / counts["columns"])
      objects.append(Object("columns", "black", (x, top, x, bottom)))
    text = f"How many {axis} does the grid have?"
    sample = _sample("grid", text, counts[axis], axis, objects, _GRID)
    return dataclasses.replace(sample, program={"axis": axis})

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    scale = drawing.SCALE
    canvas = Image.new("RGB", (scale * self.size,) * 2, drawing.BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for x in sample.objects:
      colour, width = drawing.COLOURS[x.colour], scale * _LINE
      left, top, right, bottom = (scale * v for v in x.box)
      if x.name == "circle":
        draw.ellipse((left, top, right - 1, bottom - 1), None, colour, width)
      elif x.name in ("square", "outline"):
        draw.rectangle((left, top, right - 1, bottom - 1), None, colour, width)
      else:
        points = x.points or ((x.box[:2]), (x.box[2:]))
        scaled = [(scale * u, scale * v) for u, v in points]
        draw.line(scaled, colour, width if x.points else scale, "curve")
    return (drawing.reduced(canvas),)


def _gap(one, two) -> float:
  """Returns the distance of two circles' rims; negative where they overlap."""
  centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (one, two)]
  radii = sum((b[2] - b[0]) / 2 for b in (one, two))
  return math.dist(*centres) - radii


def _sample(kind, text, answer, stratum, objects, choices) -> Sample:
  return Sample(
    (),
    text,
    str(answer),
    kind,
    stratum,
    {},
    tuple(objects),
    tuple(map(str, choices)),
  )
