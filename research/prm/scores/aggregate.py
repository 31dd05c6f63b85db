"""From scores of steps to one of the trace.

Store scores of steps and aggregate afterwards; the choice is a setting, and it
depends on the labels that the model learned:

* labels that end at the first error say whether steps are right. The model was
  never trained on a step after an error, so what it says of a wrong trace's
  last step means nothing. Choosing among finished traces by `Last` then gets
  worse with more of them (measured on countdown: .265 of 2 traces, .219 of 16,
  a random pick .245); `Product` and `Min` of the same scores do not. Between
  siblings of one prefix `Last` is fine: how to prune and how to choose at the
  end are two settings.
* labels that are values say what becomes of a state. Steps depend on each
  other, and `Last` has all of it.

A trace without steps has the worst score, -inf. Products shrink with every
step: never compare them across different ways of cutting steps.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from research.errors import UserError
from research.prm.scores.checks import Scores, probabilities
from research.ranges import PositiveInt, Ranged

WORST = -math.inf
"""The score of a trace without steps."""


@runtime_checkable
class Aggregate(Protocol):
  """Makes one score of a trace's steps."""

  def __call__(self, scores: Scores) -> float:
    """Returns the score by which traces are ranked: higher is better."""
    ...

  def weight(self, scores: Scores) -> float:
    """Returns a vote's weight, 0 to 1; 0 for a trace without steps."""
    ...

  def weights(self, traces: Sequence[Scores]) -> list[float]:
    """Returns the weights of votes that are compared: to each other only."""
    ...


class _Probability:
  """An aggregate whose score is itself a probability."""

  def __call__(self, scores: Scores) -> float:
    chances = probabilities(scores)
    return float(self._of(chances)) if len(chances) else WORST

  def weight(self, scores: Scores) -> float:
    """Returns the score itself, 0 for a trace without steps."""
    return max(self(scores), 0.0)

  def weights(self, traces: Sequence[Scores]) -> list[float]:
    return [self.weight(scores) for scores in traces]

  def _of(self, scores: Float[np.ndarray, "T"]) -> float | np.floating:
    raise NotImplementedError


class _Log:
  """An aggregate whose score is a logarithm, so that it cannot underflow."""

  def __call__(self, scores: Scores) -> float:
    chances = probabilities(scores)
    if not len(chances):
      return WORST
    with np.errstate(divide="ignore"):
      return float(self._of(np.log(chances)))

  def weight(self, scores: Scores) -> float:
    """Returns the exponential of the score."""
    return math.exp(self(scores))

  def weights(self, traces: Sequence[Scores]) -> list[float]:
    """Returns weights relative to the largest, which cannot underflow."""
    logs = [self(scores) for scores in traces]
    most = max(logs, default=WORST)
    return [0.0 if x == WORST else math.exp(x - most) for x in logs]

  def _of(self, logs: Float[np.ndarray, "T"]) -> float | np.floating:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Last(_Probability):
  """The last step's: of models of value."""

  def _of(self, scores: Float[np.ndarray, "T"]) -> float | np.floating:
    return scores[-1]


@dataclasses.dataclass(frozen=True)
class Min(_Probability):
  """The worst step's."""

  def _of(self, scores: Float[np.ndarray, "T"]) -> float | np.floating:
    return scores.min()


@dataclasses.dataclass(frozen=True)
class Max(_Probability):
  """The best step's."""

  def _of(self, scores: Float[np.ndarray, "T"]) -> float | np.floating:
    return scores.max()


@dataclasses.dataclass(frozen=True)
class Mean(_Probability):
  """The mean; RLHFlow's."""

  def _of(self, scores: Float[np.ndarray, "T"]) -> float | np.floating:
    return scores.mean()


@dataclasses.dataclass(frozen=True)
class LastMean(Ranged, _Probability):
  """The mean of the last steps.

  Attributes:
    steps: how many, or all where there are fewer.
  """

  steps: PositiveInt

  def _of(self, scores: Float[np.ndarray, "T"]) -> float | np.floating:
    return scores[-self.steps :].mean()


@dataclasses.dataclass(frozen=True)
class Product(_Log):
  """The chance that all steps are right (Lightman et al. 2023); its logarithm.

  Favours traces with few steps.
  """

  def _of(self, logs: Float[np.ndarray, "T"]) -> float | np.floating:
    return logs.sum()


@dataclasses.dataclass(frozen=True)
class Geometric(_Log):
  """The geometric mean, which length does not change; its logarithm."""

  def _of(self, logs: Float[np.ndarray, "T"]) -> float | np.floating:
    return logs.mean()


AGGREGATES: Mapping[str, Aggregate] = {
  "geometric": Geometric(),
  "last": Last(),
  "max": Max(),
  "mean": Mean(),
  "min": Min(),
  "product": Product(),
}
"""Those without settings, by the names that run files and tables use."""

VALUE_SOURCES = "monte_carlo_soft", "monte_carlo_hard", "exact_value"
"""Labels of every step, those after an error included."""

TRUNCATED_SOURCES = (
  *("human", "human_first_error", "monte_carlo_truncated", "consensus"),
  *("exact_first_error", "judge"),
)
"""Labels that end at the first error."""


def default_aggregate(label_source: str) -> Aggregate:
  """Returns how to choose among finished traces by a model's scores.

  Args:
    label_source: what the model learned, `LabelledSolution.label_source`.

  Raises:
    UserError: it is unknown, so that no choice is safe.
  """
  if label_source in VALUE_SOURCES:
    return Last()
  if label_source in TRUNCATED_SOURCES:
    return Product()
  known = ", ".join((*VALUE_SOURCES, *TRUNCATED_SOURCES))
  raise UserError(
    f"label_source: found {label_source!r}, expected one of {known}.\n"
    "Say how the labels were made, or name the aggregate."
  )


def check_final_selection(aggregate: Aggregate, label_source: str) -> None:
  """Raises UserError where an aggregate must not choose the final trace.

  Scores of steps after an error mean nothing where labels end at it. Pruning
  among siblings of one prefix needs no such check.
  """
  uses_last = isinstance(aggregate, Last | LastMean)
  if uses_last and label_source in TRUNCATED_SOURCES:
    raise UserError(
      f"aggregate: found {aggregate}, expected Product or Min: labels of"
      f" {label_source!r} end at the first error, so that the last step's score"
      " of a wrong trace means nothing.\nLearn labels of every step, or choose"
      " by Product; Last is fine for pruning."
    )
