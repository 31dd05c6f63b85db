"""Majority voting of k of n samples: the mean over all subsets, exact.

Answers are canonical texts, None is no vote: a sample without an answer takes
its place in the subset and votes for nothing. Among equally frequent answers a
random one wins. A subset without a vote is wrong.
"""

import collections
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import scipy
from jaxtyping import Float

from research.errors import UserError
from research.search.estimators.pool import check_subset

Answers = Sequence[Hashable | None]
"""Of the samples, in canonical form; None is no vote."""


def shares_correct(
  answers: Answers, correct: Sequence[bool]
) -> dict[Hashable, float]:
  """Returns the share of each answer's samples that are correct.

  It is 0 or 1, unless a grader accepts one form of an answer and not another
  that votes with it.

  Args:
    answers: answers of one problem's samples; None is left out.
    correct: their verdicts.

  Raises:
    UserError: not as many verdicts as answers.
  """
  if len(answers) != len(correct):
    raise UserError(
      f"voting: found {len(correct)} verdicts of {len(answers)} samples"
    )
  verdicts: dict[Hashable, list[bool]] = {}
  for answer, verdict in zip(answers, correct, strict=True):
    if answer is not None:
      verdicts.setdefault(answer, []).append(bool(verdict))
  return {answer: sum(x) / len(x) for answer, x in verdicts.items()}


def majority_at_k(answers: Answers, correct: Sequence[bool], k: int) -> float:
  """Returns the chance that the majority of k samples is correct.

  Exact, by generating functions: an answer with m samples wins with j of them
  where no other has more, and shares with those that have j as well. Of the
  others, x counts samples and z answers with exactly j.

  Args:
    answers: answers of one problem's samples.
    correct: their verdicts, see `shares_correct`.

  Raises:
    UserError: k is not 1 to n, or not as many verdicts as answers.
  """
  shares = shares_correct(answers, correct)
  check_subset(len(answers), k, "majority_at_k")
  votes = collections.Counter(x for x in answers if x is not None)
  n = len(answers)
  chances = [_chances(votes[x], k / n) for x in shares]
  unanswered = _chances(n - votes.total(), k / n)
  total = 0.0
  for i, share in enumerate(shares.values()):
    if share:
      others = chances[:i] + chances[i + 1 :]
      total += share * sum(
        _wins(chances[i], j, others, unanswered, k)
        for j in range(1, min(len(chances[i]) - 1, k) + 1)
      )
  # Each term is rounded; a certain win stays one.
  return min(total / float(_chances(n, k / n)[k]), 1.0)


def _wins(
  counts: Float[np.ndarray, "M"],
  j: int,
  others: Sequence[np.ndarray],
  unanswered: np.ndarray,
  k: int,
) -> float:
  """Returns the chance that k are drawn and an answer wins with j of them.

  Samples that are drawn independently, each with the chance `k / n`, are every
  subset of k equally often where k are drawn. So all numbers are chances, which
  no size of a pool makes too large or too small.

  Args:
    counts: chances that 0, 1, ... of the answer's samples are drawn.
    j: number of them.
    others, unanswered: the same chances of other answers and of samples without
      one; their lengths differ.
  """
  rest = k - j
  poly = np.zeros((1, rest + 1))
  poly[0, 0] = 1.0
  factors = [(unanswered, None)] + [(chances, j) for chances in others]
  for chances, limit in factors:
    poly = _times(poly, chances, limit)
  ways = poly[:, rest] @ (1 / np.arange(1, len(poly) + 1))
  return float(ways * counts[j])


def _times(
  poly: Float[np.ndarray, "Z X"],
  chances: Float[np.ndarray, "M"],
  limit: int | None,
) -> Float[np.ndarray, "Y X"]:
  """Returns the product with one answer's samples.

  Args:
    poly: coefficients of `z^t x^s`.
    chances: that 0, 1, ... of the answer's samples are drawn.
    limit: most that may be drawn; with as many it ties. None for no limit.
  """
  size = poly.shape[1]
  below = chances if limit is None else chances[:limit]
  out = np.stack([np.convolve(row, below)[:size] for row in poly])
  if limit is None or limit >= len(chances):
    return out
  tied = np.zeros((len(poly) + 1, size))
  tied[:-1] = out
  if limit < size:
    tied[1:, limit:] += chances[limit] * poly[:, : size - limit]
  return tied


def _chances(n: int, share: float) -> Float[np.ndarray, "M"]:
  """Returns the chance of i of n for i of 0 to n: the binomial distribution."""
  i, special = np.arange(n + 1), scipy.special
  ways = (
    special.gammaln(n + 1) - special.gammaln(i + 1) - special.gammaln(n - i + 1)
  )
  return np.exp(
    ways + special.xlogy(i, share) + special.xlogy(n - i, 1 - share)
  )


def vote(answers: Answers) -> Mapping[Hashable, float]:
  """Returns the chance of each answer to win the vote of all samples.

  Empty where there is no vote; equally frequent ones share.
  """
  return weighted_vote(answers, [1.0] * len(answers))


def weighted_vote(
  answers: Answers, weights: Sequence[float | int]
) -> Mapping[Hashable, float]:
  """Returns the chance of each answer to have the largest sum of weights.

  Sums that differ by less than rounding are equal, so that the order of samples
  decides nothing.

  Args:
    answers: None is no vote, whatever its weight.
    weights: at least 0, such as `Aggregate.weight`.

  Raises:
    UserError: not as many weights as answers, or one is negative or NaN.
  """
  if len(answers) != len(weights):
    raise UserError(
      f"voting: found {len(weights)} weights of {len(answers)} samples"
    )
  sums: dict[Hashable, list[float]] = {}
  for answer, weight in zip(answers, weights, strict=True):
    if not 0 <= weight < float("inf"):
      raise UserError(f"voting: found the weight {weight}, expected 0 or more")
    if answer is not None:
      sums.setdefault(answer, []).append(float(weight))
  if not sums:
    return {}
  totals = {answer: sum(sorted(x)) for answer, x in sums.items()}
  most = max(totals.values())
  best = [x for x, total in totals.items() if total >= most * (1 - 1e-12)]
  return dict.fromkeys(best, 1 / len(best))
