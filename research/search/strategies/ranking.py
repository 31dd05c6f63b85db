"""Ranks open paths by the verifier's scores."""

from collections.abc import Sequence

from research.prm.scores.aggregate import Aggregate
from research.search.engine import Path
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
