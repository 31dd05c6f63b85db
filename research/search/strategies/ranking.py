"""Searches of a width, and ranks of open paths by the verifier's scores."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from research.prm.scores.aggregate import Aggregate, Last
from research.ranges import PositiveInt
from research.search.engine import Path
from research.search.step_search import StepSearch
from research.typing import UserError


def ranked(paths: Sequence[Path], prune: Aggregate) -> list[int]:
  """Returns the indices of paths, the best one first; ties keep their order.

  Args:
    paths: with a score for each step.
    prune: makes one score of them.

  Raises:
    UserError: a path has no scores, as without a verifier.
  """
  if any(len(path.scores) != len(path.steps) for path in paths):
    raise UserError(
      "search: found paths without scores, expected one for each step: give the"
      " engine a verifier, or sample independently"
    )
  scores = [prune(path.scores) for path in paths]
  return sorted(range(len(paths)), key=lambda i: -scores[i])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfWidth(StepSearch):
  """Base of searches whose best paths have several children.

  Attributes:
    copies: N.
    width: M, children of each path.
    prune: makes one score of a path's steps so far.
  """

  needs_scores: ClassVar[bool] = True
  width: PositiveInt = 4
  prune: Aggregate = Last()

  def __post_init__(self):
    super().__post_init__()
    if self.copies % self.width:
      raise UserError(
        f"{type(self).__name__}: width is {self.width}, expected a divisor of"
        f" the {self.copies} paths"
      )
