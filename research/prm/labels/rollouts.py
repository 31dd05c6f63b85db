"""Labels by rollouts: a step is as good as what can be made of it.

Wang et al. 2024, "Math-Shepherd", section 3.3: from the end of a step, a
completer writes k solutions, of which c are correct. Their share estimates the
completer's value of the state, not whether the step is right: a wrong step from
which it recovers looks good, a right one from which it fails looks bad. Counts
are kept, since the bias of a hard label depends on k.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from research.errors import UserError
from research.prm.labelled import Label
from research.reasoning.trace import MonteCarlo, check_counts

Steps = tuple[str, ...]
"""The steps of a prefix, or of what completes it."""


class Rollout(NamedTuple):
  """A completion of a prefix.

  Attributes:
    steps: after the prefix.
    correct: the verifier's verdict on the whole solution.
  """

  steps: Steps
  correct: bool


@runtime_checkable
class Complete(Protocol):
  """Writes rollouts of several prefixes at once, `k` of each.

  A compiled sampler takes prefixes as a batch; its prefixes are of one problem
  or of many, as whoever makes it decides.
  """

  def __call__(
    self, prefixes: Sequence[Steps], k: int
  ) -> Sequence[Sequence[Rollout]]:
    """Returns k rollouts of each prefix."""
    ...


def rollouts(
  complete: Complete, prefixes: Sequence[Steps], k: int
) -> list[list[Rollout]]:
  """Returns k rollouts of each prefix.

  Raises:
    UserError: k is below 1, or the completer returned another number.
  """
  if k < 1:
    raise UserError(f"rollouts: found k = {k}, expected one at least")
  drawn = [list(x) for x in complete(prefixes, k)] if prefixes else []
  sizes = [len(x) for x in drawn]
  if sizes != [k] * len(prefixes):
    raise UserError(
      f"complete: found {sizes} rollouts, expected {k} of each of"
      f" {len(prefixes)} prefixes"
    )
  return drawn


def count(drawn: Sequence[Rollout]) -> MonteCarlo:
  """Returns how many rollouts there are, and how many are correct."""
  return MonteCarlo(sum(bool(x.correct) for x in drawn), len(drawn))


def monte_carlo(
  steps: Steps, correct: bool, complete: Complete, k: int
) -> tuple[MonteCarlo, ...]:
  """Returns the counts at the end of every step, k rollouts a step.

  The last one needs none: its count is the verdict on the solution.

  Args:
    steps: steps of a whole solution.
    correct: the verifier's verdict on it.
    k: their number; 8 in the paper, 16 in RLHFlow's data.
  """
  if not steps:
    return ()
  prefixes = [steps[:n] for n in range(1, len(steps))]
  drawn = rollouts(complete, prefixes, k)
  return (*map(count, drawn), MonteCarlo(int(correct), 1))


def soft(counts: Sequence[MonteCarlo | None]) -> tuple[Label, ...]:
  """Returns `c / k` of each step, None where there are no rollouts."""
  return tuple(x and check_counts(x, "soft").value for x in counts)


def hard(
  counts: Sequence[MonteCarlo | None], threshold: float | int = 0.0
) -> tuple[Label, ...]:
  """Returns 1 where `c / k` is above a threshold, else 0.

  A threshold of 0, one correct rollout, is the papers'; higher ones were worse
  (Zhang et al. 2025, arXiv:2501.07301, section 3.1.4).
  """
  return tuple(
    None if value is None else int(value > threshold) for value in soft(counts)
  )


def truncate(labels: Sequence[Label]) -> tuple[Label, ...]:
  """Returns the labels with those after the first 0 unknown.

  What follows an error is neither right nor wrong. A model that learns these
  labels has never been trained on such a step, so that its score of the last
  step of a wrong trace means nothing: see `scores.aggregate`.
  """
  labels = tuple(labels)
  if 0 not in labels:
    return labels
  n = labels.index(0) + 1
  return labels[:n] + (None,) * (len(labels) - n)


def chance_of_positive(value: float | int, k: int) -> float:
  """Returns the probability that k rollouts give a hard label of 1.

  Args:
    value: the completer's chance of success from the state.
  """
  return 1 - (1 - value) ** k
