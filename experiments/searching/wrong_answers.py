"""Which wrong solutions a pool has, and which of them its scores see.

An outcome that only looks at the end rewards a right answer that wrong steps
have reached. So solutions are distinguished by what the task's verifier says is
wrong with them, and each kind is compared with the right solutions of the same
problem: that is what choosing among samples needs.
"""

import re
from collections.abc import Sequence
from typing import Any

from experiments.searching.pool import Sample, Searched
from research.prm.scores.aggregate import Aggregate

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

  Args:
    pool: problems, whose samples have scores.
    aggregate: makes one score of a sample's steps.

  Returns:
    By kind `share` of all samples, and `below`: of all pairs of such a solution
    and a right one of the same problem, the share in which the right one has
    the higher score, ties counting half; None where there is no such pair.
  """
  total = sum(len(one.samples) for one in pool)
  counts: dict[str, int] = {}
  wins: dict[str, float] = {}
  pairs: dict[str, int] = {}
  for one in pool:
    right = [aggregate(x.scores) for x in one.samples if x.correct]
    for sample in one.samples:
      if not (kind := kind_of(sample)):
        continue
      counts[kind] = counts.get(kind, 0) + 1
      if sample.scores:
        score = aggregate(sample.scores)
        won = sum((x > score) + 0.5 * (x == score) for x in right)
        wins[kind] = wins.get(kind, 0.0) + won
        pairs[kind] = pairs.get(kind, 0) + len(right)
  return {
    kind: {
      "share": count / total,
      "below": wins[kind] / pairs[kind] if pairs.get(kind) else None,
    }
    for kind, count in sorted(counts.items(), key=lambda x: -x[1])
  }
