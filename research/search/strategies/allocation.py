"""One budget of samples for a batch, more of it where more samples pay.

A few samples of each problem say how hard it is (Snell et al. 2024,
arXiv:2408.03314, section 3.2); the rest of the budget goes to the problems
where it is worth most (Damani et al. 2024, arXiv:2410.04707, section 3). If a
sample is right with the chance p, one of k is with `1 - (1 - p)^k`, so the next
one is worth `p (1 - p)^k`: nothing on problems that are solved or hopeless.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from research.prm.scores.aggregate import Aggregate, Product
from research.ranges import Ranged
from research.search.choose import answers_of
from research.search.engine import Engine, Frontier, Path
from research.search.ledger import Ledger
from research.search.step_search import Limits, Samples
from research.typing import UserError


@runtime_checkable
class PassRatePredictor(Protocol):
  """Predicts from a problem's first samples how often samples are right."""

  def __call__(self, paths: Sequence[Path]) -> float:
    """Returns the predicted chance of a right sample, 0 to 1."""
    ...


@dataclasses.dataclass(frozen=True)
class Agreement:
  """The share of samples with the most frequent answer; needs no verifier.

  Attributes:
    answer: extracts a path's answer, in canonical form, or None.
  """

  answer: Callable[[Path], Hashable | None]

  def __call__(self, paths: Sequence[Path]) -> float:
    answers = answers_of(paths, self.answer)
    votes = [answer for answer in answers if answer is not None]
    return max(map(votes.count, votes), default=0) / len(paths)


@dataclasses.dataclass(frozen=True)
class MeanScore:
  """The verifier's mean score.

  Attributes:
    aggregate: makes one score of a path's steps.
  """

  aggregate: Aggregate = Product()

  def __call__(self, paths: Sequence[Path]) -> float:
    if any(len(path.scores) != len(path.steps) for path in paths):
      raise UserError(
        "MeanScore: found paths without scores, expected one for each step:"
        " give the engine a verifier, or predict by Agreement"
      )
    return float(np.mean([self.aggregate.weight(x.scores) for x in paths]))


def allocate(
  pass_rates: Sequence[float | int], total: int, first: int = 0
) -> list[int]:
  """Returns each problem's samples, the `first` ones of each included.

  The samples that are left go one by one where the next one is worth most, to
  the problem with the fewest of equal ones: no other division is worth more.

  Args:
    pass_rates: each problem's chance of a right sample.
    total: samples of all problems, at least `first` of each.
    first: samples that each problem has.
  """
  counts = [first] * len(pass_rates)

  def worth(i):
    return pass_rates[i] * (1 - pass_rates[i]) ** counts[i], -counts[i]

  for _ in range(total - sum(counts)):
    counts[max(range(len(pass_rates)), key=worth)] += 1
  return counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveAllocation(Ranged):
  """Independent samples; a problem's number depends on its difficulty.

  Attributes:
    predictor: predicts pass rates from the first samples, which are on the
      ledger and are samples as all others.
    copies: mean samples of a problem; a batch of B has `B * copies` exactly.
    first: samples of each problem from which its difficulty is predicted.
  """

  predictor: PassRatePredictor
  copies: int = 16
  first: int = 4

  def __post_init__(self):
    super().__post_init__()
    self.expect("first", 1, self.copies)

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's samples; see `Strategy`."""
    start = engine.begin(prompts, limits.tokens, 1, limits.key)
    first = [range(self.first)] * len(prompts)
    paths_of_each, ledgers = _sampled(engine, start, first, limits.steps)
    pass_rates = [self.predictor(paths) for paths in paths_of_each]
    counts = allocate(pass_rates, self.copies * len(prompts), self.first)
    if self.copies > self.first:
      start = dataclasses.replace(start, ledgers=ledgers)
      rest = [range(self.first, count) for count in counts]
      added, ledgers = _sampled(engine, start, rest, limits.steps)
      paths_of_each = [
        [*x, *y] for x, y in zip(paths_of_each, added, strict=True)
      ]
    return [
      Samples(tuple(paths), ledger)
      for paths, ledger in zip(paths_of_each, ledgers, strict=True)
    ]


def _sampled(
  engine: Engine,
  start: Frontier,
  branches: Sequence[Sequence[int]],
  steps: int,
) -> tuple[list[list[Path]], tuple[Ledger, ...]]:
  """Returns each problem's paths, and the ledgers after them.

  Args:
    start: a row for each problem, before its first step; it stays as it is.
    branches: for each problem, the branches from which its paths have their
      random keys.
    steps: most steps of a path.
  """
  rows = [i for i, numbers in enumerate(branches) for _ in numbers]
  branch = [k for numbers in branches for k in numbers]
  now = engine.select(start, rows, branch)
  paths = tuple(
    dataclasses.replace(path, root=k)
    for path, k in zip(now.paths, branch, strict=True)
  )
  now = dataclasses.replace(now, paths=paths)
  for _ in range(steps):
    now = engine.advance(now)
    if all(path.done for path in now.paths):
      break
  paths_by_problem: list[list[Path]] = [[] for _ in branches]
  for path in now.paths:
    paths_by_problem[path.problem].append(path)
  return paths_by_problem, now.ledgers
