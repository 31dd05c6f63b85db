"""Comparing systems at equal cost.

The cost is an axis that the caller chooses: FLOPs of inference, verifier
included (equal inference); with training shared out over the queries
(`total_flops`, equal total); or seconds (equal latency, which is another order
of systems: equal FLOPs are not equal time). Always show large + search beside
small + search.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy

from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Curve:
  """A system's accuracy at several costs.

  Attributes:
    name: the system's.
    costs: rising, above 0, in one unit for all systems that are compared.
    accuracies: accuracy at each of them.
  """

  name: str
  costs: tuple[float | int, ...]
  accuracies: tuple[float | int, ...]

  def __post_init__(self) -> None:
    costs = (0, *self.costs)
    rising = all(a < b for a, b in zip(costs, costs[1:], strict=False))
    if not self.costs or len(self.costs) != len(self.accuracies) or not rising:
      raise UserError(
        f"Curve {self.name!r}: found costs {self.costs} and"
        f" {len(self.accuracies)} accuracies, expected rising costs above 0,"
        " each with its accuracy"
      )

  def affordable(self, budget: float | int) -> int | None:
    """Returns the index of the last point within a budget, or None.

    Fixed before accuracies are known: the best of several points within the
    budget would be chosen by noise.
    """
    within = [i for i, cost in enumerate(self.costs) if cost <= budget]
    return within[-1] if within else None

  def interpolated(self, budget: float | int) -> float | None:
    """Returns the accuracy at a budget, linear in its logarithm.

    None below the first point, which the budget does not buy; the last point's
    above it, as nothing is known there.
    """
    if budget < self.costs[0]:
      return None
    accuracy = np.interp(np.log(budget), np.log(self.costs), self.accuracies)
    return float(accuracy)


class Point(NamedTuple):
  """What a system reaches within a budget.

  Attributes:
    cost: that it spends, at most the budget.
    accuracy: at that cost.
  """

  cost: float | int
  accuracy: float | int


def at_equal_cost(
  systems: Sequence[Curve], budget: float | int
) -> dict[str, Point | None]:
  """Returns what each system reaches within a budget, by its name.

  None for a system of which the budget buys nothing.

  Args:
    systems: curves whose costs are in one unit, which names the protocol: FLOPs
      of inference, `total_flops`, or seconds.
    budget: in that unit, such as a single pass of the large model.
  """
  reached = {}
  for curve in systems:
    i = curve.affordable(budget)
    point = i is not None and Point(curve.costs[i], curve.accuracies[i])
    reached[curve.name] = point or None
  return reached


def crossover(small: Curve, large: Curve) -> float | int | None:
  """Returns the lowest measured cost from which the large system is ahead.

  None where the small one is ahead at the last cost that both have, or where
  they have none in common.
  """
  end = min(small.costs[-1], large.costs[-1])
  if end < max(small.costs[0], large.costs[0]):
    return None
  costs = sorted({x for x in (*small.costs, *large.costs) if x <= end})
  lowest = None
  for cost in costs:
    mine, theirs = small.interpolated(cost), large.interpolated(cost)
    if mine is None and theirs is None:
      continue
    behind = mine is not None and (theirs is None or theirs <= mine)
    lowest = None if behind else cost if lowest is None else lowest
  return lowest


def total_flops(
  inference: float | int, training: float | int, queries: float | int
) -> float:
  """Returns FLOPs a query with training shared out over all queries."""
  if queries <= 0:
    raise UserError(f"total_flops: found {queries} queries, expected some")
  return inference + training / queries


def inference_multiplier(size: float | int, ratio: float | int) -> float:
  """Returns how much more inference a small model may do at equal total.

  Snell et al. 2024 (arXiv:2408.03314), section 7: a model M times larger costs
  `M (X + Y)`, with `X = 6 N D_pre` and `Y = 2 N D_inf`. The small one may spend
  `M + 3 (D_pre / D_inf) (M - 1)` times its own inference.

  Args:
    size: M, how many times larger the other model is.
    ratio: `D_inf / D_pre`, tokens of inference over tokens of pretraining.
  """
  return size + 3 / ratio * (size - 1)


class EffectiveSize(NamedTuple):
  """The size of the single-pass model that is as accurate.

  Attributes:
    parameters: number; of the ladder's end where it lies beyond.
    bound: "between" models of the ladder, or beyond: "at most" the smallest,
      "at least" the largest.
  """

  parameters: float
  bound: Literal["between", "at most", "at least"]


def effective_size(
  parameters: Sequence[float | int],
  accuracies: Sequence[float | int],
  accuracy: float | int,
) -> EffectiveSize:
  """Returns the size at which a ladder of single passes is as accurate.

  Interpolates in the logarithm of the size, on the rising curve that is nearest
  to the ladder's accuracies. Nothing is extrapolated.

  Args:
    parameters: sizes of the ladder's models, rising.
    accuracies: accuracy of a single pass of each.
    accuracy: the system's.

  Raises:
    UserError: there are fewer than two models, or sizes do not rise.
  """
  sizes = np.asarray(parameters, float)
  if (
    len(sizes) < 2
    or len(sizes) != len(accuracies)
    or (np.diff(sizes) <= 0).any()
  ):
    raise UserError(
      f"effective_size: found sizes {list(parameters)} and {len(accuracies)}"
      " accuracies, expected two models at least, from small to large"
    )
  curve = scipy.optimize.isotonic_regression(np.asarray(accuracies, float)).x
  if accuracy <= curve[0]:
    return EffectiveSize(float(sizes[0]), "at most")
  if accuracy > curve[-1]:
    return EffectiveSize(float(sizes[-1]), "at least")
  # The smallest size that reaches it: of equal accuracies the first.
  values, first = np.unique(curve, return_index=True)
  last = [np.flatnonzero(curve == x)[-1] for x in values]
  i = int(np.searchsorted(values, accuracy))
  low, high = last[i - 1], first[i]
  share = (accuracy - values[i - 1]) / (values[i] - values[i - 1])
  logs = np.log(sizes)
  size = np.exp(logs[low] + share * (logs[high] - logs[low]))
  return EffectiveSize(float(size), "between")
