"""Finding every wrong step: PRMBench's metrics (Song et al. 2025).

arXiv:2501.03124, section 3.3: F1 of right steps and F1 of wrong steps, over all
steps of a class of errors, and their mean, the PRMScore.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from research.errors import UserError
from research.prm.scores.checks import Scores, finite


class StepCounts(NamedTuple):
  """A confusion matrix; a right step is positive.

  Attributes:
    tp, fn: right steps that were called right, and wrong.
    tn, fp: wrong steps that were called wrong, and right.
  """

  tp: int = 0
  fp: int = 0
  tn: int = 0
  fn: int = 0

  def plus(self, other: "StepCounts") -> "StepCounts":
    """Returns the counts of both."""
    return StepCounts(*(sum(x) for x in zip(self, other, strict=True)))


class StepScores(NamedTuple):
  """What the benchmark reports of one class of errors, or of all.

  Attributes:
    f1: F1 score for right steps.
    negative_f1: F1 score for wrong steps.
    accuracy: share of all steps that are classified correctly.
    first_error: share of solutions with errors whose first was called wrong.
  """

  f1: float
  negative_f1: float
  accuracy: float
  first_error: float


def _f1(hit: int, false: int, missed: int) -> float:
  """Returns the F1, 0 where the class is neither there nor predicted."""
  total = 2 * hit + false + missed
  return 2 * hit / total if total else 0.0


def step_counts(
  scores: Scores,
  labels: Sequence[float | int | None],
  threshold: float | int = 0.5,
) -> StepCounts:
  """Returns the confusion of one solution's steps.

  Args:
    scores: scores of the steps; above the threshold is right.
    labels: 1 or 0; steps of None are left out.
    threshold: state it beside every result.

  Raises:
    UserError: there are not as many scores as labels, or one is not finite.
  """
  if len(scores) != len(labels):
    raise UserError(
      f"prmbench: found {len(scores)} scores of {len(labels)} steps"
    )
  counts = [0, 0, 0, 0]
  for score, label in zip(finite(scores).tolist(), labels, strict=True):
    if label is not None:
      right, called = label > 0.5, score > threshold
      counts[(0 if called else 3) if right else (1 if called else 2)] += 1
  return StepCounts(*counts)


def prmbench(
  scores: Sequence[Sequence[float | int]],
  labels: Sequence[Sequence[float | int | None]],
  classes: Sequence[str],
  threshold: float | int = 0.5,
) -> Mapping[str, StepScores]:
  """Returns the scores of each class of errors, and "all" of them together.

  Solutions of class "correct" (the originals) are scored as a class and are not
  part of "all", as in the benchmark's code.

  Args:
    scores, labels: one sequence for each solution, a value a step.
    classes: each solution's class, the record's `classification`.
    threshold: above it a step is called right.
  """
  counts: dict[str, StepCounts] = {}
  first: dict[str, list[bool]] = {}
  for mine, truth, kind in zip(scores, labels, classes, strict=True):
    confusion = step_counts(mine, truth, threshold)
    names = (kind,) if kind == "correct" else (kind, "all")
    for name in names:
      counts[name] = counts.get(name, StepCounts()).plus(confusion)
      first.setdefault(name, [])
      if 0 in truth:
        first[name].append(mine[list(truth).index(0)] <= threshold)
  return {name: _scores(counts[name], first[name]) for name in counts}


def _scores(counts: StepCounts, first: Sequence[bool]) -> StepScores:
  total = sum(counts)
  return StepScores(
    f1=_f1(counts.tp, counts.fp, counts.fn),
    negative_f1=_f1(counts.tn, counts.fn, counts.fp),
    accuracy=(counts.tp + counts.tn) / total if total else 0.0,
    first_error=sum(first) / len(first) if first else math.nan,
  )


def similarity(
  scores: Sequence[float | int],
  original: Sequence[float | int],
  threshold: float | int = 0.5,
) -> float:
  """Returns how differently a solution and its original were judged.

  The difference of their shares of steps that were called right: near 0 for a
  model that calls everything right.
  """

  def share(values):
    return sum(x > threshold for x in values) / max(len(values), 1)

  return abs(share(scores) - share(original))
