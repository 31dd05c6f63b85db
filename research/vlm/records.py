"""Questions and conversations about image files, from JSON Lines.

    {"images": ["a.png", "b.jpg"], "question": "Which is red?", "answer": "1"}

A record with `messages` is a conversation, with images in parts of them:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type":
    "text", "text": "Which colour?"}]}, {"role": "assistant", "content":
    "Red."}], "images": ["a.png"]}

and one with `conversations` is LLaVA's, with images in human turns:

    {"image": "a.png", "conversations": [{"from": "human", "value":
    "<image>\\nWhich colour?"}, {"from": "gpt", "value": "Red."}]}

Plans of batches read the images' headers, and workers their pixels.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, overload

from research import progress
from research.data.rendering import Conversation
from research.data.sources import FromFiles, NoExamples, Paths, Split, jsonl
from research.data.sources.jsonl import Record
from research.typing import UserError
from research.vlm.data import AnySample
from research.vlm.images import decode
from research.vlm.images.prompts import MARK
from research.vlm.images.resize import Size
from research.vlm.prompts.conversations import ChatSample, join_texts
from research.vlm.scenes.sample import Sample

_ROLES = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
  "system": "system",
}
"""Who speaks in LLaVA's files -> the role of chat templates."""

_LLAVA_IMAGE = re.compile(rf"\n?{re.escape(MARK)}\n?")
"""An image in LLaVA's turns; templates say themselves what is around it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecords(FromFiles, Sequence[AnySample]):
  """Samples of JSON Lines files: images by path, and what is said of them.

  Attributes:
    paths: the files, see `sources.expand`.
    folder: where the images are; no record names one outside of it.
    images: field with a list of paths; a record without it is text alone.
    image: field with one path, or a list, where there is no `images`.
    answer: field of the answer.
    messages: field of a chat's messages, with images in parts of them.
    conversations: field of LLaVA's turns, with images at `<image>`.
    split: which records, by hash; None for all.
    key: field that decides the split; None for the whole record.
    max_pixels: of an image, see `open_image`.
  """

  paths: Paths
  folder: str
  images: str = "images"
  image: str = "image"
  question: str = "question"
  answer: str = "answer"
  messages: str = "messages"
  conversations: str = "conversations"
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
    _, files = self._read(record)
    for path in files:
      try:
        decode.image_size(path, self.max_pixels)
      except UserError as error:
        raise UserError(f"{record.where}: {error}") from error

  def __len__(self) -> int:
    return len(self.records)

  @overload
  def __getitem__(self, index: int) -> AnySample: ...
  @overload
  def __getitem__(self, index: slice) -> list[AnySample]: ...

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    sample, files = self._read(self.records[index])
    pixels = tuple(decode.open_image(path, self.max_pixels) for path in files)
    return dataclasses.replace(sample, images=pixels)

  def outline(self, index: int) -> tuple[AnySample, tuple[Size, ...]]:
    sample, files = self._read(self.records[index])
    sizes = tuple(decode.image_size(path, self.max_pixels) for path in files)
    return sample, sizes

  def _read(self, record: Record) -> tuple[AnySample, list[pathlib.Path]]:
    """Returns a sample without its images, and their files."""
    layouts = self.question, self.messages, self.conversations
    found = [field for field in layouts if record.get(field) is not None]
    if len(found) > 1:
      raise record.wrong(
        found[1], record.get(found[1]), f"none beside {found[0]!r}"
      )
    if not found:
      others = f"text, or {self.messages!r} or {self.conversations!r}"
      raise record.wrong(self.question, None, others)
    names = self._names(record)
    if found == [self.messages]:
      turns, inside = _messages(record, self.messages)
    elif found == [self.conversations]:
      turns, inside = _llava_turns(record, self.conversations)
    else:
      return self._question(record), self._files(record, names)
    conversation = Conversation(turns, record.where)
    own = [name for name in inside if name is not None]
    if own and (names or len(own) < len(inside)):
      raise UserError(
        f"{record.where}: field {found[0]!r}: found {len(own)} of"
        f" {len(inside)} images with a path, and {len(names)} paths beside"
        f" them, expected paths in all of them, or in {self.images!r} alone."
      )
    if len(inside) != len(own or names):
      raise UserError(
        f"{record.where}: field {found[0]!r}: found {len(inside)} images in"
        f" the user's turns and {len(names)} paths, expected as many of both."
        f"\nThe fields {self.images!r} and {self.image!r} have the paths."
      )
    return ChatSample((), conversation), self._files(record, own or names)

  def _question(self, record: Record) -> Sample:
    return Sample(
      images=(),
      question=record.text(self.question),
      answer=record.text(self.answer),
      kind="",
      stratum="",
      program={},
      objects=(),
    )

  def _names(self, record: Record) -> list[str]:
    field, found = self.images, record.get(self.images)
    if found is None and (found := record.get(self.image)) is not None:
      field, found = self.image, [found] if isinstance(found, str) else found
    found = [] if found is None else found
    if not isinstance(found, list) or not all(
      isinstance(x, str) and x for x in found
    ):
      raise record.wrong(field, record.get(field), "a list of paths")
    return found

  def _files(self, record: Record, names: list[str]) -> list[pathlib.Path]:
    folder = pathlib.Path(self.folder).resolve()
    files = [(folder / name).resolve() for name in names]
    for name, file in zip(names, files, strict=True):
      if not file.is_relative_to(folder):
        raise UserError(
          f"{record.where}: found the image {name[:200]!r}, expected a path"
          f" inside of {folder}.\nMove it there, or name another folder."
        )
    return files


Turns = tuple[list[dict[str, Any]], list[str | None]]
"""Messages with marks of images, and the path of each that has its own."""


def _llava_turns(record: Record, field: str) -> Turns:
  """Returns LLaVA's turns; only in a human's does a mark stand for an image."""
  messages, images = [], 0
  for turn in _objects(record, field):
    role, value = _ROLES.get(turn.text("from")), turn.text("value")
    if role is None:
      raise turn.wrong("from", turn.get("from"), f"one of {', '.join(_ROLES)}")
    texts = _LLAVA_IMAGE.split(value) if role == "user" else [value]
    images += len(texts) - 1
    messages.append({"role": role, "content": _joined(turn, texts)})
  return messages, [None] * images


def _messages(record: Record, field: str) -> Turns:
  """Returns a chat's messages; only a part of one stands for an image."""
  messages: list[dict[str, Any]] = []
  images: list[str | None] = []
  for turn in _objects(record, field):
    content = turn.get("content")
    if isinstance(content, list):
      texts = [""]
      for part in _objects(turn, "content"):
        if _is_image(part, turn.get("role")):
          texts.append("")
          images.append(_path(part))
        else:
          texts[-1] += part.text("text")
      content = _joined(turn, texts)
    elif isinstance(content, str):
      content = _joined(turn, [content])
    messages.append({**turn.values, "content": content})
  return messages, images


def _objects(record: Record, field: str) -> Iterator[Record]:
  """Yields the objects in a list, each as a record that knows its place."""
  found = record.get(field)
  if not isinstance(found, list):
    raise record.wrong(field, found, "a list of objects")
  for i, each in enumerate(found):
    if not isinstance(each, dict):
      raise record.wrong(f"{field}[{i}]", each, "an object")
    yield Record(each, f"{record.where}: {field}[{i}]")


def _is_image(part: Record, role: Any) -> bool:
  kind = part.text("type")
  if kind not in ("text", "image"):
    raise part.wrong("type", kind, "'text' or 'image'")
  if kind == "image" and role != "user":
    raise part.wrong("type", kind, "'text': only the user's turns have images")
  return kind == "image"


def _path(part: Record) -> str | None:
  if part.get("url") is not None:
    raise part.wrong("url", part.get("url"), "'path', of a file in the folder")
  for field in ("image", "path"):
    found = part.get(field)
    if found is not None and (not isinstance(found, str) or not found):
      raise part.wrong(field, found, "a path")
    if found is not None:
      return found
  return None


def _joined(turn: Record, texts: list[str]) -> str:
  try:
    return join_texts(texts)
  except UserError as error:
    raise UserError(f"{turn.where}: {error}") from error
