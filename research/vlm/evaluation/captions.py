"""Captions: CIDEr-D, and CHAIR's count of objects that are not there."""

import collections
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from research.typing import UserError

_N = 4
_SIGMA = 6.0
_SCALE = 10.0

Counts = collections.Counter[tuple[str, ...]]


def _ngrams(text: str) -> list[Counts]:
  words = text.split()
  return [
    collections.Counter(
      tuple(words[i : i + n]) for i in range(len(words) - n + 1)
    )
    for n in range(1, _N + 1)
  ]


def cider_d(
  captions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
  """Returns CIDEr-D of each caption; a benchmark's score is their mean.

  Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation",
  equations 1 to 4, with n-grams of 1 to 4 words, sigma of 6 words, document
  frequencies over all images' references, and a scale of 10. As in the
  authors' code, the lengths of the Gaussian penalty count bigrams.

  Args:
    captions: one an image, tokenised: lower case, words between spaces.
    references: of each image, one at least.

  Raises:
    UserError: not equally many of both, or an image without references.
  """
  if len(captions) != len(references) or not all(map(len, references)):
    raise UserError(
      f"cider_d: found {len(captions)} captions and {len(references)} lists of"
      " references, expected as many, and a reference at least in each."
    )
  cooked = [[_ngrams(x) for x in texts] for texts in references]
  frequency = collections.Counter(
    gram
    for texts in cooked
    for gram in {gram for text in texts for grams in text for gram in grams}
  )
  images = math.log(len(captions)) if captions else 0.0

  def weighted(counts: Counts) -> dict[tuple[str, ...], float]:
    return {
      gram: count * (images - math.log(max(1, frequency[gram])))
      for gram, count in counts.items()
    }

  scores = []
  for caption, texts in zip(captions, cooked, strict=True):
    grams = _ngrams(caption)
    total = 0.0
    for text in texts:
      delta = grams[1].total() - text[1].total()
      penalty = math.exp(-(delta**2) / (2 * _SIGMA**2))
      for mine, theirs in zip(grams, text, strict=True):
        total += penalty * _similarity(weighted(mine), weighted(theirs))
    scores.append(_SCALE * total / _N / len(texts))
  return scores


def _similarity(mine: dict, theirs: dict) -> float:
  """Returns the cosine, whose first vector is clipped to the second."""
  norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
  shared = sum(
    min(weight, theirs[gram]) * theirs[gram]
    for gram, weight in mine.items()
    if gram in theirs
  )
  return shared / norm if norm else 0.0


class Chair(NamedTuple):
  """Hallucinated objects in captions (Rohrbach et al. 2018, equation 1).

  Attributes:
    instances: CHAIR_i: share of mentioned objects that are not there.
    sentences: CHAIR_s: share of captions that mention one.
    recall: share of objects there that are mentioned.
    mentioned: mean number of mentions in a caption; longer ones have more.
  """

  instances: float
  sentences: float
  recall: float
  mentioned: float


def chair(
  mentions: Sequence[Sequence[str]], objects: Sequence[Collection[str]]
) -> Chair:
  """Returns CHAIR's numbers, 0 where nothing is mentioned.

  Args:
    mentions: objects that each caption names, as often as it names them, after
      synonyms were mapped to classes.
    objects: classes that are in each image.

  Raises:
    UserError: not equally many of both, or none.
  """
  if len(mentions) != len(objects) or not mentions:
    raise UserError(
      f"chair: found {len(mentions)} captions and {len(objects)} images,"
      " expected as many, and one at least."
    )
  pairs = list(zip(mentions, objects, strict=True))
  wrong = [sum(x not in there for x in named) for named, there in pairs]
  total = sum(map(len, mentions))
  there = sum(len(set(found)) for found in objects)
  hit = sum(len({*named} & {*found}) for named, found in pairs)
  return Chair(
    instances=sum(wrong) / total if total else 0.0,
    sentences=sum(x > 0 for x in wrong) / len(pairs),
    recall=hit / there if there else 0.0,
    mentioned=total / len(pairs),
  )
