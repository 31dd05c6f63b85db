"""Independent samples: the pool of best-of-N, voting and coverage."""

import dataclasses
from collections.abc import Sequence

from research.search.engine import Path
from research.search.step_search import StepSearch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Independent(StepSearch):
  """N paths, each on its own.

  Attributes:
    copies: N.
  """

  def children(self, paths: Sequence[Path]) -> Sequence[int]:
    """Returns one for each path."""
    return [1] * len(paths)
