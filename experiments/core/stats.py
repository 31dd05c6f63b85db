"""Means over seeds with Student's intervals; all else is `scipy.stats`."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from research.typing import UserError

CONFIDENCE = 0.95
"""Of every interval, two-sided."""

UPPER = (1 + CONFIDENCE) / 2
"""Of a quantile: half of what is outside of an interval lies above."""


class Mean(NamedTuple):
  """A mean over seeds, and half the width of its interval."""

  value: float
  half: float

  def __str__(self) -> str:
    return f"{self.value:.3f} ± {self.half:.3f}"


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
  half = stats.t.ppf(UPPER, len(x) - 1) * stats.sem(x)
  return Mean(float(x.mean()), float(half))
