"""Text sources: random-access sequences of documents, and train/eval splits.

A source has a length, and `source[i]` is one document, a `str`. It is a frozen
dataclass, so that experiments can print and compare it.
"""

import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from research.errors import UserError

Split = Literal["train", "validation", "heldout"]

PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "heldout": (0.9, 1.0)}
"""From where to where each split of one text reaches, as shares of it."""

Paths = str | Sequence[str]
"""A file, or several; `*`, `?` and `[...]` stand for the files they match."""


class NoExamples(UserError):
  """A split of a source, or all of it, has nothing to learn or to predict.

  An experiment goes on without an evaluation that has none.
  """


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


def expand(paths: Paths) -> list[str]:
  """Returns the files that `paths` names, sorted where a pattern matches.

  Raises:
    UserError: a pattern matches no file, or there are no paths.
  """
  found: list[str] = []
  for path in (paths,) if isinstance(paths, str) else paths:
    # A file whose name has such a character is that file.
    plain = glob.escape(path) == path or os.path.exists(path)
    files = [path] if plain else sorted(glob.glob(path, recursive=True))
    if not files:
      raise UserError(
        f"{path}: matches no file.\nExpected a path, or a pattern such as"
        " notes/*.txt; check the folder."
      )
    found += files
  if not found:
    raise UserError("paths: found none, expected at least one file")
  return found


def files_sha256(paths: Paths) -> str | None:
  """Returns a hash of the files' contents, in order; None if none has any.

  Named pipes and devices are left out: they can be read but once.

  Raises:
    UserError: a file cannot be read.
  """
  files = [path for path in expand(paths) if os.path.isfile(path)]
  if not files:
    return None
  try:
    each = [_file_sha256(path, _identity(path)) for path in files]
  except OSError as error:
    raise UserError(
      f"{error.filename}: cannot be read ({error.strerror}).\n"
      "Expected the file that the run reads; check the path."
    ) from error
  return hashlib.sha256("\n".join(each).encode()).hexdigest()


def is_stream(path: str) -> bool:
  """Whether a path is a pipe or a device, which can be read only once."""
  file = pathlib.Path(path)
  return file.is_fifo() or file.is_char_device()


def _identity(path: str) -> tuple[int, ...]:
  found = os.stat(path)
  return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _file_sha256(path: str, identity: tuple[int, ...]) -> str:
  """Reads a file once, though several splits of it are sources."""
  del identity
  with pathlib.Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class FromFiles:
  """Base of sources that read the files `paths`."""

  paths: Paths

  def check_files(self) -> None:
    """Checks what needs no model, in all splits; here that files can be read.

    Raises:
      UserError: a file cannot be read, or a record of it is wrong.
    """
    files_sha256(self.paths)

  @property
  def sha256(self) -> str | None:
    """A hash of the files, to identify them; see `files_sha256`."""
    return files_sha256(self.paths)


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
class TextFiles(FromFiles):
  """UTF-8 text files, one document each.

  Attributes:
    paths: the files.
    split: which part of each file: the first 80%, the next or the last 10% of
      its characters, cut at the ends of lines; None for all of it.
  """

  paths: Paths
  split: Split | None = None

  def __len__(self) -> int:
    return len(self.texts)

  def __getitem__(self, index: int) -> str:
    return self.texts[index]

  def check_files(self) -> None:
    """Raises UserError if a file is missing, empty, not UTF-8 or JSON Lines."""
    for path in expand(self.paths):
      if not is_stream(path):
        _check_prose(read_text(path), path)

  @functools.cached_property
  def texts(self) -> list[str]:
    """The documents, without those that are empty in this split.

    Raises:
      NoExamples: all of them are.
      UserError: a file cannot be read.
    """
    files = expand(self.paths)
    whole = [read_text(path) for path in files]
    for text, path in zip(whole, files, strict=True):
      _check_prose(text, path)
    if self.split is None:
      return whole
    parts = [text_part(text, self.split) for text in whole]
    found = [part for part in parts if part.strip()]
    if not found:
      raise NoExamples(
        f"{', '.join(files)[:200]}: too short for a split {self.split!r}.\n"
        "Give more text, of several lines."
      )
    return found


def _check_prose(text: str, path: str) -> None:
  """Raises UserError where each of a text's first lines is a JSON object."""
  lines = list(itertools.islice(filter(str.strip, text.splitlines()), 3))
  try:
    records = [json.loads(line) for line in lines]
  except (ValueError, RecursionError):
    return
  if all(isinstance(record, dict) for record in records):
    fields = ", ".join(list(records[0])[:4])
    raise UserError(
      f"{path}: found JSON Lines of {fields}, expected text: braces"
      " and field names would be learned.\nUse --config=runs/data/"
      "text_jsonl.gin, or chat.gin, completions.gin or preferences.gin there."
    )


def text_part(text: str, split: Split) -> str:
  """Returns the lines of a text whose middles are in a split's share of it."""
  first, last = (share * len(text) for share in PARTS[split])
  end, kept = 0, []
  for line in text.splitlines(keepends=True):
    end += len(line)
    if first <= end - len(line) / 2 < last:
      kept.append(line)
  return "".join(kept)


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
      f" {error.start}.\n{convert_hint(data)}"
    ) from error
  if not text.strip():
    raise UserError(f"{path}: holds no text. Expected a non-empty text file.")
  return text


def convert_hint(data: bytes) -> str:
  """Returns how to convert a file to UTF-8, from its first bytes."""
  found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "ENCODING"
  return f"Expected UTF-8 text; convert it: iconv -f {found} -t UTF-8."


@functools.cache
def _names(split: Split) -> tuple[str, ...]:
  return tuple(n for n in sorted(_topics()) if split_of(n) == split)


def _topics() -> dict[str, str]:
  # Imported here: half a megabyte that only this source needs.
  from pydoc_data import topics

  return topics.topics
