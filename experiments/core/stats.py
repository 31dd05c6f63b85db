"""Statistics of repeated runs: intervals, tests and corrections, on scipy.

An interval is Student's, two-sided, of 95% over seeds. A claim that compares
means is true where the whole interval says so, false where the whole interval
says the opposite, and None (undecided) in between and with one seed.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy

from research.intervals import UPPER
from research.typing import UserError

POWER = 0.8
"""Share of studies that find a difference."""

MOST_SEEDS = 100
"""No study has so many."""

Decision = bool | None
"""Whether a claim holds; None is undecided."""


class Mean(NamedTuple):
  """A mean over seeds, and half the width of its interval."""

  value: float
  half: float

  def __str__(self) -> str:
    if math.isinf(self.half):
      return f"{self.value:.3f} (one value)"
    return f"{self.value:.3f} ± {self.half:.3f}"

  def times(self, factor: float | int) -> "Mean":
    """Returns the mean in another unit, such as per cent."""
    return Mean(factor * self.value, abs(factor) * self.half)


def mean(values: Any) -> Mean:
  """Returns the mean and Student's interval; infinite for one value.

  Raises:
    UserError: there are no values.
  """
  x = np.asarray(values, float)
  if len(x) == 0:
    raise UserError("stats.mean: found no values, expected at least one")
  if len(x) == 1:
    return Mean(float(x[0]), math.inf)
  half = scipy.stats.t.ppf(UPPER, len(x) - 1) * scipy.stats.sem(x)
  return Mean(float(x.mean()), float(half))


def over_seeds(values: Any, factor: float | int = 1) -> Mean | float:
  """Returns a mean in another unit; one seed has no interval."""
  average = mean(values).times(factor)
  return average if len(values) > 1 else average.value


def common_seeds(what: str, first: int, second: int) -> int:
  """Returns the number of seeds of two steps, of which one may have one.

  Raises:
    UserError: they have different numbers, more than one each.
  """
  seeds = max(first, second)
  if {first, second} - {1, seeds}:
    raise UserError(
      f"{what}: found {first} and {second} seeds, expected as many, or one"
    )
  return seeds


# --- decisions ---


def above(found: Mean, least: float | int = 0.0) -> Decision:
  """Whether the whole interval lies above a number, or none of it does."""
  if not math.isfinite(found.half):
    return None
  if found.value - found.half > least:
    return True
  return False if found.value + found.half <= least else None


def below(found: Mean, most: float | int = 0.0) -> Decision:
  """Whether the whole interval lies below a number, or none of it does."""
  return above(Mean(-found.value, found.half), -most)


def equivalent(difference: Mean, most: float | int) -> Decision:
  """Whether a difference surely lies within `most` of 0, or surely does not."""
  low, high = above(difference, -most), below(difference, most)
  if low and high:
    return True
  return False if low is False or high is False else None


def seeds_to_decide(
  difference: Mean, seeds: int, least: float | int = 0.0
) -> int:
  """Returns how many seeds would show that a mean is not `least`.

  Where the mean and the spread over seeds are as observed, Student's test of
  95% finds the difference in 80% of studies with so many seeds.

  Args:
    difference: mean over at least two seeds, with its interval.
  """
  t = scipy.stats.t.ppf(UPPER, seeds - 1)
  spread = max(difference.half * math.sqrt(seeds) / t, 1e-12)
  effect = abs(difference.value - least) / spread
  for n in range(2, MOST_SEEDS):
    t = scipy.stats.t.ppf(UPPER, n - 1)
    if scipy.stats.nct.sf(t, n - 1, effect * math.sqrt(n)) >= POWER:
      return n
  return MOST_SEEDS
