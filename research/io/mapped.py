"""Bytes of a file that are mapped when they are read, and no longer.

Pages of a mapping stay in the process's memory for as long as it exists. So
each look makes a mapping of its own, which ends with the last array that
views it: files larger than the memory pass through in pieces.
"""

import dataclasses
import mmap
import os
import pathlib
import weakref

import numpy as np

from research.typing import UserError


class _File:
  """An open file, closed with the last piece of it."""

  def __init__(self, path: pathlib.Path):
    self.path, file = path, path.open("rb")
    weakref.finalize(self, file.close)
    self.number = file.fileno()


@dataclasses.dataclass(frozen=True, eq=False)
class Bytes:
  """A piece of a file.

  Attributes:
    file: open.
    start, stop: where in it, in bytes.
  """

  file: _File = dataclasses.field(repr=False)
  start: int
  stop: int

  @property
  def size(self) -> int:
    return self.stop - self.start

  def part(self, start: int, stop: int) -> "Bytes":
    """Returns bytes `start` to `stop` of this piece."""
    if not 0 <= start <= stop <= self.size:
      raise ValueError(f"bytes {start} to {stop} of {self.size}")
    return Bytes(self.file, self.start + start, self.start + stop)

  def array(self) -> np.ndarray:
    """Returns a read-only view, uint8 `[size]`; only used pages are read.

    Raises:
      UserError: the file has become shorter since it was opened.
    """
    if not self.size:
      return np.zeros(0, np.uint8)
    skipped = self.start % mmap.ALLOCATIONGRANULARITY
    try:
      pages = mmap.mmap(
        self.file.number,
        self.size + skipped,
        access=mmap.ACCESS_READ,
        offset=self.start - skipped,
      )
    except (OSError, ValueError) as e:
      raise UserError(
        f"{self.file.path}: bytes {self.start} to {self.stop} cannot be read "
        f"any more ({e}); expected the file to stay as it was when opened"
      ) from e
    return np.frombuffer(pages, np.uint8, self.size, skipped)


def open_bytes(path: str | os.PathLike) -> Bytes:
  """Returns all of a file.

  Raises:
    OSError: it cannot be opened.
  """
  file = _File(pathlib.Path(path))
  return Bytes(file, 0, os.fstat(file.number).st_size)
