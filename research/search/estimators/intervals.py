"""Intervals of accuracies, and of differences between two systems.

Two systems are compared on the same problems: what a problem's difficulty does
to both cancels out. With several training seeds, seeds are drawn as well as
problems, since a claim is about the method and not about three checkpoints.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from research.errors import UserError

RESAMPLES = 10_000
CONFIDENCE = 0.95
"""Of every interval, two-sided."""


class Estimate(NamedTuple):
  """A mean and its interval.

  Attributes:
    value: the mean over seeds and problems.
    low, high: of the percentile bootstrap.
    problems, seeds: how many of each.
  """

  value: float
  low: float
  high: float
  problems: int
  seeds: int

  @property
  def above_zero(self) -> bool:
    """Whether the whole interval is."""
    return self.low > 0


def paired_difference(
  first: Float[np.ndarray, "*S B"],
  second: Float[np.ndarray, "*S B"],
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Estimate:
  """Returns the mean of `first - second`, bootstrapped over problems and seeds.

  Efron 1979, percentiles of 95%. For one system's accuracy let the second be
  zeros.

  Args:
    first, second: correctness of each problem, 0 to 1, at equal cost: `[P]`, or
      `[S, P]` with a row a training seed.
    resamples: drawn with replacement.
    seed: of the draws.

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
  rng = np.random.default_rng(seed)
  means = np.empty(resamples)
  for start in range(0, resamples, 500):  # bounds the memory
    n = min(500, resamples - start)
    rows = _weights(rng, n, seeds) @ difference
    means[start : start + n] = np.sum(rows * _weights(rng, n, problems), axis=1)
  tail = (1 - CONFIDENCE) / 2
  low, high = np.quantile(means, (tail, 1 - tail))
  return Estimate(
    float(difference.mean()), float(low), float(high), problems, seeds
  )


def _weights(
  rng: np.random.Generator, n: int, size: int
) -> Float[np.ndarray, "N B"]:
  """Returns how often each of `size` items is in n resamples, as shares."""
  return rng.multinomial(size, np.full(size, 1 / size), size=n) / size
