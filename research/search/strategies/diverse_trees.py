"""Diverse verifier tree search (DVTS, Beeching et al. 2024, search-and-learn).

N/M trees that do not compete: in each, the best path goes on as M children.
Better than a beam of many paths, which collapses to one prefix.
"""

import dataclasses
from collections.abc import Sequence

from research.search.engine import Path
from research.search.strategies.ranking import OfWidth, ranked


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiverseTrees(OfWidth):
  """N/M trees of width M, of which the best path goes on.

  Attributes:
    copies: N; the first M paths are the first tree's.
    width: M.
    prune: makes one score of a path's steps so far.
  """

  def children(self, paths: Sequence[Path]) -> Sequence[int]:
    """Returns `width` for the best path of each tree."""
    best = {}
    for i in reversed(ranked(paths, self.prune)):
      best[paths[i].root // self.width] = i
    return [self.width * (i in best.values()) for i in range(len(paths))]
