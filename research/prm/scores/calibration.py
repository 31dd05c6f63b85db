"""Whether scores mean what they say, and maps that make them.

Fit on problems that are in no other split: scores of the same problem's traces
are not independent.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from research.errors import UserError

Scores = Float[np.ndarray, "B"]
Labels = Float[np.ndarray, "B"] | Int[np.ndarray, "B"] | Bool[np.ndarray, "B"]
"""0 to 1; soft ones for calibration against a value."""


def _pair(scores: Scores, labels: Labels) -> tuple[Scores, Scores]:
  if len(scores) != len(labels) or not len(scores):
    raise UserError(
      f"calibration: found {len(scores)} scores and {len(labels)} labels,"
      " expected as many, and one at least"
    )
  if not np.isfinite(scores).all():
    raise UserError("calibration: found a score that is not finite")
  return np.asarray(scores, float), np.asarray(labels, float)


def brier(scores: Scores, labels: Labels) -> float:
  """Returns the mean squared difference (Brier 1950)."""
  scores, labels = _pair(scores, labels)
  return float(np.mean((scores - labels) ** 2))


def expected_calibration_error(
  scores: Scores, labels: Labels, bins: int = 15
) -> float:
  """Returns the ECE over bins of equal mass (Nixon et al. 2019).

  The mean difference between a bin's mean score and its share of positives.
  Equal scores stay together, so that the order of samples changes nothing: bins
  are cut between different scores, where the ranks are nearest to equal mass.

  Args:
    labels: 0 to 1.
    bins: most bins.
  """
  scores, labels = _pair(scores, labels)
  n = len(scores)
  ranks = scipy.stats.rankdata(scores, "average") - 0.5
  which = np.minimum((ranks * bins / n).astype(int), bins - 1)
  counts = np.bincount(which, minlength=bins)
  gaps = np.bincount(which, scores - labels, minlength=bins)
  return float(np.abs(gaps[counts > 0]).sum() / n)


def auc(scores: Scores, labels: Labels) -> float:
  """Returns the area under the ROC curve; ties count half.

  The chance that a positive's score is above a negative's (Mann and Whitney
  1947). NaN where one of the classes is missing.
  """
  scores, labels = _pair(scores, labels)
  positive = labels > 0.5
  n, m = int(positive.sum()), int((~positive).sum())
  if not n or not m:
    return float("nan")
  ranks = scipy.stats.rankdata(scores)
  return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def auc_error(
  scores: Scores, labels: Labels, groups: Sequence[Hashable]
) -> float:
  """Returns the standard error of `auc` over groups, such as problems.

  Steps of one problem are not independent, groups are: the deviation of the
  sum of each group's influence on the AUC (Obuchowski 1997, Biometrics 53:567).
  NaN of fewer than two groups, or where one of the classes is missing.

  Args:
    scores: scores of steps.
    labels: 0 to 1.
    groups: name of each step's group.
  """
  scores, labels = _pair(scores, labels)
  positive = labels > 0.5
  places = {name: i for i, name in enumerate(dict.fromkeys(groups))}
  if len(places) < 2 or positive.all() or not positive.any():
    return float("nan")
  ranks, influence = scipy.stats.rankdata(scores), np.zeros(len(scores))
  area = auc(scores, labels)
  for sign, members in ((1, positive), (-1, ~positive)):
    # Of each member, how many of the other class lie below it.
    below = ranks[members] - scipy.stats.rankdata(scores[members])
    share = below / (~members).sum()
    share = share if sign > 0 else 1 - share
    influence[members] = (share - area) / members.sum()
  total = np.bincount([places[name] for name in groups], influence)
  return float(np.sqrt(np.sum(total**2) * len(total) / (len(total) - 1)))


def by_index(index: int, steps: int) -> int:
  """Returns the index of a step: 0 is the first."""
  return index


def by_steps_to_go(index: int, steps: int) -> int:
  """Returns how many steps follow: 0 is the last."""
  return steps - 1 - index


def auc_by(
  scores: Sequence[Sequence[float | int]],
  labels: Sequence[Sequence[float | int | None]],
  group: Callable[[int, int], int] = by_index,
) -> dict[int, float]:
  """Returns the AUC of each group of steps.

  Args:
    scores, labels: one sequence for each trace, a value a step; labels of None
      are left out.
    group: (index of a step, number of steps of its trace) -> its group.
  """
  groups: dict[int, list[tuple[float, float]]] = {}
  for trace, known in zip(scores, labels, strict=True):
    for i, (score, label) in enumerate(zip(trace, known, strict=True)):
      if label is not None:
        pair = float(score), float(label)
        groups.setdefault(group(i, len(trace)), []).append(pair)
  return {
    at: auc(*np.array(pairs, float).T) for at, pairs in sorted(groups.items())
  }


@dataclasses.dataclass(frozen=True)
class Temperature:
  """Divides logits by a temperature (Guo et al. 2017); keeps the order.

  Attributes:
    value: above 1 where the model was too sure.
  """

  value: float

  def __call__(self, logits: Scores) -> Scores:
    """Returns calibrated probabilities."""
    return scipy.special.expit(logits / self.value)


def fit_temperature(logits: Scores, labels: Labels) -> Temperature:
  """Returns the temperature with the least cross entropy.

  The loss is convex in `1 / temperature`.

  Args:
    logits: binary scores before the sigmoid.
    labels: 0 to 1.
  """
  logits, labels = _pair(logits, labels)

  def loss(log_scale):
    z = logits * np.exp(log_scale)
    return float(np.mean(np.logaddexp(0.0, z) - labels * z))

  fit = scipy.optimize.minimize_scalar(
    loss, bounds=(-6.0, 6.0), method="bounded", options={"xatol": 1e-9}
  )
  return Temperature(float(np.exp(-fit.x)))


class Isotonic(NamedTuple):
  """A rising map of scores, linear between its points.

  Attributes:
    scores: increasing.
    values: calibrated score at each of them, not decreasing.
  """

  scores: Scores
  values: Scores

  def __call__(self, scores: Scores) -> Scores:
    """Returns calibrated probabilities."""
    return np.interp(scores, self.scores, self.values)


def fit_isotonic(scores: Scores, labels: Labels) -> Isotonic:
  """Returns the rising map with the least squared error (Barlow et al. 1972).

  Equal scores count as one point, their mean label weighted by their number.
  """
  scores, labels = _pair(scores, labels)
  points, where, counts = np.unique(
    scores, return_inverse=True, return_counts=True
  )
  means = np.bincount(where, labels) / counts
  fitted = scipy.optimize.isotonic_regression(
    means, weights=counts.astype(float)
  )
  return Isotonic(points, fitted.x)
