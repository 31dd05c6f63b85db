"""A solution whose steps are labelled: what every format is read into."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import UserError
from research.reasoning.trace import MonteCarlo, check_counts

Label = float | int | None
"""Of a step: 0 (wrong) to 1 (right), soft in between, or None (unknown)."""

MAX_STEPS = 4096
"""Of one solution, more than any published set has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledSolution:
  """A problem and a solution of it in steps, each with what is known of it.

  Attributes:
    prompt: the problem.
    steps: texts, first to last.
    labels: label of each step; None where it is unknown, as after a first
      error.
    mc: rollouts of each step, or None where there are none.
    critiques: what a judge wrote, for each step, or once for all; or empty.
    final_correct: whether the final answer is correct, or None.
    problem_id, policy_id, segmenter_id: which problem, which model wrote the
      steps, and what cut them; "" where unknown.
    label_source: how labels were made; it decides how scores of a model that
      learns them may be used (`scores.aggregate`).
    extra: fields of the record that have no place above, written back as read.
  """

  prompt: str
  steps: tuple[str, ...]
  labels: tuple[Label, ...]
  mc: tuple[MonteCarlo | None, ...] | None = None
  critiques: tuple[str, ...] = ()
  final_correct: bool | None = None
  problem_id: str = ""
  policy_id: str = ""
  segmenter_id: str = ""
  label_source: str = ""
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    n = len(self.steps)
    if n > MAX_STEPS:
      raise UserError(f"steps: found {n}, expected at most {MAX_STEPS}")
    for name, values in (("labels", self.labels), ("mc", self.mc)):
      if values is not None and len(values) != n:
        raise UserError(f"{name}: found {len(values)} for {n} steps")
    if len(self.critiques) not in (0, 1, n):
      raise UserError(
        f"critiques: found {len(self.critiques)} for {n} steps, expected one a"
        " step, one for all, or none"
      )
    for i, label in enumerate(self.labels):
      if label is not None and not 0 <= label <= 1:
        raise UserError(f"labels[{i}]: found {label}, expected 0 to 1")
    for i, counts in enumerate(self.mc or ()):
      if counts is not None:
        check_counts(counts, f"mc[{i}]")

  @property
  def first_error(self) -> int | None:
    """Index of the first step labelled 0, or -1 where there is none.

    None where a step before it has no label, and so may be the first.
    """
    for i, label in enumerate(self.labels):
      if label is None:
        return None
      if label == 0:
        return i
    return -1

  def relabelled(
    self, labels: Sequence[Label], source: str
  ) -> "LabelledSolution":
    """Returns the solution with other labels, and where they are from."""
    return dataclasses.replace(self, labels=tuple(labels), label_source=source)


def labels_until(first_error: int, n: int) -> tuple[Label, ...]:
  """Returns the labels of `n` steps of which one is the first wrong one.

  Steps after it are unknown: they may be right given what they start from.

  Args:
    first_error: its index, or -1 where all are right.

  Raises:
    UserError: there is no such step.
  """
  if not -1 <= first_error < n:
    raise UserError(
      f"first error: found {first_error}, expected -1 (none) to {n - 1}"
    )
  if first_error == -1:
    return (1,) * n
  return (1,) * first_error + (0,) + (None,) * (n - first_error - 1)
