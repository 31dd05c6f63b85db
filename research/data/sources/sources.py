"""Text sources: random-access sequences of documents, and train/eval splits.

A source has a length, and `source[i]` is one document, a `str`. It is a frozen
dataclass, so that experiments can print and compare it.
"""

import dataclasses
import functools
import hashlib
import pathlib
from typing import Literal, Protocol, runtime_checkable

from research.typing import UserError

Split = Literal["train", "validation", "heldout"]


@runtime_checkable
class Documents(Protocol):
  """A random-access sequence of documents."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> str: ...


def split_of(name: str) -> Split:
  """Returns the split of a document by a hash of its name alone.

  80% of the names are `train`, 10% `validation`, 10% `heldout`. Adding or
  removing documents never moves another one to a different split.
  """
  digest = hashlib.sha256(name.encode("utf-8")).digest()
  share = int.from_bytes(digest[:8], "big") / 2**64
  return "train" if share < 0.8 else "validation" if share < 0.9 else "heldout"


@dataclasses.dataclass(frozen=True)
class PydocTopics:
  """The Python language reference, which ships with every interpreter.

  Attributes:
    split: which topics, by `split_of` of the topic's name.
  """

  split: Split = "train"

  @property
  def names(self) -> tuple[str, ...]:
    """The topics' names, sorted."""
    return _names(self.split)

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> str:
    return _topics()[self.names[index]]


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """UTF-8 text files, one document each.

  Attributes:
    paths: the files.
  """

  paths: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> str:
    return read_text(self.paths[index])


def read_text(path: str) -> str:
  """Reads a UTF-8 text file.

  Raises:
    UserError: the file is missing, not UTF-8, or empty.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f"{path}: cannot be read ({error.strerror}).\n"
      "Expected a UTF-8 text file; check the path."
    ) from error
  try:
    text = data.decode("utf-8-sig")  # drops a byte order mark
  except UnicodeDecodeError as error:
    raise UserError(
      f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset"
      f" {error.start}.\n"
      "Expected UTF-8 text; convert it, e.g. with iconv -t UTF-8."
    ) from error
  if not text.strip():
    raise UserError(f"{path}: holds no text. Expected a non-empty text file.")
  return text


@functools.cache
def _names(split: Split) -> tuple[str, ...]:
  return tuple(n for n in sorted(_topics()) if split_of(n) == split)


def _topics() -> dict[str, str]:
  # Imported here: half a megabyte that only this source needs.
  from pydoc_data import topics

  return topics.topics
