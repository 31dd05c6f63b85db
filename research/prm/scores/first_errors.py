"""Finding the first wrong step: ProcessBench's F1 (Zheng et al. 2024).

arXiv:2412.06559, section 3.5: the harmonic mean of two accuracies, on solutions
with an error (the index has to be exact) and on those without.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from research.errors import UserError
from research.prm.labelled import LabelledSolution
from research.prm.scores.checks import Scores, finite

NO_ERROR = -1
"""The index where all steps are right."""


class FirstErrorScores(NamedTuple):
  """Accuracies on solutions with and without an error.

  Attributes:
    error: share of those with an error whose step was found; NaN if none has
      an error.
    correct: share of those without where none was found; NaN if all have one.
    errors, corrects: number of each.
  """

  error: float
  correct: float
  errors: int
  corrects: int

  @property
  def f1(self) -> float:
    """Their harmonic mean; 0 where both are 0, NaN where one is NaN."""
    total = self.error + self.correct
    return 2 * self.error * self.correct / total if total else 0.0


def first_error(scores: Scores, threshold: float | int = 0.5) -> int:
  """Returns the index of the first step whose score is below a threshold.

  Args:
    threshold: state it beside every result: the paper takes 0.5 for models of
      two classes, and fits it on the GSM8K subset for others.

  Raises:
    UserError: a score is not finite.
  """
  below = finite(scores) < threshold
  return int(below.argmax()) if below.any() else NO_ERROR


def processbench(
  predicted: Sequence[int | None], labels: Sequence[int]
) -> FirstErrorScores:
  """Returns the accuracies of one subset.

  Args:
    predicted: index of each solution's first error, or -1; None, such as a
      judge's answer that cannot be parsed, is wrong.
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
  shares = {k: sum(x) / len(x) if x else math.nan for k, x in hits.items()}
  return FirstErrorScores(
    shares[False], shares[True], len(hits[False]), len(hits[True])
  )


def processbench_of_chance(
  solutions: Sequence[LabelledSolution], threshold: float | int = 0.5
) -> FirstErrorScores:
  """Returns what uniform random scores reach on average, in closed form.

  Such a score is below the threshold t with chance t: an error at index e is
  found with t (1 - t)^e, a solution of T right steps passes with (1 - t)^T. It
  may be more than a model reaches whose scores are far from the threshold.

  Args:
    solutions: those whose first error is unknown are left out.
    threshold: from 0 to 1.

  Raises:
    UserError: the threshold is no chance.
  """
  if not 0 <= threshold <= 1:
    raise UserError(
      f"processbench_of_chance: found the threshold {threshold}, expected 0 to"
      " 1"
    )
  known = [x for x in solutions if x.first_error is not None]
  passes = 1 - threshold
  error = [
    threshold * passes**x.first_error
    for x in known
    if x.first_error != NO_ERROR
  ]
  correct = [passes ** len(x.steps) for x in known if x.first_error == NO_ERROR]
  return FirstErrorScores(
    sum(error) / len(error) if error else math.nan,
    sum(correct) / len(correct) if correct else math.nan,
    len(error),
    len(correct),
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
