"""Independent samples: the pool of best-of-N, voting and coverage."""

import dataclasses
from collections.abc import Sequence

from research.search.engine import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Independent:
  """N paths, each on its own.

  Attributes:
    copies: N.
  """

  copies: int = 16

  def children(self, paths: Sequence[Path]) -> Sequence[int]:
    """Returns one for each path."""
    return [1] * len(paths)
