"""How well scores choose among solutions of a problem, and why.

Best-of-n alone is a biased metric: a model that only looks at the last step
does well on it (Zhang et al. 2025, arXiv:2501.07301, section 4.2). Report the
others beside it.
"""

from collections.abc import Sequence

import numpy as np
import scipy
from jaxtyping import Bool, Float

from research.errors import UserError
from research.prm.scores.checks import Scores, finite


def best_of_n(
  scores: Float[np.ndarray, "B"], correct: Bool[np.ndarray, "B"]
) -> float:
  """Returns the chance that the best-scored of a problem's traces is correct.

  Among equal ones a random one is taken: the first would leak the order of
  sampling.

  Raises:
    UserError: there are no traces, or a score is NaN.
  """
  if not len(scores) or len(scores) != len(correct):
    raise UserError(
      f"best_of_n: found {len(scores)} scores of {len(correct)} traces,"
      " expected as many, and one at least"
    )
  if np.isnan(scores).any():
    raise UserError("best_of_n: found a score that is not a number")
  return float(correct[scores == scores.max()].mean())


def min_at_last(scores: Sequence[Scores]) -> float:
  """Returns the share of traces whose lowest score is the last step's.

  Over 40% says that a process reward model has become an outcome reward model
  (Zhang et al. 2025, section 4.2.3). Traces of one step say nothing and are
  left out; of equal scores the earliest is the lowest.
  """
  longer = [finite(x) for x in scores if len(x) > 1]
  if not longer:
    return float("nan")
  return float(np.mean([x.argmin() == len(x) - 1 for x in longer]))


def wrong_process_detection(
  scores: Sequence[Scores],
  final_correct: Sequence[bool],
  process_correct: Sequence[bool],
  threshold: float | int = 0.5,
) -> float:
  """Returns the share of right answers by wrong steps that were detected.

  Detected is a trace with a score below the threshold. NaN where no trace has a
  right answer by a wrong process.

  Args:
    scores: scores of each trace's steps.
    final_correct: whether its answer is right.
    process_correct: whether all of its steps are.
    threshold: below it a step is called wrong.
  """
  rows = zip(scores, final_correct, process_correct, strict=True)
  detected = [
    finite(mine).min(initial=np.inf) < threshold
    for mine, answer, process in rows
    if answer and not process
  ]
  return float(np.mean(detected)) if detected else float("nan")


def rank_correlation(
  scores: Float[np.ndarray, "B"], values: Float[np.ndarray, "B"]
) -> float:
  """Returns Spearman's correlation of scores with exact values."""
  return float(scipy.stats.spearmanr(scores, values).statistic)
