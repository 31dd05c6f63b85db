"""What a verifier's errors cost a choice among samples.

Best-of-n fails where the highest score is a wrong sample's. How often that
would happen by errors that are independent of the problem follows from the
scores of all right and of all wrong samples. A choice that does worse has
errors in common: hard problems have wrong samples that look right.
"""

import numpy as np
import scipy
from jaxtyping import Float


class IndependentErrors:
  """Best-of-n where scores are drawn from those of all problems.

  Args:
    right: scores of right samples, of all problems.
    wrong: scores of wrong samples, of all problems.
  """

  def __init__(
    self, right: Float[np.ndarray, "B"], wrong: Float[np.ndarray, "M"]
  ):
    values = np.unique(np.concatenate([right, wrong]))
    self._right = _steps(right, values)
    self._wrong = _steps(wrong, values)

  def best_of(self, right: int, wrong: int) -> float:
    """Returns the chance that the highest of the scores is a right sample's.

    Among equal scores a random one is taken. The chance is
    `E[F_wrong(x) ** wrong]` of the highest score x of the right samples; in a
    group of equal scores both distributions rise linearly, and the integrals
    over all groups are those of polynomials.

    Args:
      right: number of right samples.
      wrong: number of wrong samples.
    """
    if not right or not wrong:
      return float(right > 0)
    # Exact for a polynomial of degree right + wrong - 1.
    nodes, weights = np.polynomial.legendre.leggauss((right + wrong + 1) // 2)
    share = (nodes + 1) / 2
    highest = self._right[:-1, None] + np.diff(self._right)[:, None] * share
    below = self._wrong[:-1, None] + np.diff(self._wrong)[:, None] * share
    density = right * highest ** (right - 1) * np.diff(self._right)[:, None]
    return float((density * below**wrong @ (weights / 2)).sum())


def _steps(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Returns the share of scores below each value, and 1."""
  below = np.searchsorted(np.sort(scores), values) / max(len(scores), 1)
  return np.append(below, 1.0)


def best_of_binormal(auc: float | int, right: int, wrong: int) -> float:
  """Returns best-of-n of a verifier whose scores are two normal distributions.

  They have the same variance, and are as far apart as the AUC says.

  Args:
    auc: chance that a right sample scores above a wrong one, 0 to 1.
    right: number of right samples.
    wrong: number of wrong samples.
  """
  if not right or not wrong:
    return float(right > 0)
  apart = np.sqrt(2) * scipy.special.ndtri(np.clip(auc, 1e-9, 1 - 1e-9))
  x = np.linspace(-9, 18, 4001) + min(apart, 0)
  log_below = wrong * scipy.special.log_ndtr(x)
  log_highest = (right - 1) * scipy.special.log_ndtr(x - apart)
  density = right * np.exp(log_highest + scipy.stats.norm.logpdf(x - apart))
  return float(np.trapezoid(density * np.exp(log_below), x))
