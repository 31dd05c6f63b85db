"""Which wrong solutions a pool has, and which of them its scores see.

An outcome that only looks at the end rewards a right answer that wrong steps
have reached. So solutions are distinguished by what the task's verifier says is
wrong with them, and each kind is compared with the right solutions of the same
problem: that is what choosing among samples needs.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.searching.pool import Sample, Searched
from research.prm.scores.aggregate import Aggregate
from research.prm.scores.calibration import auc
from research.search.estimators.score_errors import (
  IndependentErrors,
  best_of_binormal,
)

_NUMBERS = re.compile(r"\d+( [-+*/] \d+)*")


def kind_of(sample: Sample) -> str:
  """Returns what is wrong with a sample, without its numbers; "" if nothing.

  Of "wrong: 3 + 4 is 7, not 9" that is "N is N, not N".
  """
  if sample.correct:
    return ""
  if sample.answer is None:
    return "no answer"
  reason = sample.verdict.reason.removeprefix("wrong: ")
  return _NUMBERS.sub("N", reason)


def kinds_of(
  pool: Sequence[Searched], aggregate: Aggregate
) -> dict[str, dict[str, Any]]:
  """Returns the kinds of wrong solutions of a pool, the most frequent first.

  Returns:
    By kind `share` of all samples, and `below`: of all pairs of such a solution
    and a right one of the same problem, the share in which the right one has
    the higher score, ties counting half; None where there is no such pair.
  """
  total = sum(len(searched.samples) for searched in pool)
  counts: dict[str, int] = {}
  wins: dict[str, float] = {}
  pairs: dict[str, int] = {}
  for searched in pool:
    right = [aggregate(x.scores) for x in searched.samples if x.correct]
    for sample in searched.samples:
      if not (kind := kind_of(sample)):
        continue
      counts[kind] = counts.get(kind, 0) + 1
      if sample.scores:
        score = aggregate(sample.scores)
        wins_of_right = sum((x > score) + 0.5 * (x == score) for x in right)
        wins[kind] = wins.get(kind, 0.0) + wins_of_right
        pairs[kind] = pairs.get(kind, 0) + len(right)
  return {
    kind: {
      "share": count / total,
      "below": wins[kind] / pairs[kind] if pairs.get(kind) else None,
    }
    for kind, count in sorted(counts.items(), key=lambda x: -x[1])
  }


def errors_of(
  pool: Sequence[Searched], aggregate: Aggregate
) -> dict[str, float | None]:
  """Returns how scores tell right from wrong solutions, and what that gives.

  Solutions with equal text have one score, so they count once; those without
  an answer are never chosen, and do not count.

  Returns:
    `auc` of all right and wrong solutions and `auc_within` those of the same
    problem (the mean over problems that have both), each None without a pair;
    the accuracy of best-of-n with `independent` errors, scores drawn from
    those of all problems, with `binormal` ones of the same AUC, and of a
    `perfect` verifier; and `distinct`, the mean number of solutions.
  """
  sides = [_scores(searched, aggregate) for searched in pool]
  right, wrong = (np.concatenate(scores) for scores in zip(*sides, strict=True))
  counts = np.array([[len(x) for x in pair] for pair in sides])
  pairs, index = np.unique(counts, axis=0, return_inverse=True)
  share = np.bincount(index.ravel()) / len(pool)
  within = [_auc(*pair) for pair in sides if all(map(len, pair))]
  pooled = _auc(right, wrong) if within else None
  errors = IndependentErrors(right, wrong)
  independent = [errors.best_of(int(r), int(w)) for r, w in pairs]
  level = 0.5 if pooled is None else pooled
  binormal = [best_of_binormal(level, int(r), int(w)) for r, w in pairs]
  return {
    "auc": pooled,
    "auc_within": float(np.mean(within)) if within else None,
    "independent": float(share @ independent),
    "binormal": float(share @ binormal),
    "perfect": float(share @ (pairs[:, 0] > 0)),
    "distinct": float(counts.sum() / len(pool)),
  }


def _auc(right: np.ndarray, wrong: np.ndarray) -> float:
  labels = np.repeat([1.0, 0.0], [len(right), len(wrong)])
  return auc(np.concatenate([right, wrong]), labels)


def _scores(
  searched: Searched, aggregate: Aggregate
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the scores of a problem's distinct right and wrong solutions."""
  right: dict[str, float] = {}
  wrong: dict[str, float] = {}
  for sample in searched.samples:
    if sample.answer is not None and sample.scores:
      text = "".join(step.text for step in sample.trace.steps)
      (right if sample.correct else wrong)[text] = aggregate.weight(
        sample.scores
      )
  return np.array([*right.values()]), np.array([*wrong.values()])
