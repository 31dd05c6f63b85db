"""Counting, count by count: accuracy falls with it, and answers drift."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.typing import Int, UserError
from research.vlm.evaluation.answers import NUMBER_WORDS

_NONE = ("no", "none")


def parse_count(text: str) -> int | None:
  """Returns the first number in a text, as figures or a word to twenty.

  "no" and "none" are 0. None where there is no number.
  """
  for word in re.findall(r"\d+|[a-z]+", text.lower()):
    if word.isdigit():
      return int(word[:9])
    if word in NUMBER_WORDS:
      return NUMBER_WORDS.index(word)
    if word in _NONE:
      return 0
  return None


class CountScores(NamedTuple):
  """How well counts are right.

  Attributes:
    accuracy: share of exact ones.
    by_count: true count -> share of exact ones.
    error: mean of |found - true| over valid answers, in objects.
    confusion: [true, found], numbers of answers; the last column is for counts
      that are larger than any true one, and invalid answers.
    invalid: share of answers without a number.
  """

  accuracy: float
  by_count: dict[int, float]
  error: float
  confusion: Int[np.ndarray, "T S"]
  invalid: float


def count_scores(
  predictions: Sequence[int | None], counts: Sequence[int]
) -> CountScores:
  """Returns scores of counts, such as TallyQA's and CountBench's.

  Args:
    predictions: what the model said, None where it said no number.
    counts: the truth.

  Raises:
    UserError: not equally many of both, or none.
  """
  if len(predictions) != len(counts) or not len(counts):
    raise UserError(
      f"count_scores: found {len(predictions)} predictions and {len(counts)}"
      " counts, expected as many, and one at least."
    )
  most = max(counts)
  confusion = np.zeros((most + 1, most + 2), int)
  errors = []
  for found, count in zip(predictions, counts, strict=True):
    inside = found is not None and 0 <= found <= most
    confusion[count, found if inside else -1] += 1
    if found is not None:
      errors.append(abs(found - count))
  totals = confusion.sum(1)
  return CountScores(
    accuracy=float(np.trace(confusion) / len(counts)),
    by_count={
      i: float(confusion[i, i] / totals[i]) for i in np.flatnonzero(totals)
    },
    error=float(np.mean(errors)) if errors else float("nan"),
    confusion=confusion,
    invalid=sum(x is None for x in predictions) / len(counts),
  )
