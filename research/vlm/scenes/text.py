"""Small text: lines, documents of fields, and bar charts.

Capital letters and figures are 4 to 24 pixels high, and the stratum is that
height: the literature finds text below some ten pixels unreadable. They are
drawn at the image's own resolution. The answer to a chart is a number; score it
by `evaluation.relaxed_accuracy`.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from research.ranges import AtLeast, Between, PositiveInt
from research.typing import UInt8, UserError
from research.vlm.scenes import drawing
from research.vlm.scenes.rules import MAJORITY, PerSample
from research.vlm.scenes.sample import Object, Sample
from research.vlm.scenes.task import Task

ALPHABET = "ACDEFGHKLMNPRTUVWXY34679"
"""Without those that look alike, such as 0 and O, or reach below the line."""
FIELDS = ("Sum", "Tax", "Day", "Row", "Age")
BARS = "ABCDE"
_FIGURES = 3
_LINES = 3
_LARGEST = 10
"""Of a bar's values, from 1."""


def _value(x: Object) -> str:
  return x.name.rpartition(" ")[2]


def _tallest(x: Sample) -> str:
  bars = [o for o in x.objects if o.name[0] in BARS]
  return _value(min(bars, key=lambda o: o.box[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Task):
  """Reading; kinds are "line", "field" and "bar", strata heights of text.

  Attributes:
    heights: of capital letters, in pixels.
    length: characters of a line.
    alphabet: of a line, each character as likely as any other.
    step: a line begins at multiples of so many pixels, across and down.
  """

  KINDS: ClassVar = ("line", "field", "bar")
  RULES: ClassVar = {
    "majority": MAJORITY,
    "first field": PerSample(lambda x: _value(x.objects[0]), ("field",)),
    "tallest bar": PerSample(_tallest, ("bar",)),
    "first bar": PerSample(lambda x: _value(x.objects[0]), ("bar",)),
  }

  heights: tuple[AtLeast(2), ...] = (4, 6, 8, 10, 12, 16, 20, 24)
  length: Between(1, 32) = 4
  alphabet: str = ALPHABET
  step: PositiveInt = 1
  width: int = 192
  height: int = 128

  def __post_init__(self):
    super().__post_init__()
    if not self.heights:
      raise UserError("Text.heights: found none, expected at least one.")
    if not self.alphabet or self.alphabet != self.alphabet.replace(" ", ""):
      raise UserError(
        f"Text.alphabet: found {self.alphabet!r}, expected characters, without"
        " spaces."
      )
    kinds, tallest = self.kinds or self.KINDS, max(self.heights)
    longest = max(self._line_width(kind, tallest) for kind in kinds)
    self.expect("width", longest + 2)
    only_lines = set(kinds) == {"line"}
    self.expect("height", tallest + 2 if only_lines else 5 * tallest)

  def _line_width(self, kind: str, height: int) -> int:
    if kind == "bar":
      return _axis_width(height) + len(BARS) * height
    if kind == "field":
      return drawing.text_box(0, 0, f"{FIELDS[0]}: 000 ", height)[2]
    boxes = [
      drawing.text_box(0, 0, x * self.length, height) for x in self.alphabet
    ]
    return max(right for _, _, right, _ in boxes)

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    height = int(rng.choice(self.heights))
    return getattr(self, f"_{kind}")(rng, height)

  def _line(self, rng: np.random.Generator, height: int) -> Sample:
    text = "".join(rng.choice(list(self.alphabet), size=self.length))
    _, _, right, _ = drawing.text_box(0, 0, text, height)
    x, y = (
      self.step * int(rng.integers(-(-room // self.step)))
      for room in (self.width - right, self.height - height)
    )
    objects = (Object(text, "black", (x, y, x + right, y + height)),)
    question = "What does the image say?"
    return _sample(question, text, "line", height, {}, objects)

  def _field(self, rng: np.random.Generator, height: int) -> Sample:
    names = [FIELDS[i] for i in rng.permutation(len(FIELDS))[:_LINES]]
    step = height * 3 // 2 + 1
    y = int(rng.integers(self.height - _LINES * step))
    objects = []
    for name in names:
      value = "".join(map(str, rng.integers(10, size=_FIGURES)))
      text = f"{name}: {value}"
      left, _, right, _ = drawing.text_box(2, y, text, height)
      objects.append(Object(text, "black", (left, y, right, y + height)))
      y += step
    named = int(rng.integers(_LINES))
    question = f"What is the value of {names[named]}?"
    program = {"field": names[named]}
    answer = _value(objects[named])
    return _sample(question, answer, "field", height, program, objects)

  def _bar(self, rng: np.random.Generator, height: int) -> Sample:
    total = int(rng.integers(2, len(BARS) + 1))
    named = int(rng.integers(total))
    values = rng.integers(1, _LARGEST + 1, size=total)
    base, unit = self.height - height - 4, (self.height - 2 * height) // 11
    axis = _axis_width(height)
    wide = (self.width - axis) // len(BARS)
    objects = []
    for i, value in enumerate(values):
      left, top = axis + i * wide + wide // 4, base - unit * int(value)
      box = (left, top, left + wide // 2, base)
      objects.append(Object(f"{BARS[i]} {value}", "blue", box))
    question = f"What is the value of bar {BARS[named]}?"
    program = {"bar": BARS[named], "unit": unit}
    answer = str(values[named])
    return _sample(question, answer, "bar", height, program, objects)

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    """Returns the image of a drawn sample: black on white, blue bars."""
    canvas = Image.new("RGB", (self.width, self.height), drawing.BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    height = int(sample.program["height"])
    for x in sample.objects:
      left, top, right, bottom = x.box
      if sample.kind != "bar":
        drawing.write(draw, left, top, x.name, height)
        continue
      colour = drawing.COLOURS[x.colour]
      draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
      drawing.write(draw, left, bottom + 2, x.name[0], height)
    if sample.kind == "bar":
      self._axis(draw, int(sample.program["unit"]), height)
    return (np.asarray(canvas),)

  def _axis(self, draw: ImageDraw.ImageDraw, unit: int, height: int) -> None:
    """Draws the base line, and a line and its number at 5 and 10."""
    base = self.height - height - 4
    for value in (0, 5, 10):
      y = base - unit * value
      draw.line((0, y, self.width, y), (150, 150, 150))
      drawing.write(draw, 0, y - height - 1, str(value), height)


def _axis_width(height: int) -> int:
  return drawing.text_box(0, 0, "10", height)[2] + 2


def _sample(question, answer, kind, height, program, objects) -> Sample:
  program = {**program, "height": height}
  stratum = f"{height:2d} px"
  return Sample((), question, answer, kind, stratum, program, tuple(objects))
