"""A contact sheet: samples with their questions and answers, in one picture.

python -m research.vlm.scenes.sheet FILE.png
"""

import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from research.vlm.scenes import drawing
from research.vlm.scenes.blind_test import BlindTest
from research.vlm.scenes.grounding import Grounding
from research.vlm.scenes.multi_image import MultiImage
from research.vlm.scenes.pope import PopeShapes
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.shapes import Shapes
from research.vlm.scenes.text import Text

_CAPITAL = 9
_LINE = 15
_LINES = 3
_MARGIN = 8


def contact_sheet(
  samples: Sequence[Sample] = (), columns: int = 5, width: int = 210
) -> Image.Image:
  """Returns a picture of samples, each over its question and answer.

  Args:
    samples: to show; by default one of each kind of drawn scene.
  """
  samples = samples or examples()
  height = width * 2 // 3
  row = height + (_LINES + 1) * _LINE + 2 * _MARGIN
  rows = -(-len(samples) // columns)
  sheet = Image.new("RGB", (columns * width, rows * row), "white")
  draw = ImageDraw.Draw(sheet)
  for i, sample in enumerate(samples):
    left, top = i % columns * width + _MARGIN, i // columns * row + _MARGIN
    picture = _side_by_side(sample)
    scale = min((width - 2 * _MARGIN) / picture.width, height / picture.height)
    inner = [max(1, round(side * scale)) for side in picture.size]
    sheet.paste(picture.resize(inner, Image.LANCZOS), (left, top))
    edge = (left - 1, top - 1, left + inner[0], top + inner[1])
    draw.rectangle(edge, outline=(190, 190, 190))
    inner_width = width - 2 * _MARGIN
    lines = _wrapped(sample.question, inner_width, _LINES)
    lines += _wrapped(f"> {sample.answer}", inner_width, 1)
    for j, line in enumerate(lines):
      y = top + height + 6 + j * _LINE
      drawing.write(draw, left, y, line, _CAPITAL)
  return sheet


def _wrapped(text: str, width: int, most: int) -> list[str]:
  """Returns the lines of a text that are at most so many pixels wide."""
  for letters in range(len(text) + 1, 0, -1):
    lines = textwrap.wrap(text, letters + 3, max_lines=most, placeholder=" ..")
    boxes = [drawing.text_box(0, 0, line, _CAPITAL) for line in lines]
    if all(right <= width for _, _, right, _ in boxes):
      return lines
  return []


def _side_by_side(sample: Sample) -> Image.Image:
  gap = 4
  height = max(x.shape[0] for x in sample.images)
  width = sum(x.shape[1] + gap for x in sample.images) - gap
  canvas = np.full((height, width, 3), 190, np.uint8)
  left = 0
  for x in sample.images:
    canvas[: x.shape[0], left : left + x.shape[1]] = x
    left += x.shape[1] + gap
  return Image.fromarray(canvas)


def examples(seed: int = 0) -> list[Sample]:
  """Returns one sample of each kind that needs no other package's pictures."""
  tasks = (Shapes, PopeShapes, Grounding, Text, BlindTest, MultiImage)
  return [
    sample
    for task in tasks
    for sample in task(seed=seed, count=len(task.KINDS))
  ]


if __name__ == "__main__":
  contact_sheet().save(sys.argv[1])
