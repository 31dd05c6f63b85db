"""A task with an answer: the last word of a sentence, which was said before.

As in LAMBADA (Paperno et al. 2016, arXiv:1606.06031): a model reads some words
and must produce the next one, exactly. Kept are sentences whose last word is
long, and is among the words before them, so that who has followed can know it.
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
  """What is read, and the word that follows, with the space before it."""

  context: str
  answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWords:
  """Items of a text, in order.

  Attributes:
    source: documents, of which paragraphs of prose are read.
    words: that are read before the answer, at most.
    letters: of an answer, at least.
    limit: items at most, spread evenly over what there are; None for all.
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
        "LastWords: found no sentence that ends in a word said before; expected"
        " a text of prose"
      )
    if self.limit is None or self.limit >= len(found):
      return found
    return [found[k * len(found) // self.limit] for k in range(self.limit)]

  def _of(self, text: str) -> Iterator[Item]:
    read: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
      if not _prose(paragraph):
        read = []  # a table or a program: what follows is about it
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
  """Whether a paragraph begins at the margin, as a sentence does."""
  lines = paragraph.strip("\n").split("\n")
  straight = all(not line.startswith((" ", "\t")) for line in lines)
  return straight and paragraph.lstrip()[:1].isupper() and "." in paragraph
