"""Intervals of accuracies, and of differences between two systems.

Two systems are compared on the same problems: what a problem's difficulty does
to both cancels out. With several training seeds, seeds are drawn as well as
problems, since a claim is about the method and not about three checkpoints.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from research import intervals
from research.errors import UserError

RESAMPLES = 10_000


class Estimate(NamedTuple):
  """A mean and its interval.

  Attributes:
    value: the mean over seeds and problems.
    low, high: ends of the interval.
    problems, seeds: how many of each.
  """

  value: float
  low: float
  high: float
  problems: int
  seeds: int

  @property
  def half(self) -> float:
    """The larger distance of an end from the value, as after a ±."""
    return max(self.value - self.low, self.high - self.value)

  @property
  def note(self) -> str:
    """Says that the interval is too narrow, if it is over few seeds."""
    few = self.seeds if 1 < self.seeds < intervals.FEW else 0
    return intervals.Interval(self.low, self.high, few).note


def mean_accuracy(
  outcomes: Sequence[float] | Float[np.ndarray, " P"],
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Estimate:
  """Returns the mean of one system's outcomes, and its interval over problems.

  Args:
    outcomes: correctness of each problem, 0 to 1.
    resamples: drawn with replacement, where some are neither 0 nor 1.

  Raises:
    UserError: there are no problems, or a value is not from 0 to 1.
  """
  outcomes = np.asarray(outcomes, float)
  if outcomes.ndim != 1 or not outcomes.size:
    raise UserError(
      f"mean_accuracy: found shape {outcomes.shape}, expected one outcome"
      " a problem"
    )
  # Also of NaN. A mean over subsets may be above 1 by rounding.
  if not (np.abs(outcomes - 0.5) <= 0.5 + 1e-9).all():
    raise UserError("mean_accuracy: found an outcome that is not from 0 to 1")
  interval = intervals.of_share(outcomes, resamples, seed)
  return Estimate(
    float(outcomes.mean()), interval.low, interval.high, len(outcomes), 1
  )


def paired_difference(
  first: Float[np.ndarray, "..."],
  second: Float[np.ndarray, "..."],
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Estimate:
  """Returns the mean of `first - second`, and its interval.

  Of one seed as `research.intervals.of_difference` has it, and so where the
  systems never differ; else a bootstrap over problems and seeds.

  Args:
    first, second: correctness of each problem, 0 to 1, at equal cost: `[P]`, or
      `[S, P]` with a row a training seed.
    resamples: drawn with replacement.

  Raises:
    UserError: shapes differ, there are no problems, or a value is NaN.
  """
  a, b = (np.atleast_2d(np.asarray(x, float)) for x in (first, second))
  if a.shape != b.shape or a.ndim != 2 or not a.size:
    raise UserError(
      f"paired_difference: found shapes {a.shape} and {b.shape}, expected the"
      " same problems of the same seeds"
    )
  difference = a - b
  if not np.isfinite(difference).all():
    raise UserError("paired_difference: found a value that is not finite")
  seeds, problems = difference.shape
  if seeds == 1 or problems == 1 or not difference.any():
    interval = intervals.of_difference(difference.mean(axis=0), resamples, seed)
  else:
    interval = intervals.bootstrap(
      lambda s, p: difference[s[..., None], p[..., None, :]].mean((-2, -1)),
      seeds,
      problems,
      resamples=resamples,
      seed=seed,
    )
  return Estimate(
    float(difference.mean()), interval.low, interval.high, problems, seeds
  )
