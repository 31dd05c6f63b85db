"""Claims about a number that two steps of a pipeline report, seed by seed.

Or of one seed each, where the command reports the number's standard error.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments.core import stats
from experiments.core.stats import Decision, Mean
from experiments.studies.protocol import Row, Verdict
from research.typing import UserError

Metric = str | tuple[str, ...]
"""Where a number stands in a row, names joined by dots; the mean of several."""


def value(row: Row, metric: Metric) -> float:
  """Returns a row's number.

  Raises:
    UserError: the row has none there.
  """
  if isinstance(metric, tuple):
    return float(np.mean([value(row, name) for name in metric]))
  number = _look_up(row, metric)
  if isinstance(number, bool) or not isinstance(number, int | float):
    raise UserError(
      f"{metric!r}: found no number there, expected one of"
      f" {', '.join(sorted(_names(row)))}"
    )
  return float(number)


def has(row: Row, metric: Metric) -> bool:
  """Returns whether a row has a number there."""
  names = metric if isinstance(metric, tuple) else (metric,)
  return all(isinstance(_look_up(row, x), int | float) for x in names)


def _look_up(row: Any, name: str) -> Any:
  """Returns what stands at a dotted name; keys may have dots of their own."""
  if not isinstance(row, Mapping):
    return None
  if name in row:
    return row[name]
  for i, letter in enumerate(name):
    if letter == "." and name[:i] in row:
      return _look_up(row[name[:i]], name[i + 1 :])
  return None


def _names(row: Any) -> list[str]:
  if not isinstance(row, Mapping):
    return [""]
  return [f"{k}.{x}".strip(".") for k in row for x in _names(row[k])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """How a step's number compares with another's.

  Attributes:
    claim: a sentence.
    metric: the number, see `value`.
    first: the step that the claim is about.
    second: the step that it is compared with, or a number.
    holds: what is claimed. `above` and `below`: the first is so by more than
      `margin`. `within`: they are apart by `margin` at most. `recovers`: the
      first closes at least the share `margin` of what lies between `start` and
      the second.
    margin: in units of the metric; of `recovers` a share.
    start: the metric of the first step's row where it began; for `recovers`.
    error: the metric of the number's standard error over texts, which decides
      in place of seeds: two of both rows', as if these were independent. 0.0
      for a number that is exact.
  """

  claim: str
  metric: Metric
  first: str
  second: str | float | int
  holds: Literal["above", "below", "within", "recovers"] = "above"
  margin: float | int = 0.0
  start: Metric | None = None
  error: Metric | float | None = None

  def __post_init__(self):
    if (self.holds == "recovers") != (self.start is not None):
      raise UserError(
        f"Claim.start: found {self.start!r} with holds={self.holds!r}, expected"
        " a metric for 'recovers' alone"
      )

  @property
  def steps(self) -> list[str]:
    """Names of the steps whose rows it needs."""
    return [x for x in (self.first, self.second) if isinstance(x, str)]

  def verdict(self, rows: Mapping[str, Sequence[Row]]) -> Verdict:
    """Returns whether it holds, by Student's interval over seeds.

    Args:
      rows: by step, a seed after the other. A step of one seed is compared with
        each seed of the other.
    """
    first = self._values(self.first, self.metric, rows)
    second = self._values(self.second, self.metric, rows)
    seeds = stats.common_seeds(f"Claim {self.claim!r}", len(first), len(second))
    shown = f"{first.mean():.4g} against {second.mean():.4g}"
    if self.holds == "recovers":
      start = self._values(self.first, self.start, rows)
      share = stats.mean((start - first) / (start - second))
      text = f"{shown} from {start.mean():.4g}: {share.times(100)}%"
      return Verdict(self.claim, text, stats.above(share, self.margin))
    if self.error is None:
      apart = stats.mean(np.broadcast_to(first - second, (seeds,)))
      return Verdict(self.claim, f"{shown}: {apart}", self._decide(apart))
    two = 2 * math.hypot(*(self._error(x, rows) for x in self.steps))
    shown += f", two standard errors {two:.2g}" if two else ""
    apart = Mean(float(np.mean(first - second)), two)
    return Verdict(self.claim, shown, self._decide(apart))

  def _error(self, step: str, rows: Mapping[str, Sequence[Row]]) -> float:
    if not isinstance(self.error, str | tuple):
      return float(self.error or 0.0)
    return float(np.mean([value(row, self.error) for row in rows[step]]))

  def _values(
    self,
    step: str | float | int,
    metric: Any,
    rows: Mapping[str, Sequence[Row]],
  ) -> np.ndarray:
    if not isinstance(step, str):
      return np.array([step], float)
    return np.array([value(row, metric) for row in rows[step]])

  def _decide(self, apart: Mean) -> Decision:
    if self.holds == "within":
      return stats.equivalent(apart, self.margin)
    sign = 1 if self.holds == "above" else -1
    return stats.above(apart.times(sign), self.margin)
