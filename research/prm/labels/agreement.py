"""Solutions on whose first error two labellers agree.

Zhang et al. 2025, "The Lessons of Developing Process Reward Models in
Mathematical Reasoning" (arXiv:2501.07301), section 3.1.3: rollouts overlook
errors that a completer recovers from, judges overlook others, and what both say
is cleaner. The second labeller is any independent one: a judge model, a second
completer, an exact checker.
"""

from collections.abc import Sequence
from typing import NamedTuple

from research.errors import UserError
from research.prm.labelled import LabelledSolution, labels_until


class Consensus(NamedTuple):
  """Solutions that are left, and how many were there.

  Attributes:
    kept: relabelled: right up to the first error, wrong there, unknown after.
    considered: number of solutions before.
  """

  kept: list[LabelledSolution]
  considered: int

  @property
  def rate(self) -> float:
    """The share that is left; about 0.4 in the paper."""
    return len(self.kept) / self.considered if self.considered else 0.0


def consensus(
  first: Sequence[LabelledSolution], second: Sequence[LabelledSolution]
) -> Consensus:
  """Returns the solutions whose first error both place at the same step.

  Both may also agree that there is none. A labeller that does not know a step
  before its first error agrees with no label.

  Args:
    first, second: the same solutions, labelled twice; labels are hard.

  Raises:
    UserError: they are not the same solutions.
  """
  if len(first) != len(second):
    raise UserError(
      f"consensus: found {len(first)} and {len(second)} solutions, expected the"
      " same ones"
    )
  kept = []
  for i, (a, b) in enumerate(zip(first, second, strict=True)):
    if (a.prompt, a.steps) != (b.prompt, b.steps):
      raise UserError(f"consensus: found different texts in solution {i}")
    if a.first_error is not None and a.first_error == b.first_error:
      labels = labels_until(a.first_error, len(a.steps))
      kept.append(a.relabelled(labels, "consensus"))
  return Consensus(kept, len(first))
