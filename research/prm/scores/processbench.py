"""Finding the first wrong step: ProcessBench's F1 (Zheng et al. 2024).

arXiv:2412.06559, section 3.5: the harmonic mean of two accuracies, on solutions
with an error (the index has to be exact) and on those without.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from research.errors import UserError

NO_ERROR = -1
"""The index where all steps are right."""


class FirstErrorScores(NamedTuple):
  """Accuracies on solutions with and without an error.

  Attributes:
    error: share of those with an error whose step was found.
    correct: share of those without where none was found.
    errors, corrects: number of each.
  """

  error: float
  correct: float
  errors: int
  corrects: int

  @property
  def f1(self) -> float:
    """Their harmonic mean; 0 where both are 0."""
    total = self.error + self.correct
    return 2 * self.error * self.correct / total if total else 0.0


def first_error(
  scores: Sequence[float | int], threshold: float | int = 0.5
) -> int:
  """Returns the index of the first step whose score is below a threshold.

  Args:
    scores: of the steps.
    threshold: state it beside every result: the paper takes 0.5 for models of
      two classes, and fits it on the GSM8K subset for others.
  """
  return next((i for i, x in enumerate(scores) if x < threshold), NO_ERROR)


def processbench(
  predicted: Sequence[int | None], labels: Sequence[int]
) -> FirstErrorScores:
  """Returns the accuracies of one subset.

  Args:
    predicted: of each solution, the index of its first error or -1; None, such
      as a judge's answer that cannot be parsed, is wrong.
    labels: the same of people.

  Raises:
    UserError: not equally many of both.
  """
  if len(predicted) != len(labels):
    raise UserError(
      f"processbench: found {len(predicted)} predictions and {len(labels)}"
      " labels, expected as many"
    )
  hits: dict[bool, list[bool]] = {True: [], False: []}
  for mine, label in zip(predicted, labels, strict=True):
    hits[label == NO_ERROR].append(mine == label)
  shares = {k: sum(x) / len(x) if x else 0.0 for k, x in hits.items()}
  return FirstErrorScores(
    shares[False], shares[True], len(hits[False]), len(hits[True])
  )


def mean_f1(subsets: Mapping[str, FirstErrorScores] | Iterable[float]) -> float:
  """Returns the plain mean of the subsets' F1, as the paper's table has it.

  A mean over samples is another number (TRL's recipe prints one): subsets
  differ in size.
  """
  values = (
    [x.f1 for x in subsets.values()]
    if isinstance(subsets, Mapping)
    else list(subsets)
  )
  return sum(values) / len(values) if values else 0.0


def majority_index(votes: Sequence[int | None]) -> int | None:
  """Returns a judge's most frequent index of several; the first of equal ones.

  None, which is no vote, where there is no other.
  """
  valid = [x for x in votes if x is not None]
  return collections.Counter(valid).most_common(1)[0][0] if valid else None
