"""Text corpus from the Python standard library, available on every machine.

Python sources and the topics of the language reference, about 9 MB. The text
changes with each release of Python, so results should record `sha256`.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sysconfig

from research.data.sources import PydocTopics, Split, split_of
from research.typing import UserError

LEFT_OUT = (
  # Folders that some distributions of Python omit or package separately.
  *("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip"),
  *("lib2to3", "distutils", "site-packages", "dist-packages"),
  # Tables, and the reference's text, which is included as topics.
  *("encodings", "pydoc_data", "__phello__"),
)
"""Folders that are excluded from the corpus."""

GENERATED = ("_sysconfig", "sitecustomize", "usercustomize")
"""Name prefixes of files that are specific to the machine."""


@dataclasses.dataclass(frozen=True)
class Stdlib:
  """Sources of the standard library and topics of the language reference.

  Documents are ordered by a hash of their names, so the first few are a random
  sample. Each file belongs to one split as a whole.

  Attributes:
    split: which documents, by `split_of` of the name, e.g. `json/decoder.py`
      or `topics/with`.
    size: maximum number of characters of a document; longer ones are truncated
      at a line end.
    limit: maximum number of documents; None for all.
  """

  split: Split = "train"
  size: int = 200_000
  limit: int | None = None

  @property
  def names(self) -> tuple[str, ...]:
    """The documents' names, in order."""
    return _names(self.split)[: self.limit]

  @property
  def sha256(self) -> str:
    """A hash of all documents, to identify the corpus."""
    digest = hashlib.sha256()
    for i, name in enumerate(self.names):
      text = self[i].encode("utf-8")
      digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> str:
    text = _corpus()[self.names[index]]
    if len(text) <= self.size:
      return text
    return text[: text.rfind("\n", 0, self.size) + 1] or text[: self.size]


@functools.cache
def _names(split: Split) -> tuple[str, ...]:
  found = (name for name in _corpus() if split_of(name) == split)
  # Not the hash that decides the split, whose values differ between splits.
  return tuple(
    sorted(found, key=lambda n: hashlib.sha256(b"order " + n.encode()).digest())
  )


@functools.cache
def _corpus() -> dict[str, str]:
  """Returns name -> text of every non-empty document."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  out = {}
  for path in sorted(root.rglob("*.py")):
    name = path.relative_to(root)
    if {*name.parts[:-1]} & {*LEFT_OUT} or name.name.startswith(GENERATED):
      continue
    try:
      text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
      continue  # unreadable, or one of the few in another encoding
    if text.strip():
      out[name.as_posix()] = text.replace("\r\n", "\n")
  if not out:
    raise UserError(
      f"{root}: holds no sources of the standard library.\n"
      "Expected a folder of .py files; use a Python that keeps them in one."
    )
  for split in Split.__args__:
    topics = PydocTopics(split)
    out |= {f"topics/{n}": topics[i] for i, n in enumerate(topics.names)}
  return out
