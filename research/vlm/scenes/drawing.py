"""Pictures of objects, drawn by Pillow four times as large and reduced.

Everything takes and returns pixels of the final image.
"""

import functools
import importlib.util
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from research.typing import UInt8, UserError
from research.vlm.scenes.sample import Box, Object

COLOURS = {
  "red": (220, 30, 30),
  "green": (30, 150, 50),
  "blue": (40, 70, 220),
  "yellow": (240, 210, 30),
  "purple": (140, 50, 170),
  "orange": (245, 140, 20),
  "cyan": (40, 190, 210),
  "black": (20, 20, 20),
}
BACKGROUND = (255, 255, 255)
SCALE = 4
"""Pixels that are drawn for each pixel of the result, along a side."""

_TURN = 2 * math.pi


def _polygon(corners: int, inner: float = 1.0):
  """Returns the corners of a regular polygon, or of a star, in [-1, 1]."""
  steps = corners if inner == 1 else 2 * corners
  return [
    (
      (inner if i % 2 else 1) * math.sin(_TURN * (i / steps)),
      -(inner if i % 2 else 1) * math.cos(_TURN * (i / steps)),
    )
    for i in range(steps)
  ]


_T = 0.36
POLYGONS: dict[str, list[tuple[float, float]]] = {
  "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
  "triangle": [(0.0, -0.95), (0.98, 0.85), (-0.98, 0.85)],
  "diamond": _polygon(4),
  "star": _polygon(5, inner=0.42),
  "cross": [
    *((-_T, -1), (_T, -1), (_T, -_T), (1, -_T), (1, _T), (_T, _T)),
    *((_T, 1), (-_T, 1), (-_T, _T), (-1, _T), (-1, -_T), (-_T, -_T)),
  ],
}
SHAPES = ("circle", *POLYGONS)


def scene(
  objects: Sequence[Object], width: int, height: int
) -> UInt8[np.ndarray, "H W 3"]:
  """Returns coloured shapes on white, the later ones in front."""
  canvas = Image.new("RGB", (SCALE * width, SCALE * height), BACKGROUND)
  draw = ImageDraw.Draw(canvas)
  for x in objects:
    left, top, right, bottom = (SCALE * side for side in x.box)
    colour = COLOURS[x.colour]
    if x.name == "circle":
      draw.ellipse((left, top, right - 1, bottom - 1), fill=colour)
      continue
    half_w, half_h = (right - left) / 2, (bottom - top) / 2
    draw.polygon(
      [
        (left + half_w * (1 + u), top + half_h * (1 + v))
        for u, v in POLYGONS[x.name]
      ],
      fill=colour,
    )
  return reduced(canvas)


def reduced(canvas: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
  """Returns a canvas that was drawn `SCALE` times as large."""
  return np.asarray(canvas.reduce(SCALE))


def named(colours: Sequence[str], where: str) -> None:
  """Raises UserError unless every colour has a name here."""
  for x in colours:
    if x not in COLOURS:
      raise UserError(
        f"{where}: found {x!r}, expected some of {', '.join(COLOURS)}."
      )


# Text ------------------------------------------------------------------------

_CAPITAL = 0.729
"""Height of DejaVu Sans' capital letters, in units of the font's size."""


@functools.lru_cache(maxsize=64)
def font(height: int) -> ImageFont.FreeTypeFont:
  """Returns DejaVu Sans whose capital letters are `height` pixels high.

  Matplotlib's copy of it, so that all machines draw the same.
  """
  found = importlib.util.find_spec("matplotlib")
  folder = pathlib.Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
  # The basic layout needs no library that some builds of Pillow lack.
  return ImageFont.truetype(
    str(folder / "DejaVuSans.ttf"),
    height / _CAPITAL,
    layout_engine=ImageFont.Layout.BASIC,
  )


def text_box(x: int, y: int, text: str, height: int) -> Box:
  """Returns what text takes whose capitals stand on line `y + height`."""
  left, top, right, bottom = font(height).getbbox(text, anchor="ls")
  return (
    x + math.floor(left),
    y + height + math.floor(top),
    x + math.ceil(right),
    y + height + math.ceil(bottom),
  )


def write(
  draw: ImageDraw.ImageDraw, x: int, y: int, text: str, height: int
) -> None:
  """Writes black text whose capitals reach from line `y` to `y + height`."""
  draw.text((x, y + height), text, (0, 0, 0), font(height), anchor="ls")
