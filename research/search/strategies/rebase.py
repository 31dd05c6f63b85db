"""Reward balanced search (REBASE, Wu et al. 2024, arXiv:2408.00724, eq. 1)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from research.prm.scores.aggregate import Aggregate, Last
from research.ranges import PositiveFloat
from research.search.engine import Path
from research.search.step_search import StepSearch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebase(StepSearch):
  """A budget of paths, shared by a softmax of their scores.

  Attributes:
    copies: the budget at the beginning; each path that ends takes one of it.
    temperature: the softmax's.
    prune: makes one score, 0 to 1, of a path's steps so far.
  """

  needs_scores: ClassVar[bool] = True
  temperature: PositiveFloat = 0.2
  prune: Aggregate = Last()

  def children(self, paths: Sequence[Path]) -> Sequence[int]:
    """Returns shares of the paths that are left, which add up to them.

    Shares are rounded down, and what is left goes to the largest remainders:
    rounding each by itself, as the paper has it, may exceed the budget.
    """
    scores = np.array([self.prune.weight(path.scores) for path in paths])
    parts = np.exp((scores - scores.max()) / self.temperature)
    shares = len(paths) * parts / parts.sum()
    counts = np.floor(shares).astype(int)
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: len(paths) - counts.sum()]] += 1
    return counts.tolist()
