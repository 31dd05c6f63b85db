"""A text as a picture: its words in the cells of a grid, row by row."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from research.ranges import AtLeast, NonNegativeInt, PositiveInt, Ranged
from research.typing import Int, UInt8, UserError
from research.vlm.scenes import drawing

_WHITE = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordGrid(Ranged):
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

  columns: PositiveInt = 4
  rows: PositiveInt = 4
  cell: AtLeast(4) = 16
  capital: AtLeast(3) = 8
  scatter: NonNegativeInt = 3
  seed: int = 0

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
    picture = np.full((self.rows * cell, self.columns * cell), _WHITE, np.uint8)
    inks = [_ink(word, self.capital) for word in words]
    corners = self._corners(text, inks)
    for ink, (top, left) in zip(inks, corners.tolist(), strict=True):
      picture[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return np.repeat(picture[..., None], 3, axis=2)

  def _corners(
    self, text: str, inks: Sequence[UInt8[np.ndarray, "_ _"]]
  ) -> Int[np.ndarray, "words 2"]:
    """Returns where each word's picture begins: row and column."""
    sides = np.array([ink.shape for ink in inks]).reshape(-1, 2)
    room = self.cell - sides
    if (room < 0).any():
      at = int((room < 0).any(axis=1).argmax())
      raise UserError(
        f"WordGrid.cell: found {self.cell} pixels, and {text.split()[at]!r}"
        f" takes {sides[at].max()}; raise cell, or lower capital"
      )
    rng = np.random.default_rng([self.seed, zlib.crc32(text.encode())])
    shift = rng.uniform(-1, 1, sides.shape) * np.minimum(self.scatter, room / 2)
    cells = np.stack(np.divmod(np.arange(len(inks)), self.columns), axis=1)
    return cells * self.cell + np.round(room / 2 + shift).astype(int)


@functools.lru_cache(maxsize=4096)
def _ink(word: str, capital: int) -> UInt8[np.ndarray, "H W"]:
  left, top, right, bottom = drawing.text_box(0, 0, word, capital)
  canvas = Image.new("RGB", (right - left, bottom - top), drawing.BACKGROUND)
  drawing.write(ImageDraw.Draw(canvas), -left, -top, word, capital)
  return np.asarray(canvas.convert("L"))
