"""Biases of scores that accuracy hides: length, segmentation, and diversity."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from research.errors import UserError


def length_bias(
  scores: Float[np.ndarray, "B"],
  steps: Int[np.ndarray, "B"],
  correct: Bool[np.ndarray, "B"],
) -> float:
  """Returns the rank correlation of scores with numbers of steps.

  Within correct and within wrong traces, weighted by their number: that wrong
  traces are longer is no bias. Below 0 favours short traces, as a product does.
  NaN where scores or lengths are all equal.
  """
  total, weight = 0.0, 0
  for group in (correct, ~correct):
    if len(set(steps[group].tolist())) > 1 and np.ptp(scores[group]) > 0:
      n = int(group.sum())
      correlation = scipy.stats.spearmanr(scores[group], steps[group]).statistic
      total, weight = total + n * float(correlation), weight + n
  return total / weight if weight else float("nan")


class Sensitivity(NamedTuple):
  """How much scores depend on how the same traces are cut into steps.

  Attributes:
    change: mean absolute difference.
    flips: share of pairs of traces that change their order; a pair that is
      equal in one way only is half a flip.
  """

  change: float
  flips: float


def segmentation_sensitivity(
  first: Float[np.ndarray, "B"], second: Float[np.ndarray, "B"]
) -> Sensitivity:
  """Returns how scores of traces differ under two segmentations.

  Args:
    first, second: aggregated scores of the same traces, such as with pairs of
      steps merged, or steps cut in two.

  Raises:
    UserError: there are fewer than two traces.
  """
  if len(first) < 2:
    raise UserError(
      f"segmentation_sensitivity: found {len(first)} traces, expected two"
    )
  i, j = np.triu_indices(len(first), 1)
  # Not of differences: products of a step of score 0 are all -inf.
  signs = [1.0 * (x[i] > x[j]) - (x[i] < x[j]) for x in (first, second)]
  flips = np.abs(signs[0] - signs[1]) / 2
  equal = first == second
  change = np.abs(np.where(equal, 0, first) - np.where(equal, 0, second))
  return Sensitivity(float(change.mean()), float(flips.mean()))


class Diversity(NamedTuple):
  """How different the traces of one problem are, 1 of n to all of them.

  Attributes:
    first_steps: number of different first steps.
    answers: number of different answers; None is none.
  """

  first_steps: int
  answers: int


def diversity(
  traces: Sequence[Sequence[str]], answers: Sequence[Hashable | None]
) -> Diversity:
  """Returns the diversity of a problem's traces.

  A beam that collapses to one prefix has one first step; watch it by iteration.

  Args:
    traces: steps of each.
    answers: canonical, of each; None for no answer.
  """
  return Diversity(
    len({trace[0] for trace in traces if trace}),
    len({x for x in answers if x is not None}),
  )
