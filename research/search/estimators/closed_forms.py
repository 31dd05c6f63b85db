"""Curves that can be computed: what measured ones are compared with."""

import math

import scipy

from research.errors import UserError


def best_of_n_divergence(n: int) -> float:
  """Returns the KL divergence of best-of-n from the policy, in nats.

  `log n - (n - 1) / n` for scores without ties, else an upper bound (Beirami et
  al. 2024, arXiv:2401.01879).
  """
  if n < 1:
    raise UserError(f"best_of_n_divergence: found n = {n}, expected 1 or more")
  return math.log(n) - (n - 1) / n


def beta_pass_at_k(
  alpha: float | int, beta: float | int, k: float | int
) -> float:
  """Returns pass@k where chances of success are Beta distributed.

  `1 - B(alpha, beta + k) / B(alpha, beta)`.
  """
  betaln = scipy.special.betaln
  ratio = betaln(alpha, beta + k) - betaln(alpha, beta)
  return float(-math.expm1(ratio))


def noisy_best_of_n(
  p: float | int,
  true_positive: float | int,
  false_positive: float | int,
  n: int,
) -> float:
  """Returns the accuracy of n samples with a verifier that errs.

  A random one of those that it accepts is taken, or of all where it accepts
  none. It rises to `p t / a`, and no further: a plateau that more samples
  cannot lift.

  Args:
    p: chance of a sample to be correct.
    true_positive: t, chance to accept a correct one.
    false_positive: f, chance to accept a wrong one.
  """
  accepted = p * true_positive + (1 - p) * false_positive
  none_accepted = (1 - accepted) ** n
  accuracy = 0.0
  if accepted > 0:
    accuracy += (1 - none_accepted) * p * true_positive / accepted
  if accepted < 1:
    accuracy += none_accepted * p * (1 - true_positive) / (1 - accepted)
  return accuracy


def tries_until_success(p: float | int, most: int) -> float:
  """Returns the expected number of samples until one is correct, at most n.

  `sum_{i < n} (1 - p)^i`: the cost of stopping early by a real verifier.
  """
  return float(most) if p == 0 else (1 - (1 - p) ** most) / p
