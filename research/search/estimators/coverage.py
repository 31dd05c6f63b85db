"""Coverage (pass@k) beyond the largest k that was sampled.

Brown et al. 2024, "Large Language Monkeys" (arXiv:2407.21787), section 3.2:
`log c(k) = a k^b`. Each problem's failures fall exponentially; the sum falls as
a power because some problems are nearly hopeless. The other model says so
itself: the chance of success is Beta distributed over problems.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy
from jaxtyping import Int

from research.errors import UserError
from research.search.estimators.closed_forms import beta_pass_at_k


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """`c(k) = exp(a k^b)`.

  Attributes:
    a, b: both below zero where coverage grows with k.
  """

  a: float
  b: float

  def __call__(self, k: float | int) -> float:
    """Returns the coverage of k samples."""
    return float(np.exp(self.a * k**self.b))


@dataclasses.dataclass(frozen=True)
class BetaBinomial:
  """Chances of success that are Beta(alpha, beta) distributed over problems.

  Attributes:
    alpha, beta: failures fall as `k^-alpha`.
  """

  alpha: float
  beta: float

  def __call__(self, k: float | int) -> float:
    """Returns the coverage of k samples."""
    return beta_pass_at_k(self.alpha, self.beta, k)


def fit_power_law(
  ks: Sequence[int],
  coverage: Sequence[float],
  variances: Sequence[float] | None = None,
) -> PowerLaw:
  """Returns the least squares fit of `log(-log c)` over `log k`.

  Hold out the largest decade of k, and report the error there: a fit that is
  only good where it was made says nothing.

  Args:
    ks: budgets, two different ones at least.
    coverage: pass@k of each, above 0 and below 1.
    variances: bootstrap variances of the coverage, or None for equal weights.

  Raises:
    UserError: there are too few, or coverage is 0 or 1 somewhere.
  """
  c = np.asarray(coverage, float)
  if len(set(ks)) < 2 or len(ks) != len(c):
    raise UserError(
      f"fit_power_law: found {len(ks)} budgets and {len(c)} values, expected as"
      " many, and two different budgets at least"
    )
  if not ((c > 0) & (c < 1)).all():
    raise UserError(
      f"fit_power_law: found coverage {c.tolist()}, expected above 0 and below"
      " 1; leave out budgets that solve nothing or everything"
    )
  # d log(-log c) / dc = 1 / (c log c): the delta method.
  weights = np.ones(len(c))
  if variances is not None:
    spread = np.asarray(variances, float)
    if not (spread > 0).all():
      raise UserError("fit_power_law: found a variance that is not above 0")
    weights = np.abs(c * np.log(c)) / np.sqrt(spread)
  slope, intercept = np.polyfit(np.log(ks), np.log(-np.log(c)), 1, w=weights)
  return PowerLaw(a=float(-np.exp(intercept)), b=float(slope))


def fit_beta(
  samples: Int[np.ndarray, "B"], correct: Int[np.ndarray, "B"]
) -> BetaBinomial:
  """Returns the most likely Beta distribution of problems' chances.

  Uses each problem's counts, not only the curve.

  Args:
    samples: number of samples of each problem.

  Raises:
    UserError: counts do not fit, or all problems are always or never solved.
  """
  if (
    len(samples) != len(correct)
    or not ((correct >= 0) & (correct <= samples)).all()
  ):
    raise UserError("fit_beta: expected 0 to n correct of n samples a problem")
  if (correct == 0).all() or (correct == samples).all():
    raise UserError(
      "fit_beta: found problems that are all solved, or all unsolved, by every"
      " sample; expected some of both"
    )

  def loss(logs):
    return -scipy.stats.betabinom.logpmf(correct, samples, *np.exp(logs)).mean()

  share = np.clip(correct.sum() / samples.sum(), 1e-3, 1 - 1e-3)
  start = np.log([share, 1 - share])
  fit = scipy.optimize.minimize(
    loss, start, method="L-BFGS-B", bounds=[(-9, 9), (-9, 9)]
  )
  alpha, beta = np.exp(fit.x)
  return BetaBinomial(float(alpha), float(beta))
