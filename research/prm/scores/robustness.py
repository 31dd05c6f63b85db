"""What changes of style, order and length do to a model's scores."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.errors import UserError
from research.prm.attacks import Attacked
from research.prm.labelled import LabelledSolution
from research.prm.scores import calibration
from research.prm.scores.aggregate import Aggregate
from research.prm.scores.checks import Scores, probabilities


@dataclasses.dataclass(frozen=True)
class AttackReport:
  """How scores of changed solutions differ; inflation and sensitivity apart.

  Changes are of probabilities: a trace's is that of its aggregate's weight.
  NaN where there is nothing to say.

  Attributes:
    inflation: mean change of a trace's score.
    inflated: share of traces whose score rises.
    inflated_wrong: the same of traces with an error: what an attacker gains.
    right, wrong: mean change of the scores of steps with that label, which the
      solution had before; their difference moves what is wrong towards right.
    new_errors: mean change of steps that the change made wrong.
    auc_before, auc_after: AUC over all labelled steps, before and after:
      sensitivity to what is correct.
    solutions: number of solutions.
  """

  inflation: float
  inflated: float
  inflated_wrong: float
  right: float
  wrong: float
  new_errors: float
  auc_before: float
  auc_after: float
  solutions: int

  def to_json(self) -> dict[str, Any]:
    """Returns the metrics; NaN, where there is nothing to say, is None."""
    metrics = dataclasses.asdict(self)
    return {name: None if x != x else x for name, x in metrics.items()}


def attack_report(
  solutions: Sequence[LabelledSolution],
  attacked: Sequence[Attacked],
  before: Sequence[Scores],
  after: Sequence[Scores],
  aggregate: Aggregate,
) -> AttackReport:
  """Returns what an attack did to a model's scores.

  Args:
    solutions: with hard labels; unknown ones are left out.
    attacked: what an attack of `prm.attacks` made of each of them.
    before, after: scores of the steps of `solutions`, and of `attacked`.
    aggregate: makes one score of a trace, fixed before.

  Raises:
    UserError: they do not belong together, or scores are no probabilities.
  """
  counts = {len(x) for x in (solutions, attacked, before, after)}
  if len(counts) > 1 or not solutions:
    raise UserError(
      f"attack_report: found {len(solutions)} solutions, {len(attacked)} that"
      f" are attacked, and scores of {len(before)} and {len(after)}; expected"
      " as many of each, and one at least"
    )
  old = [probabilities(x) for x in before]
  new = [probabilities(x) for x in after]
  for i, (solution, changed) in enumerate(
    zip(solutions, attacked, strict=True)
  ):
    for name, steps, row in (
      ("before", solution.steps, old[i]),
      ("after", changed.solution.steps, new[i]),
    ):
      if len(steps) != len(row):
        raise UserError(
          f"attack_report: found {len(row)} scores {name} of solution {i},"
          f" expected {len(steps)}, one a step"
        )
  change = np.array(
    [
      aggregate.weight(y) - aggregate.weight(x)
      for x, y in zip(old, new, strict=True)
    ]
  )
  has_error = np.array([0 in solution.labels for solution in solutions])
  moved = _changes(solutions, attacked, old, new)
  return AttackReport(
    inflation=_mean(change),
    inflated=_mean(change > 0),
    inflated_wrong=_mean(change[has_error] > 0),
    right=_mean([d for d, was, now in moved if was == now == 1]),
    wrong=_mean([d for d, was, now in moved if was == now == 0]),
    new_errors=_mean([d for d, was, now in moved if was == 1 and now == 0]),
    auc_before=_auc(solutions, old),
    auc_after=_auc([x.solution for x in attacked], new),
    solutions=len(solutions),
  )


def _changes(
  solutions: Sequence[LabelledSolution],
  attacked: Sequence[Attacked],
  old: Sequence[np.ndarray],
  new: Sequence[np.ndarray],
) -> list[tuple[float, Any, Any]]:
  """Returns (change, label before, label after) of every step that remains."""
  changes = []
  for solution, changed, x, y in zip(
    solutions, attacked, old, new, strict=True
  ):
    for at, origin in enumerate(changed.origin):
      if origin is not None:
        labels = solution.labels[origin], changed.solution.labels[at]
        changes.append((float(y[at] - x[origin]), *labels))
  return changes


def _auc(
  solutions: Sequence[LabelledSolution], scores: Sequence[np.ndarray]
) -> float:
  pairs = [
    (score, label)
    for solution, row in zip(solutions, scores, strict=True)
    for score, label in zip(row, solution.labels, strict=True)
    if label in (0, 1)
  ]
  if not pairs:
    return float("nan")
  values, truth = np.array(pairs, float).T
  return calibration.auc(values, truth)


def _mean(values: Any) -> float:
  return float(np.mean(values)) if len(values) else float("nan")
