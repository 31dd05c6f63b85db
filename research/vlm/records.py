"""Questions about image files, from JSON Lines.

    {"images": ["a.png", "b.jpg"], "question": "Which is red?", "answer": "1"}

Plans of batches read the images' headers, and workers their pixels.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import overload

from research import progress
from research.data.sources import FromFiles, NoExamples, Paths, Split, jsonl
from research.data.sources.jsonl import Record
from research.typing import UserError
from research.vlm.images import decode
from research.vlm.images.resize import Size
from research.vlm.scenes.sample import Sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecords(FromFiles, Sequence[Sample]):
  """Samples of JSON Lines files: images by path, a question, an answer.

  Attributes:
    paths: the files, see `sources.expand`.
    folder: where the images are; no record names one outside of it.
    images: field with a list of paths; a record without it is text alone.
    question: field of the question.
    answer: field of the answer.
    split: which records, by hash; None for all.
    key: field that decides the split; None for the whole record.
    max_pixels: of an image, see `open_image`.
  """

  paths: Paths
  folder: str
  images: str = "images"
  question: str = "question"
  answer: str = "answer"
  split: Split | None = None
  key: str | None = None
  max_pixels: int = decode.MAX_PIXELS

  @functools.cached_property
  def records(self) -> list[Record]:
    """The records, read from the files once; a split may have none."""
    try:
      return jsonl.read(self.paths, self.split, self.key)
    except NoExamples:
      return []

  def check_files(self) -> None:
    """Checks the fields of all records, and the headers of their images.

    Raises:
      UserError: a field is wrong, or an image cannot be read.
    """
    with progress.phase("checking images"):
      jsonl.check_files(self.paths, self.key, self._check)

  def _check(self, record: Record) -> None:
    self._text(record)
    for path in self._files(record):
      try:
        decode.image_size(path, self.max_pixels)
      except UserError as error:
        raise UserError(f"{record.where}: {error}") from error

  def __len__(self) -> int:
    return len(self.records)

  @overload
  def __getitem__(self, index: int) -> Sample: ...
  @overload
  def __getitem__(self, index: slice) -> list[Sample]: ...

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    record = self.records[index]
    pixels = tuple(
      decode.open_image(path, self.max_pixels) for path in self._files(record)
    )
    return dataclasses.replace(self._text(record), images=pixels)

  def outline(self, index: int) -> tuple[Sample, tuple[Size, ...]]:
    """Returns a sample without its images, and their sizes by their headers."""
    record = self.records[index]
    sizes = tuple(
      decode.image_size(path, self.max_pixels) for path in self._files(record)
    )
    return self._text(record), sizes

  def _text(self, record: Record) -> Sample:
    return Sample(
      images=(),
      question=record.text(self.question),
      answer=record.text(self.answer),
      kind="",
      stratum="",
      program={},
      objects=(),
    )

  def _files(self, record: Record) -> list[pathlib.Path]:
    found = record.get(self.images)
    found = [] if found is None else found
    if not isinstance(found, list) or not all(
      isinstance(x, str) and x for x in found
    ):
      raise record.wrong(self.images, found, "a list of paths")
    folder = pathlib.Path(self.folder).resolve()
    files = [(folder / name).resolve() for name in found]
    for name, file in zip(found, files, strict=True):
      if not file.is_relative_to(folder):
        raise UserError(
          f"{record.where}: found the image {name[:200]!r}, expected a path"
          f" inside of {folder}.\nMove it there, or name another folder."
        )
    return files
