"""Chooses among a problem's samples: the last setting of a search.

Each rule returns the chance of each answer to be chosen: where several are
equally good a random one is taken, so that the order of sampling decides
nothing. A path that was cut, or has no answer, is no vote.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from research.prm.scores.aggregate import Aggregate
from research.ranges import PositiveShare, Ranged
from research.search.engine import Path
from research.search.estimators.voting import vote, weighted_vote
from research.search.step_search import needs_scores
from research.typing import UserError

Answers = Sequence[Hashable | None]
"""Of each path, in canonical form; None where nothing was extracted."""

Chances = Mapping[Hashable, float]
"""Answer -> chance to be chosen; empty if there is none to choose."""


def answers_of(
  paths: Sequence[Path], extract: Callable[[Path], Hashable | None]
) -> list[Hashable | None]:
  """Returns the answer of each path that ended by itself, None of others."""
  return [extract(path) if path.stopped else None for path in paths]


@runtime_checkable
class Choice(Protocol):
  """A rule."""

  def __call__(self, paths: Sequence[Path], answers: Answers) -> Chances:
    """Returns the chance of each answer."""
    ...


@dataclasses.dataclass(frozen=True)
class BestOf:
  """The answer of the path with the best score (best-of-N).

  How often an answer was sampled does not count: equal solutions have equal
  scores. Where one right solution is sampled often and wrong ones differ, a
  scorer that knows little chooses worse than a random sample does; `Weighted`
  sums scores.

  Attributes:
    aggregate: makes one score of a path's steps.
  """

  needs_scores: ClassVar[bool] = True
  aggregate: Aggregate

  def __call__(self, paths: Sequence[Path], answers: Answers) -> Chances:
    scored = [
      (self.aggregate(path.scores), answer)
      for path, answer in zip(paths, answers, strict=True)
      if answer is not None
    ]
    if not scored:
      return {}
    most = max(score for score, _ in scored)
    best = [answer for score, answer in scored if score == most]
    return {answer: best.count(answer) / len(best) for answer in best}


@dataclasses.dataclass(frozen=True)
class Majority:
  """The most frequent answer (Wang et al. 2022, arXiv:2203.11171)."""

  def __call__(self, paths: Sequence[Path], answers: Answers) -> Chances:
    return vote(answers)


@dataclasses.dataclass(frozen=True)
class Weighted:
  """The answer with the largest sum of scores (weighted best-of-N).

  Attributes:
    aggregate: makes one weight of a path's steps.
  """

  needs_scores: ClassVar[bool] = True
  aggregate: Aggregate

  def __call__(self, paths: Sequence[Path], answers: Answers) -> Chances:
    voters = [
      (answer, path.scores)
      for path, answer in zip(paths, answers, strict=True)
      if answer is not None
    ]
    weights = self.aggregate.weights([scores for _, scores in voters])
    return weighted_vote([answer for answer, _ in voters], weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confident(Ranged):
  """A vote of the most confident paths (DeepConf, Fu et al. 2025,
  arXiv:2508.15260, offline).

  Confidence is the mean log-probability of a path's tokens; the paper's is the
  mean over the k most likely tokens at each place.

  Attributes:
    keep: share of the paths that vote; at least one does.
    inner: how they vote.
  """

  keep: PositiveShare = 0.5
  inner: Choice = Majority()

  @property
  def needs_scores(self) -> bool:
    """Whether `inner` does."""
    return needs_scores(self.inner)

  def __call__(self, paths: Sequence[Path], answers: Answers) -> Chances:
    voters = [i for i, answer in enumerate(answers) if answer is not None]
    if not voters:
      return {}
    mean = {i: _confidence(paths[i]) for i in voters}
    # A product may be rounded down: 0.7 of 90 are 62.99999999999999.
    count = max(1, int(self.keep * len(voters) * (1 + 1e-9)))
    least = sorted(mean.values())[-count]
    kept = [i for i in voters if mean[i] >= least]
    return self.inner([paths[i] for i in kept], [answers[i] for i in kept])


def _confidence(path: Path) -> float:
  if path.log_prob is None:
    raise UserError(
      "Confident: found a path without a log-probability, expected one of each"
      " path.\nSample with Stepwise.log_probs. A path with words that were put"
      " into it (BudgetForcing) has none: choose by another rule."
    )
  return path.log_prob / len(path.tokens)


def accuracy(chances: Chances, correct: Callable[[Hashable], float]) -> float:
  """Returns the chance that the chosen answer is correct; 0 without answers.

  Args:
    chances: each answer's chance to be chosen.
    correct: whether an answer is, or the share of its samples that are.
  """
  return float(sum(p * correct(answer) for answer, p in chances.items()))
