"""Intervals of 95%: Wilson's for shares, the bootstrap's for all else.

All resamples are scipy's. A bootstrap of outcomes that are all alike has no
width, and of a few values it is too narrow: 0 and 1 have closed forms, and
`Interval.note` names the others.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from research.errors import UserError

CONFIDENCE = 0.95
"""Of every interval, two-sided."""

UPPER = (1 + CONFIDENCE) / 2
"""Of a quantile: half of what is outside of an interval lies above."""

FEW = 10
"""Fewer values than these make a bootstrap's interval too narrow.

Of n normal values its expected width is sqrt((n - 1) / n) * z / t(n - 1) of
Student's: 0.83 for 10, 0.37 for 3.
"""

_BATCH = 1 << 22
"""Indices drawn at a time, which bounds the memory."""


class Interval(NamedTuple):
  """Both ends of an interval.

  Attributes:
    low, high: the ends.
    few: how many values were drawn from, if these are too few for a bootstrap;
      0 if they are not, or if the interval has a closed form.
  """

  low: float
  high: float
  few: int = 0

  @property
  def note(self) -> str:
    """Says that the interval is too narrow, where it is; else ""."""
    return f" (too narrow: a bootstrap of {self.few})" if self.few else ""


def of_share(
  outcomes: Sequence[float] | np.ndarray, resamples: int = 4000, seed: int = 0
) -> Interval:
  """Returns the interval of a mean of outcomes from 0 to 1.

  Of 0 and 1 it is Wilson's (1927), else the bootstrap's. One partial outcome
  says nothing: 0 to 1.
  """
  outcomes = np.asarray(outcomes, float)
  if np.isin(outcomes, (0, 1)).all():
    right = scipy.stats.binomtest(int(outcomes.sum()), len(outcomes))
    found = right.proportion_ci(CONFIDENCE, "wilson")
    return Interval(float(found.low), float(found.high))
  if len(outcomes) == 1:
    return Interval(0.0, 1.0)
  return of_mean(outcomes, resamples, seed)


def of_difference(
  differences: Sequence[float] | np.ndarray,
  resamples: int = 4000,
  seed: int = 0,
) -> Interval:
  """Returns the interval of a mean of paired differences of outcomes.

  Of -1, 0 and 1 it is the adjusted Wald interval of Bonett and Price (2012,
  doi:10.3102/1076998611411915), which has a width where all pairs agree; else
  the bootstrap's. One other difference says nothing.
  """
  differences = np.asarray(differences, float)
  n = len(differences)
  if np.isin(differences, (-1, 0, 1)).all():
    ahead, behind = (((differences == x).sum() + 1) / (n + 2) for x in (1, -1))
    middle = ahead - behind
    half = scipy.stats.norm.ppf(UPPER) * np.sqrt(
      (ahead + behind - middle**2) / (n + 2)
    )
    low, high = np.clip((middle - half, middle + half), -1, 1)
    return Interval(float(low), float(high))
  if n == 1:
    return Interval(-np.inf, np.inf)
  return of_mean(differences, resamples, seed)


def of_mean(
  values: Sequence[float] | np.ndarray, resamples: int = 4000, seed: int = 0
) -> Interval:
  """Returns the bootstrap's interval of a mean of two values or more."""
  values = np.asarray(values, float)
  return bootstrap(
    lambda rows: values[rows].mean(axis=-1),
    len(values),
    resamples=resamples,
    seed=seed,
  )


def bootstrap(
  statistic: Callable[..., Any],
  *sizes: int,
  resamples: int = 2000,
  seed: int = 0,
  vectorized: bool = True,
) -> Interval:
  """Returns the percentile bootstrap's interval of a statistic (Efron 1979).

  Resamples without a value (NaN) do not count.

  Args:
    statistic: function of the indices that were drawn, an array `[..., n]` for
      each size; NaN where it has no value.
    sizes: numbers of values that are drawn with replacement, independently.
    resamples: number of draws.
    seed: of the draws.
    vectorized: whether `statistic` takes leading axes.

  Raises:
    UserError: there are fewer than two values to draw from.
  """
  if min(sizes) < 2:
    raise UserError(
      f"bootstrap: found {min(sizes)} values, expected at least two"
    )

  def along(*rows: Any, axis: int = -1) -> Any:
    del axis  # always the last
    return statistic(*rows)

  with warnings.catch_warnings():
    # It warns where all resamples are alike.
    warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
    drawn = scipy.stats.bootstrap(
      tuple(np.arange(n) for n in sizes),
      along if vectorized else statistic,
      n_resamples=resamples,
      batch=max(1, _BATCH // int(np.prod(sizes))) if vectorized else 1,
      vectorized=vectorized,
      confidence_level=CONFIDENCE,
      method="percentile",
      random_state=np.random.default_rng(seed),
    ).bootstrap_distribution
  low, high = np.nanquantile(drawn, (1 - UPPER, UPPER))
  few = min(sizes) if min(sizes) < FEW else 0
  return Interval(float(low), float(high), few)
