"""The first wrong step of a wrong solution, by binary search.

Luo et al. 2024, "Improve Mathematical Reasoning in Language Models by Automated
Process Supervision", section 3.2: where no rollout succeeds, the error is at or
before the probed step, else after it. That takes at most `ceil(log2 T)` probes
of T steps, where labelling every one takes T - 1. It assumes that states stay
hopeless: exact for solvability, an approximation for sampled values.

Searches of many solutions run in lockstep, so that a sampler gets one batch a
round, and there are as many rounds as the longest solution needs.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

from research.errors import UserError
from research.prm.labelled import Label
from research.prm.labels.rollouts import (
  Complete,
  Rollout,
  Steps,
  count,
  rollouts,
)
from research.reasoning.trace import MonteCarlo


class Located(NamedTuple):
  """Where the first error is, and what was probed.

  Attributes:
    first_error: index of the first wrong step.
    probes: counts at the end of each probed step, by its index.
  """

  first_error: int
  probes: Mapping[int, MonteCarlo]

  def labels(self, n: int) -> tuple[Label, ...]:
    """Returns the labels of n steps: those that probes imply."""
    after = n - self.first_error - 1
    return (1,) * self.first_error + (0,) + (None,) * after


def bisect(n: int) -> Generator[int, bool, int]:
  """Yields indices of steps to probe, is sent whether they are hopeful.

  Args:
    n: number of steps, of which the last is known to end wrongly.

  Returns:
    The index of the first step whose end is hopeless.
  """
  low, high = 0, n - 1
  while low < high:
    middle = (low + high) // 2
    solvable = yield middle
    low, high = (middle + 1, high) if solvable else (low, middle)
  return low


def locate_errors(
  solutions: Sequence[Steps], complete: Complete, k: int
) -> list[Located]:
  """Returns where the first error of each wrong solution is.

  Args:
    solutions: the steps of solutions whose verdict is wrong.
    complete: writes rollouts of a round's prefixes at once.
    k: rollouts a probe.

  Raises:
    UserError: a solution has no steps.
  """
  return [x for x, _ in locate_with_rollouts(solutions, complete, k)]


def locate_with_rollouts(
  solutions: Sequence[Steps], complete: Complete, k: int
) -> list[tuple[Located, dict[int, list[Rollout]]]]:
  """Returns `locate_errors`, and the rollouts of each probe by its step."""
  if not all(solutions):
    raise UserError("locate_errors: found a solution without steps")
  searches = [bisect(len(steps)) for steps in solutions]
  drawn: list[dict[int, list[Rollout]]] = [{} for _ in solutions]
  errors: dict[int, int] = {}
  probes: dict[int, int] = {}

  def advance(i: int, solvable: bool | None) -> None:
    try:
      if solvable is None:
        probes[i] = next(searches[i])
      else:
        probes[i] = searches[i].send(solvable)
    except StopIteration as end:
      probes.pop(i, None)
      errors[i] = end.value

  for i in range(len(solutions)):
    advance(i, None)
  while probes:
    batch = list(probes.items())
    prefixes = [solutions[i][: at + 1] for i, at in batch]
    drawn_rollouts = rollouts(complete, prefixes, k)
    for (i, at), step_rollouts in zip(batch, drawn_rollouts, strict=True):
      drawn[i][at] = step_rollouts
      advance(i, any(x.correct for x in step_rollouts))
  return [
    (Located(errors[i], {at: count(x) for at, x in drawn[i].items()}), drawn[i])
    for i in range(len(solutions))
  ]
