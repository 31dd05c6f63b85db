"""Means over subsets, where no closed form is known.

All subsets where they are few, else seeded draws without replacement. Samples
that belong together are drawn together: a DVTS subtree's candidates share
prefixes, so its unit is the subtree. A beam has no subsets at all: its members
were chosen among each other, and a smaller beam has to be run.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from research.errors import UserError
from research.search.estimators.pool import check_subset
from research.search.estimators.voting import (
  Answers,
  shares_correct,
  weighted_vote,
)

EXACT = 5_000
"""Most subsets that are all enumerated."""


class SubsetMean(NamedTuple):
  """A mean over subsets.

  Attributes:
    value: the mean.
    error: its standard error over draws; 0 where all were enumerated.
  """

  value: float
  error: float


def mean_over_subsets(
  statistic: Callable[[tuple[int, ...]], float],
  n: int,
  k: int,
  draws: int = 1_000,
  seed: int = 0,
) -> SubsetMean:
  """Returns the mean of a statistic over k-subsets of n units.

  Args:
    statistic: indices of a subset, in order -> number.
    n: number of units: samples, or groups of samples that belong together.
    draws: where there are more than `EXACT` subsets.

  Raises:
    UserError: k is not 1 to n.
  """
  check_subset(n, k, "mean_over_subsets")
  exact = math.comb(n, k) <= EXACT
  chosen: Iterator[tuple[int, ...]]
  if exact:
    chosen = itertools.combinations(range(n), k)
  else:
    rng = np.random.default_rng(seed)
    chosen = (
      tuple(np.sort(rng.choice(n, k, replace=False)).tolist())
      for _ in range(draws)
    )
  values = np.array([statistic(x) for x in chosen], float)
  error = 0.0 if exact else values.std(ddof=1) / math.sqrt(len(values))
  return SubsetMean(float(values.mean()), float(error))


def weighted_majority_at_k(
  answers: Answers,
  weights: Sequence[float | int],
  correct: Sequence[bool],
  k: int,
  draws: int = 1_000,
  seed: int = 0,
) -> SubsetMean:
  """Returns the chance that the weighted vote of k samples is correct.

  Args:
    answers: answers of one problem's samples; None is no vote.
    weights: at least 0.
    correct: verdicts, see `voting.shares_correct`.
    draws, seed: as for `mean_over_subsets`.

  Raises:
    UserError: k is not 1 to n, or the arguments do not fit each other.
  """
  if not len(answers) == len(weights) == len(correct):
    raise UserError(
      f"weighted_majority_at_k: found {len(answers)} answers,"
      f" {len(weights)} weights and {len(correct)} verdicts, expected as many"
    )

  def chance(subset: tuple[int, ...]) -> float:
    voted = [answers[i] for i in subset]
    winners = weighted_vote(voted, [weights[i] for i in subset])
    shares = shares_correct(voted, [correct[i] for i in subset])
    return sum((s * shares[x] for x, s in winners.items()), 0.0)

  return mean_over_subsets(chance, len(answers), k, draws, seed)
