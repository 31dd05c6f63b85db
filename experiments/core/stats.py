"""Intervals of what studies find: Student's of means, Wilson's of shares.

All are of 95% confidence, two-sided; their quantiles are scipy's.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from research.typing import UserError

UPPER = 0.975
"""Of a quantile: a twentieth lies outside, half of it above."""

NORMAL = float(special.ndtri(UPPER))
"""The normal distribution's quantile, 1.96."""


class Mean(NamedTuple):
  """A mean over seeds, and half the width of its interval."""

  value: float
  half: float

  def __str__(self) -> str:
    return f"{self.value:.3f} ± {self.half:.3f}"


def student(count: int) -> float:
  """Returns Student's quantile for a mean of so many values, at least 2."""
  return float(special.stdtrit(count - 1, UPPER))


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
  error = float(x.std(ddof=1)) / math.sqrt(len(x))
  return Mean(float(x.mean()), student(len(x)) * error)


def wilson(share: float, count: int) -> tuple[float, float]:
  """Returns Wilson's interval of a share of `count` trials (1927)."""
  z = NORMAL
  middle = (share + z * z / (2 * count)) / (1 + z * z / count)
  spread = share * (1 - share) / count + (z / count / 2) ** 2
  reach = z / (1 + z * z / count) * math.sqrt(spread)
  return middle - reach, middle + reach
