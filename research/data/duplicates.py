"""Does the evaluation stand in the training data?

Two questions a document of the evaluation: is it, normalised, a training
document word for word; and which share of its n-grams of words stands
somewhere in the training data (Brown et al. 2020, appendix C, use 13 words)?
Both are exact: all n-grams are looked up, by 64-bit hashes, where sketches
such as MinHash estimate.
"""

import collections
import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from research.data.sources import Documents
from research.typing import UserError

WORDS = 13
"""Words in an n-gram."""


@dataclasses.dataclass(frozen=True)
class Match:
  """An evaluation document that training data holds, in part or whole.

  Attributes:
    evaluation: its number.
    train: number of the training document that shares most with it.
    share: of its n-grams that stand anywhere in the training data.
    exact: whether that training document is the same.
  """

  evaluation: int
  train: int
  share: float
  exact: bool


@dataclasses.dataclass(frozen=True)
class Report:
  """What `compare` found.

  Attributes:
    documents: how many evaluation documents were looked up.
    matches: those that share anything, the worst first.
    words: words in an n-gram.
  """

  documents: int
  matches: tuple[Match, ...]
  words: int

  def above(self, share: float) -> tuple[Match, ...]:
    """Returns the matches that are exact, or share at least so much."""
    return tuple(m for m in self.matches if m.exact or m.share >= share)

  def table(self, limit: int = 10) -> str:
    """Returns the worst matches as text."""
    exact = sum(m.exact for m in self.matches)
    lines = [
      f"{self.documents} evaluation documents: {exact} stand in the training"
      f" data, {len(self.matches)} share {self.words}-grams with it"
    ]
    lines += [
      f"  evaluation {m.evaluation} ~ train {m.train}: "
      + ("the same" if m.exact else f"{m.share:.1%} of its n-grams")
      for m in self.matches[:limit]
    ]
    return "\n".join(lines)

  def check(self, share: float = 0.5, allowed: float = 0.0) -> "Report":
    """Returns itself if few enough documents are in the training data.

    Args:
      share: of a document's n-grams, from which on it counts as known.
      allowed: share of the evaluation documents that may be known.

    Raises:
      UserError: more are.
    """
    known = self.above(share)
    if len(known) > allowed * self.documents:
      worst = known[0]
      raise UserError(
        f"data: {len(known)} of {self.documents} evaluation documents stand in"
        f" the training data (at least {share:.0%} of their"
        f" {self.words}-grams), expected at most {allowed:.1%} of them;"
        f" the first is number {worst.evaluation}, like training document"
        f" {worst.train}.\n"
        "Split by a key that keeps copies together, or remove them."
      )
    return self


def compare(
  train: Iterable[str], evaluation: Sequence[str], words: int = WORDS
) -> Report:
  """Returns what of the evaluation stands in the training data.

  The memory that it takes grows with the evaluation, not with the training
  data, which is read once.

  Args:
    train: training documents.
    evaluation: evaluation documents.
    words: words in an n-gram; a shorter document is one n-gram.
  """
  if words < 1:
    raise UserError(f"words: found {words}, expected at least 1.")
  wanted = [set(_grams(normalised(text), words)) for text in evaluation]
  holders: dict[int, list[int]] = collections.defaultdict(list)
  wholes: dict[int, list[int]] = collections.defaultdict(list)
  for i, text in enumerate(evaluation):
    wholes[_hash(normalised(text))].append(i)
    for gram in wanted[i]:
      holders[gram].append(i)
  seen: list[set[int]] = [set() for _ in evaluation]
  same: dict[int, int] = {}
  best = [(0, -1)] * len(evaluation)
  for number, text in enumerate(train):
    tokens = normalised(text)
    for i in wholes.get(_hash(tokens), ()):
      same.setdefault(i, number)
    shared = collections.Counter()
    for gram in set(_grams(tokens, words)):
      for i in holders.get(gram, ()):
        shared[i] += 1
        seen[i].add(gram)
    for i, count in shared.items():
      best[i] = max(best[i], (count, number), key=lambda x: x[0])
  matches = [
    Match(i, same.get(i, best[i][1]), len(seen[i]) / len(wanted[i]), i in same)
    for i in range(len(evaluation))
    if wanted[i] and (seen[i] or i in same)
  ]
  matches.sort(key=lambda m: (not m.exact, -m.share, m.evaluation))
  return Report(len(evaluation), tuple(matches), words)


def source_texts(source: Any) -> list[str]:
  """Returns the texts of a source, whatever shape it gives them.

  Raises:
    UserError: it has none: arrays of tokens, or synthetic ones.
  """
  if hasattr(source, "texts"):
    return list(source.texts)
  if isinstance(source, Documents):
    return [source[i] for i in range(len(source))]
  raise UserError(f"{str(source)[:200]}: has no texts to compare, only tokens.")


def normalised(text: str) -> list[str]:
  """Returns the words of a text: NFKC, without case and punctuation."""
  return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _grams(words: Sequence[str], n: int) -> Iterator[int]:
  if words:
    for i in range(max(1, len(words) - n + 1)):
      yield _hash(words[i : i + n])


def _hash(words: Sequence[str]) -> int:
  digest = hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big")
