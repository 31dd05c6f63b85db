"""How well scores find first wrong steps, cross-validated by problem."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.studies.prm.scorers import Labelled, Scorer, Scores
from research import intervals
from research.prm.labelled import Label, LabelledSolution, labels_until
from research.prm.scores import first_error, processbench
from research.search.estimators import Estimate
from research.typing import Float, Int

THRESHOLDS = 100
"""Most thresholds that are tried, quantiles of the scores."""


class Judged(NamedTuple):
  """Scores of solutions that had no part in making them.

  Attributes:
    scores: of steps.
    predicted: index of each solution's first wrong step, or -1.
    thresholds: below which a step is called wrong, of each fold.
    strengths: of each fold.
  """

  scores: Scores
  predicted: list[int]
  thresholds: list[float]
  strengths: list[float]


def problems_of(solutions: Sequence[LabelledSolution]) -> list[str]:
  """Returns the name of each solution's problem: the first id of its text.

  Some sets name samples, not problems, such as ProcessBench.
  """
  names: dict[str, str] = {}
  return [names.setdefault(x.prompt, x.problem_id) for x in solutions]


def folds_of(
  solutions: Sequence[LabelledSolution], count: int, seed: int
) -> Int[np.ndarray, " N"]:
  """Returns each solution's fold; those of one problem share theirs."""
  problems = problems_of(solutions)
  names = sorted(set(problems))
  order = np.random.default_rng(seed).permutation(len(names))
  fold = {name: int(at) % count for name, at in zip(names, order, strict=True)}
  return np.array([fold[name] for name in problems])


def cross_validated(
  scorer: Scorer, data: Labelled, folds: int, inner: int, seed: int
) -> Judged:
  """Returns scores and predictions of all solutions.

  Threshold and strength of a fold are those with the best F1 on the other
  folds' solutions, cross-validated again.

  Args:
    scorer: learns anew for each fold.
    data: the solutions.
    folds, inner: of the outer and inner cross-validation.
    seed: of both partitions.
  """
  fold = folds_of(data.solutions, folds, seed)
  scores: list[Any] = [None] * len(fold)
  predicted = [-1] * len(fold)
  chosen = []
  for k in range(folds):
    train = data.take(np.flatnonzero(fold != k))
    test = np.flatnonzero(fold == k)
    threshold, strength = _choose(scorer, train, inner, seed + 1)
    found = scorer.scores(train, data.take(test), strength)
    for i, one in zip(test, found, strict=True):
      scores[i], predicted[i] = one, first_error(one, threshold)
    chosen.append((threshold, strength))
  thresholds, strengths = map(list, zip(*chosen, strict=True))
  return Judged(scores, predicted, thresholds, strengths)


def scored_by_folds(
  scorer: Scorer,
  data: Labelled,
  indices: Sequence[int],
  changed: Labelled,
  strengths: Sequence[float],
  folds: int,
  seed: int,
) -> Scores:
  """Returns scores of changed solutions by the models of their folds.

  The models of `cross_validated`: none learned from a changed solution, or from
  one of a problem that it scores.

  Args:
    scorer: learns anew for each fold.
    data: unchanged solutions.
    indices: of the solutions in `data` that were changed.
    changed: what they became.
    strengths: of each fold, see `Judged`.
    folds, seed: of the partition.
  """
  fold = folds_of(data.solutions, folds, seed)
  own = fold[np.array(indices, int)]
  scores: list[Any] = [None] * len(indices)
  for k in np.unique(own):
    train = data.take(np.flatnonzero(fold != k))
    test = np.flatnonzero(own == k)
    found = scorer.scores(train, changed.take(test), strengths[k])
    for i, one in zip(test, found, strict=True):
      scores[i] = one
  return scores


def _choose(
  scorer: Scorer, data: Labelled, folds: int, seed: int
) -> tuple[float, float]:
  fold = folds_of(data.solutions, folds, seed)
  best = (-1.0, 0.0, 0.0)
  for strength in scorer.strengths:
    scores: list[Any] = [None] * len(fold)
    for k in range(folds):
      test = np.flatnonzero(fold == k)
      train = data.take(np.flatnonzero(fold != k))
      found = scorer.scores(train, data.take(test), strength)
      for i, one in zip(test, found, strict=True):
        scores[i] = one
    f1, threshold = best_threshold(scores, data.solutions)
    best = max(best, (f1, threshold, strength), key=lambda x: x[0])
  return best[1], best[2]


def best_threshold(
  scores: Scores, solutions: Sequence[LabelledSolution]
) -> tuple[float, float]:
  """Returns the best F1 of a threshold, and the threshold."""
  truth = [int(x.first_error) for x in solutions]
  every = np.concatenate(scores)
  tried = np.unique(np.quantile(every, np.linspace(0, 1, THRESHOLDS)))
  found = [
    processbench([first_error(x, t) for x in scores], truth).f1 for t in tried
  ]
  at = int(np.argmax(found))
  return found[at], float(tried[at])


# --- statistics of resampled problems ---

Statistic = Callable[[Float[np.ndarray, " N"]], float]
"""Of weights of solutions."""


def f1_of(predicted: Sequence[int], truth: Sequence[int]) -> Statistic:
  """Returns ProcessBench's F1 of weighted solutions."""
  mine, label = np.array(predicted), np.array(truth)
  hit, wrong = mine == label, label >= 0

  def f1(weights):
    shares = [
      (weights * hit)[x].sum() / max(weights[x].sum(), 1e-12)
      for x in (wrong, ~wrong)
    ]
    return 2 * shares[0] * shares[1] / max(sum(shares), 1e-12)

  return f1


def auc_of(scores: Scores, truth: Sequence[int]) -> Statistic:
  """Returns the area under the ROC curve of steps until the first wrong one.

  See `auc_of_labels`.
  """
  pairs = zip(scores, truth, strict=True)
  return auc_of_labels(scores, [labels_until(t, len(x)) for x, t in pairs])


def auc_of_labels(
  scores: Scores, labels: Sequence[Sequence[Label]]
) -> Statistic:
  """Returns the area under the ROC curve of steps labelled 0 or 1.

  The chance that a right step's score is above a wrong one's; ties count half.
  A step has its solution's weight.
  """
  truth = [np.array([np.nan if x is None else x for x in y]) for y in labels]
  known = [~np.isnan(x) for x in truth]
  every = np.concatenate([x[k] for x, k in zip(scores, known, strict=True)])
  owner = np.repeat(np.arange(len(known)), [k.sum() for k in known])
  right = np.concatenate(truth)[np.concatenate(known)] == 1
  _, rank = np.unique(every, return_inverse=True)

  def auc(weights):
    own = weights[owner]
    wrong = np.bincount(rank, own * ~right)
    above = np.cumsum(wrong) - wrong / 2
    total = wrong.sum() * own[right].sum()
    return float((own * right) @ above[rank] / total) if total else np.nan

  return auc


def estimate(
  statistic: Statistic, problems: Sequence[str], resamples: int = 2000
) -> Estimate:
  """Returns a statistic and its interval over problems, by a bootstrap.

  Args:
    statistic: function of weights of solutions; a difference of two is paired.
    problems: name of each solution's.
    resamples: number of draws, always the same ones.
  """
  names, owner = np.unique(problems, return_inverse=True)
  n = len(names)

  def drawn(rows):
    return statistic(np.bincount(rows, minlength=n)[owner].astype(float))

  found = intervals.bootstrap(drawn, n, resamples=resamples, vectorized=False)
  value = statistic(np.ones(len(owner)))
  return Estimate(value, found.low, found.high, n, 1)
