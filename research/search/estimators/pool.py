"""pass@k and best-of-k of n samples: means over all k-subsets, in closed form.

Every subset of k is as good an experiment as the first k samples. The mean over
all of them is unbiased, and has the least variance of what the pool can give.
"""

import math

import numpy as np
import scipy
from jaxtyping import Bool, Float

from research.errors import UserError


def check_subset(n: int, k: int, where: str) -> None:
  """Raises UserError unless k samples can be drawn out of n."""
  if not 1 <= k <= n:
    raise UserError(
      f"{where}: found k = {k} of {n} samples, expected 1 to {n}; sample more"
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Returns the chance that k of n samples have a correct one.

  Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation
  1: `1 - C(n - c, k) / C(n, k)`. n counts the samples of this problem: of a
  benchmark, take the mean of its problems.

  Args:
    n: number of samples of one problem.
    correct: number of correct ones, c.

  Raises:
    UserError: k is not 1 to n, or c not 0 to n.
  """
  check_subset(n, k, "pass_at_k")
  if not 0 <= correct <= n:
    raise UserError(f"pass_at_k: found {correct} correct of {n} samples")
  if n - correct < k:
    return 1.0
  i = np.arange(n - correct + 1, n + 1)
  return float(1 - np.prod(1 - k / i))


def best_of_k(
  scores: Float[np.ndarray, "B"], correct: Bool[np.ndarray, "B"], k: int
) -> float:
  """Returns the chance that the best-scored of k samples is correct.

  The sample of rank i is the best of `C(n - i, k - 1)` subsets. Among equal
  scores a random one is taken, so that each counts with their mean.

  Args:
    scores: scores of one problem's samples; higher is better, -inf the worst.
    correct: their verdicts.

  Raises:
    UserError: k is not 1 to n, or a score is NaN.
  """
  n = len(scores)
  check_subset(n, k, "best_of_k")
  if len(correct) != n:
    raise UserError(f"best_of_k: found {len(correct)} verdicts of {n} samples")
  if np.isnan(scores).any():
    raise UserError("best_of_k: found a score that is not a number")
  _, group = np.unique(-scores, return_inverse=True)
  means = np.bincount(group, correct) / np.bincount(group)
  ordered = means[np.sort(group)]
  # log C(n - i, k - 1) - log C(n, k), for i = 1 .. n - k + 1; then it is 0.
  rest = n - np.arange(1, n - k + 2)
  logs = _log_choose(rest, k - 1) - _log_choose(np.array([n]), k)
  return float(np.exp(logs) @ ordered[: n - k + 1])


def _log_choose(n: np.ndarray, k: int) -> Float[np.ndarray, "B"]:
  gammaln = scipy.special.gammaln
  return gammaln(n + 1) - math.lgamma(k + 1) - gammaln(n - k + 1)
