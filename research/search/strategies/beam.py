"""Step beam search (Snell et al. 2024, arXiv:2408.03314, section 5.2).

After each step the N/M best paths go on, each as M children. Paths that have
ended leave the beam and compete at the end; the beam is not filled up in their
place, so late steps cost less rather than more.
"""

import dataclasses
from collections.abc import Sequence

from research.search.engine import Path
from research.search.strategies.ranking import OfWidth, ranked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam(OfWidth):
  """N paths, of which the best N/M go on after each step.

  Attributes:
    copies: N.
    width: M, children of each path; 1 is `Independent`.
    prune: makes one score of a path's steps so far.
  """

  def children(self, paths: Sequence[Path]) -> Sequence[int]:
    """Returns `width` for each of the best paths."""
    best = set(ranked(paths, self.prune)[: self.copies // self.width])
    return [self.width if i in best else 0 for i in range(len(paths))]
