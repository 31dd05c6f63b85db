"""Tesseract, a reader that has not learned from our images: what pixels say.

A program of its own (Debian's `tesseract-ocr`), asked by a study's arm alone.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from research.typing import UInt8, UserError

PROGRAM = "tesseract"
_INK = 200
"""A pixel whose darkest channel is below this is ink."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tesseract:
  """Reads one line of dark text on white, wherever it is in an image.

  The line is cut out and enlarged: the manual's advice is capitals of 20 pixels
  and more, and finding a line is not what is asked.

  Attributes:
    height: of the ink after enlarging, in pixels.
    margin: around the ink, in units of its height.
  """

  height: int = 32
  margin: float = 0.6

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "H W 3"]], alphabet: str
  ) -> list[str]:
    """Returns what each image says, "" where nothing is read.

    Args:
      images: each with a line.
      alphabet: characters that may be there.

    Raises:
      UserError: the program is not installed, or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
      place = pathlib.Path(folder)
      files = [place / f"{i}.png" for i in range(len(images))]
      for file, image in zip(files, images, strict=True):
        self.line(image).save(file)
      # Pages of one run: starting the program takes longer than a line does.
      pages = place / "pages.txt"
      pages.write_text("".join(f"{file}\n" for file in files), "utf-8")
      said = _run([str(pages), "stdout", "--psm", "7"], alphabet)
    return _texts(said, len(images))

  def line(self, image: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    """Returns the part of an image that has ink, enlarged; or all of it."""
    ink = image.min(axis=-1) < _INK
    if not ink.any():
      return Image.fromarray(image)
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    high = rows[-1] - rows[0] + 1
    pad = max(2, round(self.margin * high))
    wide = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
    cut = wide[
      rows[0] : rows[-1] + 1 + 2 * pad, columns[0] : columns[-1] + 1 + 2 * pad
    ]
    scale = self.height / high
    size = [max(1, round(scale * side)) for side in (cut.shape[1], len(cut))]
    return Image.fromarray(cut).resize(size, Image.BICUBIC)


def _run(arguments: Sequence[str], alphabet: str) -> str:
  program = shutil.which(PROGRAM)
  if program is None:
    raise UserError(
      f"{PROGRAM}: not found, expected the program that reads text in images"
      " (on Debian: apt-get install tesseract-ocr). To run the models alone:"
      " --only='seed'"
    )
  settings = f"tessedit_char_whitelist={alphabet}", "tessedit_create_tsv=1"
  flags = [x for each in settings for x in ("-c", each)]
  done = subprocess.run(
    [program, *arguments, *flags],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "OMP_THREAD_LIMIT": "1"},
  )
  if done.returncode:
    raise UserError(f"{PROGRAM}: failed with {done.returncode}: {done.stderr}")
  return done.stdout


def _texts(table: str, count: int) -> list[str]:
  """Returns the words of each page, joined, from the program's table.

  A table, since an empty page leaves no mark in plain text.
  """
  head, *lines = [line.split("\t") for line in table.splitlines()] or [[]]
  if not {"level", "page_num", "text"} <= {*head}:
    raise UserError(
      f"{PROGRAM}: found the columns {head}, expected a table of words: is it"
      " version 4 or later?"
    )
  rows = [dict(zip(head, line, strict=False)) for line in lines]
  pages = {int(row["page_num"]) for row in rows}
  if pages != {*range(1, count + 1)}:
    raise UserError(
      f"{PROGRAM}: found {len(pages)} pages, expected {count}; run it again"
    )
  texts = [""] * count
  for row in rows:
    texts[int(row["page_num"]) - 1] += row.get("text", "").strip()
  return texts
