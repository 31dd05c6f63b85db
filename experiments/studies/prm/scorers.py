"""What scores steps: probes of states or of lengths, and chance."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import scipy

from experiments.studies.prm.states import States
from research.prm.labelled import Label, LabelledSolution
from research.typing import Float, UserError

Scores = list[Float[np.ndarray, " _"]]
"""Of each solution, from 0 (wrong) to 1 (right)."""


class Labelled(NamedTuple):
  """Solutions, and a model's states at the ends of their steps."""

  solutions: Sequence[LabelledSolution]
  states: States

  def take(self, indices: np.ndarray) -> "Labelled":
    """Returns some of them."""
    return Labelled(
      [self.solutions[i] for i in indices], [self.states[i] for i in indices]
    )


# --- what is read of a step ---


def states(data: Labelled) -> States:
  """Returns the model's states."""
  return data.states


def lengths(data: Labelled) -> States:
  """Returns what needs no model: where a step is, and how long.

  Its index, and logarithms of the characters in it and before it.
  """
  found = []
  for solution in data.solutions:
    sizes = np.array([len(step) for step in solution.steps], float)
    before = np.cumsum(sizes) - sizes
    columns = np.arange(len(sizes)), np.log1p(sizes), np.log1p(before)
    found.append(np.stack(columns, axis=1))
  return found


# --- what is learned of a step ---


def verdict(solution: LabelledSolution) -> Sequence[Label]:
  """Returns at every step whether all of the solution is right.

  An outcome model that learns from every prefix (Cobbe et al. 2021,
  arXiv:2110.14168); here people, not the final answer, decide on the outcome.
  """
  return [int(solution.first_error == -1)] * len(solution.steps)


def last_verdict(solution: LabelledSolution) -> Sequence[Label]:
  """Returns the same at the last step, and nothing before it."""
  return [None] * (len(solution.steps) - 1) + [int(solution.first_error == -1)]


# --- scorers ---


@runtime_checkable
class Scorer(Protocol):
  """Learns from some solutions and scores the steps of others.

  Attributes:
    name: of its line.
    strengths: settings to choose among, on solutions that it does not score.
  """

  name: str
  strengths: tuple[float, ...]

  def scores(self, train: Labelled, test: Labelled, strength: float) -> Scores:
    """Returns scores of the test solutions' steps."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chance:
  """Uniform random numbers.

  Attributes:
    name: of its line.
    seed: of the numbers.
  """

  name: str = "random"
  seed: int = 0
  strengths: tuple[float, ...] = (0.0,)

  def scores(self, train: Labelled, test: Labelled, strength: float) -> Scores:
    """Returns numbers that depend on the numbers of solutions alone."""
    del strength
    rng = np.random.default_rng([self.seed, len(train.solutions)])
    return [rng.random(len(x.steps)) for x in test.solutions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
  """Logistic regression on features of a step.

  Attributes:
    name: of its line.
    features: `states` or `lengths`.
    labels: which labels are learned, None for unknown ones: `rows.truncated`,
      `verdict` or `last_verdict`.
    strengths: of the L2 penalty, see `fit`.
  """

  name: str
  features: Callable[[Labelled], States] = states
  labels: Callable[[LabelledSolution], Sequence[Label]]
  strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)

  def scores(self, train: Labelled, test: Labelled, strength: float) -> Scores:
    """Returns the chances that steps are right.

    Raises:
      UserError: no training step has a label.
    """
    known = [
      np.array([np.nan if x is None else x for x in self.labels(one)], float)
      for one in train.solutions
    ]
    y, x = np.concatenate(known), np.concatenate(self.features(train))
    some = ~np.isnan(y)
    if not some.any():
      raise UserError(f"Probe {self.name!r}: found no step with a label")
    fitted = fit(x[some], y[some], strength)
    return [fitted(one) for one in self.features(test)]


class Logistic(NamedTuple):
  """Chances of a linear map of standardised features."""

  mean: Float[np.ndarray, " D"]
  scale: Float[np.ndarray, " D"]
  weights: Float[np.ndarray, " D"]
  bias: float

  def __call__(self, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """Returns the chance of each row."""
    z = (x - self.mean) / self.scale @ self.weights + self.bias
    return scipy.special.expit(z)


def fit(
  x: Float[np.ndarray, "N D"], y: Float[np.ndarray, " N"], strength: float
) -> Logistic:
  """Returns the logistic regression with an L2 penalty.

  Minimises the mean cross entropy + strength / 2 |weights|^2 of standardised
  features; the bias is free. The loss is strictly convex.

  Args:
    x: features.
    y: labels, 0 or 1.
    strength: above 0.
  """
  # The deviation of what is constant may round to more than 0.
  mean, scale = x.mean(0), np.where(np.ptp(x, 0) > 0, x.std(0), 1.0)
  # The bias is the weight of a column of ones, without a penalty.
  z = np.append((x - mean) / scale, np.ones((len(x), 1)), axis=1).astype(float)
  penalty = np.append(np.full(x.shape[1], strength), 0.0)

  def loss(weights):
    logits = z @ weights
    value = np.mean(np.logaddexp(0.0, logits) - y * logits)
    slope = z.T @ (scipy.special.expit(logits) - y) / len(y)
    value += penalty @ weights**2 / 2
    return value, slope + penalty * weights

  found = scipy.optimize.minimize(
    loss,
    np.zeros(z.shape[1]),
    jac=True,
    method="L-BFGS-B",
    options={"gtol": 1e-6, "ftol": 1e-12, "maxiter": 1000},
  )
  return Logistic(mean, scale, found.x[:-1], float(found.x[-1]))
