"""Last-word prediction task, in the style of LAMBADA.

As in LAMBADA (Paperno et al. 2016, arXiv:1606.06031), a model reads a context
and must produce the next word exactly. Selects sentences whose last word is
long and occurs in the preceding context, so that it can be inferred.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

from research.data.sources import Documents
from research.typing import UserError

_END = re.compile(
  r"(?<=[a-z)`”\"])\s+([A-Za-z][A-Za-z-]*[a-z])\.(?=\s+[A-Z]|\s*$)"
)
_WORD = re.compile(r"[A-Za-z][A-Za-z-]*[a-z]")


class Item(NamedTuple):
  """A context, and the next word with its leading space."""

  context: str
  answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWords:
  """Last-word items of a text, in order.

  Attributes:
    source: documents; only paragraphs of prose are used.
    words: maximum number of words in the context.
    letters: minimum number of letters of an answer.
    limit: maximum number of items, selected evenly; None for all.
  """

  source: Documents
  words: int = 60
  letters: int = 5
  limit: int | None = None

  def __post_init__(self):
    for name in ("words", "letters"):
      if getattr(self, name) < 2:
        raise UserError(
          f"LastWords.{name}: found {getattr(self, name)}, expected at least 2"
        )

  def items(self) -> list[Item]:
    """Returns the items.

    Raises:
      UserError: the text has none.
    """
    found = [
      x for i in range(len(self.source)) for x in self._of(self.source[i])
    ]
    if not found:
      raise UserError(
        "LastWords: found no sentence whose last word occurs before; expected"
        " a text of prose"
      )
    if self.limit is None or self.limit >= len(found):
      return found
    return [found[k * len(found) // self.limit] for k in range(self.limit)]

  def _of(self, text: str) -> Iterator[Item]:
    read: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
      if not _prose(paragraph):
        read = []  # a table or code, which the following text refers to
        continue
      flat = " ".join(paragraph.split())
      for end in _END.finditer(flat):
        before = " ".join([*read, flat[: end.start()]]).split(" ")
        context = " ".join(before[-self.words :])
        answer = end.group(1)
        known = {w.lower() for w in _WORD.findall(context)}
        if len(answer) >= self.letters and answer.lower() in known:
          yield Item(context, " " + answer)
      read.append(flat)


def _prose(paragraph: str) -> bool:
  """Whether a paragraph looks like prose: not indented, with a sentence."""
  lines = paragraph.strip("\n").split("\n")
  straight = all(not line.startswith((" ", "\t")) for line in lines)
  return straight and paragraph.lstrip()[:1].isupper() and "." in paragraph
