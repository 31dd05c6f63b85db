"""Contamination check: overlap of evaluation documents with training data.

For each evaluation document: whether a training document equals it after
normalisation, and which share of its word n-grams occurs anywhere in the
training data (Brown et al. 2020, appendix C, use 13 words). All n-grams are
looked up by 64-bit hashes; unlike MinHash, this is not an estimate.
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

_LEAST = 8
"""Words of the shortest n-gram that says anything."""


@dataclasses.dataclass(frozen=True)
class Match:
  """An evaluation document that occurs in the training data, partly or wholly.

  Attributes:
    evaluation: index of the evaluation document.
    train: index of the training document with the largest overlap.
    share: share of its n-grams that occur anywhere in the training data.
    exact: whether that training document equals it.
  """

  evaluation: int
  train: int
  share: float
  exact: bool


@dataclasses.dataclass(frozen=True)
class Report:
  """The result of `compare`.

  Attributes:
    documents: number of evaluation documents.
    matches: those with any overlap, largest first.
    words: words in an n-gram.
  """

  documents: int
  matches: tuple[Match, ...]
  words: int

  def above(self, share: float) -> tuple[Match, ...]:
    """Returns the matches that are exact or overlap by at least `share`."""
    return tuple(m for m in self.matches if m.exact or m.share >= share)

  def table(self, limit: int = 10) -> str:
    """Returns a summary and the `limit` largest matches as text."""
    exact = sum(m.exact for m in self.matches)
    lines = [
      f"{self.documents} evaluation documents: {exact} are in the training"
      f" data, {len(self.matches)} share {self.words}-grams with it"
    ]
    lines += [
      f"  evaluation {m.evaluation} ~ train {m.train}: "
      + ("the same" if m.exact else f"{m.share:.1%} of its n-grams")
      for m in self.matches[:limit]
    ]
    return "\n".join(lines)

  def check(self, share: float = 0.5, allowed: float = 0.0) -> "Report":
    """Returns itself, or raises if the evaluation is contaminated.

    Args:
      share: overlap from which on a document counts as contaminated.
      allowed: maximum share of contaminated evaluation documents.

    Raises:
      UserError: more documents are contaminated.
    """
    known = self.above(share)
    if len(known) > allowed * self.documents:
      worst = known[0]
      raise UserError(
        f"data: {len(known)} of {self.documents} evaluation documents are in"
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
  """Compares an evaluation set with training data.

  Memory use grows with the evaluation set, not with the training data, which is
  read once.

  Args:
    words: words in an n-gram; a shorter document is one n-gram, which is
      searched for within training documents if it has 8 words at least (Brown
      et al. 2020, arXiv:2005.14165, appendix C), and else only as a whole one.
  """
  if words < 1:
    raise UserError(f"words: found {words}, expected at least 1.")
  short = {len(normalised(text)) for text in evaluation}
  sizes = {words} | {n for n in short if _LEAST <= n < words}
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
    within = (set(_grams(tokens, n)) for n in sizes if n <= len(tokens))
    for gram in set(_grams(tokens, words)).union(*within):
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
  """Returns the texts of a data source: documents or conversations.

  Raises:
    UserError: the source has no text, only tokens.
  """
  if hasattr(source, "texts"):
    return list(source.texts)
  if isinstance(source, Documents):
    return [source[i] for i in range(len(source))]
  raise UserError(f"{str(source)[:200]}: has no texts to compare, only tokens.")


def normalised(text: str) -> list[str]:
  """Returns the words of a text: NFKC, casefolded, without punctuation."""
  return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _grams(words: Sequence[str], n: int) -> Iterator[int]:
  if words:
    for i in range(max(1, len(words) - n + 1)):
      yield _hash(words[i : i + n])


def _hash(words: Sequence[str]) -> int:
  digest = hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big")
