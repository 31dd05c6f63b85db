"""What is reported of a process reward model on labelled solutions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError
from research.prm.labelled import LabelledSolution
from research.prm.scores import calibration
from research.prm.scores.checks import Scores, probabilities
from research.prm.scores.first_errors import (
  FirstErrorScores,
  first_error,
  processbench,
  processbench_of_chance,
)
from research.prm.scores.ranking import min_at_last


@dataclasses.dataclass(frozen=True)
class StepReport:
  """How well a model judges steps.

  Attributes:
    first: ProcessBench's accuracies, on solutions whose first error is known.
    chance: the same of uniform random scores, on average.
    threshold: below it a step is called wrong.
    auc, brier, ece: metrics over all labelled steps.
    auc_error: standard error of the AUC, over problems; NaN of one problem.
    base_rate: share of these that are right: what a constant could know.
    auc_by_index, auc_by_steps_to_go: AUC of steps with one index, or one depth.
    min_at_last: share of traces whose lowest score is the last step's.
    solutions, steps: number of solutions, and of labelled steps.
  """

  first: FirstErrorScores
  chance: FirstErrorScores
  threshold: float | int
  auc: float
  auc_error: float
  brier: float
  ece: float
  base_rate: float
  auc_by_index: Mapping[int, float]
  auc_by_steps_to_go: Mapping[int, float]
  min_at_last: float
  solutions: int
  steps: int

  def __str__(self) -> str:
    return (
      f"F1 {self.first.f1:.3f} ({self.first.error:.3f} of {self.first.errors}"
      f" with an error, {self.first.correct:.3f} of {self.first.corrects}"
      f" without), AUC {self.auc:.3f}"
    )

  def to_json(self) -> dict[str, Any]:
    """Returns the metrics; NaN, where there is nothing to say, is None."""
    metrics = {
      "f1": self.first.f1,
      "f1_random": self.chance.f1,
      "accuracy_error": self.first.error,
      "accuracy_correct": self.first.correct,
      "threshold": self.threshold,
      "auc": self.auc,
      "auc_error": self.auc_error,
      "brier": self.brier,
      "ece": self.ece,
      "base_rate": self.base_rate,
      "min_at_last": self.min_at_last,
      "solutions": self.solutions,
      "steps": self.steps,
      **{f"auc_step_{i}": x for i, x in self.auc_by_index.items()},
      **{f"auc_{i}_to_go": x for i, x in self.auc_by_steps_to_go.items()},
    }
    return {name: None if x != x else x for name, x in metrics.items()}


def evaluate_steps(
  solutions: Sequence[LabelledSolution],
  scores: Sequence[Scores],
  threshold: float | int = 0.5,
) -> StepReport:
  """Returns the report of a model's scores.

  Args:
    solutions: with hard labels; unknown ones are left out.
    scores: probabilities of each solution's steps.
    threshold: fixed before the test set is opened, and stated.

  Raises:
    UserError: scores do not fit the solutions or are no probabilities, or no
      step has a label.
  """
  if len(solutions) != len(scores):
    raise UserError(
      f"evaluate_steps: found {len(scores)} rows of scores of {len(solutions)}"
      " solutions"
    )
  rows = [probabilities(x).tolist() for x in scores]
  for i, (solution, row) in enumerate(zip(solutions, rows, strict=True)):
    if len(row) != len(solution.steps):
      raise UserError(
        f"evaluate_steps: found {len(row)} scores of solution {i}, expected"
        f" {len(solution.steps)}, one a step"
      )
  labels = [solution.labels for solution in solutions]
  triples = [
    (score, label, solution.prompt)
    for row, solution in zip(rows, solutions, strict=True)
    for score, label in zip(row, solution.labels, strict=True)
    if label is not None
  ]
  if not triples:
    raise UserError("evaluate_steps: found no step with a label")
  *pair, prompts = zip(*triples, strict=True)
  values, truth = np.array(pair, float)
  located = [
    (first_error(row, threshold), solution.first_error)
    for row, solution in zip(rows, solutions, strict=True)
    if solution.first_error is not None
  ]
  return StepReport(
    first=processbench([x for x, _ in located], [x for _, x in located]),
    chance=processbench_of_chance(solutions, threshold),
    threshold=threshold,
    auc=calibration.auc(values, truth),
    auc_error=calibration.auc_error(values, truth, prompts),
    brier=calibration.brier(values, truth),
    ece=calibration.expected_calibration_error(values, truth),
    base_rate=float(truth.mean()),
    auc_by_index=calibration.auc_by(rows, labels),
    auc_by_steps_to_go=calibration.auc_by(
      rows, labels, calibration.by_steps_to_go
    ),
    min_at_last=min_at_last(rows),
    solutions=len(solutions),
    steps=len(triples),
  )
