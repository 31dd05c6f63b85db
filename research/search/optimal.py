"""The best strategy for each difficulty, cross-validated.

Snell et al. 2024 (arXiv:2408.03314), section 3.2. The best of several
strategies on the problems that are also reported wins by noise alone: of 10
strategies with 100 problems a bin by about 1.5 standard errors. So one half of
the problems chooses and the other half is reported, and then the other way
round.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from research.errors import UserError


def quantile_bins(
  pass_rates: Float[np.ndarray, "B"], bins: int = 5
) -> Int[np.ndarray, "B"]:
  """Returns each problem's level: 0 is the easiest, `bins - 1` the hardest.

  Equally easy problems share a level, so that their order decides nothing.

  Args:
    pass_rates: pass@1 of many samples, or a predicted one, such as the mean
      score of a few samples (whose cost belongs to the ledger).
    bins: number of levels.
  """
  if not len(pass_rates) or bins < 1 or np.isnan(pass_rates).any():
    raise UserError(
      f"quantile_bins: found {len(pass_rates)} problems and {bins} bins,"
      " expected one of each at least, and no NaN"
    )
  # Middle ranks, of the hardest first.
  _, where, counts = np.unique(
    -pass_rates, return_inverse=True, return_counts=True
  )
  middle = np.cumsum(counts) - counts / 2
  return (middle[where] * bins / len(pass_rates)).astype(int)


def absolute_bins(pass_at_1: Float[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
  """Returns 0 (easy, from 50%), 1 (medium, from 10%) or 2 (hard).

  Liu et al. 2025 (arXiv:2502.06703), section 3.2. Quantiles move with the
  policy; these do not, so that policies can be compared.
  """
  return np.where(pass_at_1 >= 0.5, 0, np.where(pass_at_1 >= 0.1, 1, 2))


@dataclasses.dataclass(frozen=True)
class Choice:
  """What choosing by difficulty reaches, beside what it is compared with.

  Attributes:
    accuracy: mean of the chosen strategies, on problems that did not choose.
    best_single: the same of one strategy for all problems, chosen the same way.
    random: mean accuracy of a random strategy.
    oracle: mean accuracy of each problem's best strategy, unknown in practice.
    same_problems: accuracy of choices on the problems that are reported:
      inflated.
    chosen: for each fold that chose, each bin's strategy; -1 for an empty one.
    per_problem: accuracy of each problem, from the other fold's choice.
    single_per_problem: the same of `best_single`.
  """

  accuracy: float
  best_single: float
  random: float
  oracle: float
  same_problems: float
  chosen: tuple[tuple[int, ...], ...]
  per_problem: Float[np.ndarray, "B"]
  single_per_problem: Float[np.ndarray, "B"]


def compute_optimal(
  accuracy: Float[np.ndarray, "S B"],
  bins: Int[np.ndarray, "B"],
  seed: int = 0,
) -> Choice:
  """Returns the compute-optimal choice at one budget, cross-validated in two.

  Args:
    accuracy: each strategy's on each problem, 0 to 1, at equal cost.
    bins: each problem's level, from 0.
    seed: random seed of the halves, drawn within each bin.

  Raises:
    UserError: shapes do not fit, a value is NaN, or a bin has one problem.
  """
  strategies, problems = accuracy.shape
  if len(bins) != problems or not strategies or not problems:
    raise UserError(
      f"compute_optimal: found accuracies {accuracy.shape} and {len(bins)}"
      " bins, expected a bin of each problem"
    )
  if not np.isfinite(accuracy).all() or bins.min() < 0:
    raise UserError("compute_optimal: found NaN, or a bin below 0")
  folds = _halves(bins, seed)
  size = int(bins.max()) + 1
  chosen = [_best(accuracy, bins, folds == fold, size) for fold in (0, 1)]
  single = [_best(accuracy, np.zeros_like(bins), folds == f, 1) for f in (0, 1)]
  inside = _best(accuracy, bins, np.ones(problems, bool), size)
  each = np.arange(problems)
  per_problem = accuracy[
    np.where(folds == 1, chosen[0][bins], chosen[1][bins]), each
  ]
  alone = accuracy[np.where(folds == 1, single[0][0], single[1][0]), each]
  return Choice(
    accuracy=float(per_problem.mean()),
    best_single=float(alone.mean()),
    random=float(accuracy.mean()),
    oracle=float(accuracy.max(axis=0).mean()),
    same_problems=float(accuracy[inside[bins], each].mean()),
    chosen=tuple(tuple(x.tolist()) for x in chosen),
    per_problem=per_problem,
    single_per_problem=alone,
  )


def _halves(bins: Int[np.ndarray, "B"], seed: int) -> Int[np.ndarray, "B"]:
  """Returns 0 or 1 of each problem, as many of each in every bin, or nearly."""
  rng = np.random.default_rng(seed)
  folds = np.empty(len(bins), int)
  for level in np.unique(bins):
    where = np.flatnonzero(bins == level)
    if len(where) < 2:
      raise UserError(
        f"compute_optimal: found one problem in bin {level}, expected two at"
        " least: one chooses, another is reported; use fewer bins"
      )
    folds[rng.permutation(where)] = np.arange(len(where)) % 2
  return folds


def _best(
  accuracy: Float[np.ndarray, "S B"],
  bins: Int[np.ndarray, "B"],
  which: Sequence[bool] | np.ndarray,
  size: int,
) -> Int[np.ndarray, "M"]:
  """Returns each bin's best strategy; the first of equal ones."""
  best = np.full(size, -1)
  for level in range(size):
    rows = np.flatnonzero(which & (bins == level))
    if len(rows):
      best[level] = int(accuracy[:, rows].mean(axis=1).argmax())
  return best
