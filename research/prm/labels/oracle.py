"""Exact labels, where a task has them: solvability, values, checked steps.

They make the noise of all other labels measurable. States are hashable and
finite in number; a task says what follows from one.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

from research.prm.labelled import Label

Checked = Literal["ok", "error", "unknown"]
"""Of a step, by a checker of the task."""


class Transition(NamedTuple):
  """A step that a policy may take.

  Attributes:
    state: state after it.
    probability: the policy's probability to take it.
  """

  state: Hashable
  probability: float | int


def is_solvable[S: Hashable](
  state: S,
  children: Callable[[S], Iterable[S]],
  correct: Callable[[S], bool],
) -> bool:
  """Whether a correct final state can be reached; exact.

  Args:
    state: where to start.
    children: states that one legal step leads to; none from a final state.
    correct: whether a state is a correct final one.
  """
  done: set[S] = set()
  waiting = [state]
  while waiting:
    x = waiting.pop()
    if correct(x):
      return True
    if x not in done:
      done.add(x)
      waiting += children(x)
  return False


def state_value[S: Hashable](
  state: S,
  policy: Callable[[S], Sequence[Transition]],
  correct: Callable[[S], bool],
) -> float:
  """Returns the probability that a policy ends correctly; exact.

  Each state is computed once. States must not repeat on a way.

  Args:
    state: where to start.
    policy: the steps that it may take, whose probabilities add up to at most 1;
      the rest ends wrongly. A state without steps is final.
    correct: whether a final state is correct.
  """
  values: dict[Hashable, float] = {}
  waiting: list[Hashable] = [state]
  while waiting:
    x = waiting[-1]
    steps = policy(x)
    missing = [s.state for s in steps if s.state not in values]
    if missing:
      waiting += missing
      continue
    waiting.pop()
    values[x] = (
      sum(s.probability * values[s.state] for s in steps)
      if steps
      else float(correct(x))
    )
  return values[state]


def label_steps(
  steps: Sequence[str], verify: Callable[[Sequence[str], str], Checked]
) -> tuple[Label, ...]:
  """Returns a checker's labels, unknown after the first error.

  Args:
    steps: texts of a solution's steps.
    verify: says of a prefix and the next step whether that is right; of a
      `reasoning.StepVerifier`, the label of its `verify_step`.
  """
  labels: list[Label] = []
  for i, step in enumerate(steps):
    verdict = verify(steps[:i], step)
    labels.append({"ok": 1, "error": 0, "unknown": None}[verdict])
    if verdict == "error":
      break
  return (*labels, *(None,) * (len(steps) - len(labels)))
