"""A text as a picture: its words in the cells of a grid, row by row."""

import dataclasses
import functools
import zlib

import numpy as np
from PIL import Image, ImageDraw

from research.typing import UInt8, UserError
from research.vlm.scenes import drawing

_WHITE = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordGrid:
  """Draws a text's words, black on white, each within a cell of its own.

  Where in its cell a word stands is drawn at random from the text, so a text
  has one picture, and a word many.

  Attributes:
    columns, rows: of the grid; a text has at most as many words as cells.
    cell: side of a cell, in pixels.
    capital: height of capital letters and figures, in pixels.
    scatter: how far a word may stand from where it would without, in pixels,
      along each axis; as far as the cell has room.
    seed: of the places.
  """

  columns: int = 4
  rows: int = 4
  cell: int = 16
  capital: int = 8
  scatter: int = 3
  seed: int = 0

  def __post_init__(self):
    for name, least in dict(columns=1, rows=1, cell=4, capital=3).items():
      if getattr(self, name) < least:
        raise UserError(
          f"WordGrid.{name}: found {getattr(self, name)}, expected at least"
          f" {least}"
        )
    if self.scatter < 0:
      raise UserError(
        f"WordGrid.scatter: found {self.scatter}, expected at least 0"
      )

  def __call__(self, text: str) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the picture, `rows * cell` by `columns * cell` pixels.

    Raises:
      UserError: the text has more words than there are cells, or a word is
        larger than a cell.
    """
    words, cell = text.split(), self.cell
    if len(words) > self.columns * self.rows:
      raise UserError(
        f"WordGrid: found the {len(words)} words of {text!r:.60}, expected at"
        f" most {self.columns * self.rows}, one a cell; raise rows or columns"
      )
    rng = np.random.default_rng([self.seed, zlib.crc32(text.encode())])
    picture = np.full((self.rows * cell, self.columns * cell), _WHITE, np.uint8)
    for i, word in enumerate(words):
      ink = _ink(word, self.capital)
      top, left = (
        self._place(word, side, float(x))
        for side, x in zip(ink.shape, rng.uniform(-1, 1, 2), strict=True)
      )
      top, left = (
        top + i // self.columns * cell,
        left + i % self.columns * cell,
      )
      picture[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return np.repeat(picture[..., None], 3, axis=2)

  def _place(self, word: str, side: int, x: float) -> int:
    """Returns where in a cell a word of so many pixels begins."""
    room = self.cell - side
    if room < 0:
      raise UserError(
        f"WordGrid.cell: found {self.cell} pixels, and {word!r} takes {side};"
        " raise cell, or lower capital"
      )
    return round(room / 2 + x * min(self.scatter, room / 2))


@functools.lru_cache(maxsize=4096)
def _ink(word: str, capital: int) -> UInt8[np.ndarray, "H W"]:
  """Returns a word's picture, cut at its edges."""
  left, top, right, bottom = drawing.text_box(0, 0, word, capital)
  canvas = Image.new("RGB", (right - left, bottom - top), drawing.BACKGROUND)
  drawing.write(ImageDraw.Draw(canvas), -left, -top, word, capital)
  return np.asarray(canvas.convert("L"))
