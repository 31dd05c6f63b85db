"""OmegaPRM: a tree of states whose errors are found by binary search.

Luo et al. 2024, "Improve Mathematical Reasoning in Language Models by Automated
Process Supervision", sections 3.2 and 3.3. A pool has pairs of a state and a
wrong rollout from it, of states whose value is neither 0 nor 1. The pair with
the highest `Q(s, r) + U(s)` is taken, the rollout's first error located, and
each state that was probed joins the tree.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from research.errors import UserError
from research.prm.labelled import LabelledSolution
from research.prm.labels.binary_search import locate_with_rollouts
from research.prm.labels.rollouts import (
  Complete,
  Rollout,
  Steps,
  count,
  rollouts,
)
from research.reasoning.trace import MonteCarlo


@dataclasses.dataclass(frozen=True)
class State:
  """A prefix of solutions.

  Attributes:
    steps: steps of the prefix, from the problem on; () is the problem itself.
    counts: number of its rollouts, and of correct ones.
    visits: `N(s)`, how often it was selected.
    wrong: its wrong rollouts that were not selected yet.
  """

  steps: Steps
  counts: MonteCarlo
  visits: int
  wrong: tuple[Steps, ...]

  @property
  def selectable(self) -> bool:
    """Whether its rollouts are in the pool: some are right, some wrong."""
    return 0 < self.counts.value < 1


class Selection(NamedTuple):
  """One round: what was selected, and where its first error was.

  Attributes:
    steps: steps of the state.
    rollout: the wrong rollout from it.
    first_error: index of the first wrong step in the whole solution.
  """

  steps: Steps
  rollout: Steps
  first_error: int


@dataclasses.dataclass(frozen=True)
class Tree:
  """What OmegaPRM found.

  Attributes:
    states: in order of discovery; the first is the problem.
    selections: in order.
    used: number of rollouts that were written.
  """

  states: tuple[State, ...]
  selections: tuple[Selection, ...]
  used: int

  def solutions(self, prompt: str) -> list[LabelledSolution]:
    """Returns the way to each state that no other state goes on from.

    Labels are the values of states on the way, with their counts; a step inside
    of two states has none.
    """
    counts = {state.steps: state.counts for state in self.states}
    inner = {x[:n] for x in counts for n in range(len(x))}
    ends = [x for x in counts if x and x not in inner]
    solutions = []
    for steps in ends:
      way = [counts.get(steps[:n]) for n in range(1, len(steps) + 1)]
      solutions.append(
        LabelledSolution(
          prompt=prompt,
          steps=steps,
          labels=tuple(x and x.value for x in way),
          mc=tuple(way),
          label_source="monte_carlo_soft",
        )
      )
    return solutions


def words(steps: Steps) -> int:
  """Returns the number of words, a stand-in for tokens."""
  return sum(len(text.split()) for text in steps)


@dataclasses.dataclass(frozen=True)
class OmegaPRM:
  """The search's settings; defaults are the paper's (section 4.1).

  Attributes:
    alpha, beta, scale: in `Q(s, r) = alpha^(1 - MC(s)) beta^(len(r) / scale)`.
    c_puct: in `U(s) = c_puct sqrt(sum_i N(s_i)) / (1 + N(s))`.
    k: rollouts a state.
    selections: most selections.
    rollouts: most rollouts; a selection that starts below it is finished.
    length: measures a rollout's steps, in the unit of `scale`.
  """

  alpha: float | int = 0.5
  beta: float | int = 0.9
  scale: float | int = 500.0
  c_puct: float | int = 0.125
  k: int = 8
  selections: int = 100
  rollouts: int = 100_000
  length: Callable[[Steps], int] = words

  def score(self, state: State, rollout: Steps, visits: int) -> float:
    """Returns `Q(s, r) + U(s)`.

    Args:
      state: a state of the pool.
      rollout: one of its wrong ones.
      visits: sum of all states' visits.
    """
    q = self.alpha ** (1 - state.counts.value)
    q *= self.beta ** (self.length(rollout) / self.scale)
    return q + self.c_puct * math.sqrt(visits) / (1 + state.visits)

  def select(self, states: Sequence[State]) -> tuple[State, Steps] | None:
    """Returns the pair with the highest score; the older of equal ones.

    None where the pool is empty.
    """
    visits = sum(state.visits for state in states)
    pool = [(s, r) for s in states if s.selectable for r in s.wrong]
    return max(pool, key=lambda x: self.score(*x, visits), default=None)

  def search(self, complete: Complete) -> Tree:
    """Returns the tree of one problem.

    Args:
      complete: writes rollouts of the problem's prefixes.

    Raises:
      UserError: a wrong rollout has no steps.
    """
    first = rollouts(complete, [()], self.k)[0]
    states: dict[Steps, State] = {(): _state((), first)}
    done: list[Selection] = []
    used = self.k
    while len(done) < self.selections and used < self.rollouts:
      chosen = self.select(list(states.values()))
      if chosen is None:
        break
      state, rollout = chosen
      states[state.steps] = _selected(state, rollout)
      error, probed = self._expand(state, rollout, complete)
      used += self.k * len(probed)
      done.append(Selection(state.steps, rollout, error))
      for steps, drawn in probed.items():
        tried = {x.rollout for x in done if x.steps == steps}
        states[steps] = _merged(states.get(steps), _state(steps, drawn), tried)
    return Tree(tuple(states.values()), tuple(done), used)

  def _expand(
    self, state: State, rollout: Steps, complete: Complete
  ) -> tuple[int, Mapping[Steps, Sequence[Rollout]]]:
    """Returns the first error's index in the whole, and rollouts by prefix."""
    if not rollout:
      raise UserError("complete: found a wrong rollout without steps")

    def after(prefixes: Sequence[Steps], k: int) -> Any:
      return complete([state.steps + x for x in prefixes], k)

    located, probed = locate_with_rollouts([rollout], after, self.k)[0]
    prefixes = {
      state.steps + rollout[: at + 1]: drawn for at, drawn in probed.items()
    }
    return len(state.steps) + located.first_error, prefixes


def _state(steps: Steps, drawn: Sequence[Rollout]) -> State:
  wrong = dict.fromkeys(x.steps for x in drawn if not x.correct)
  return State(steps, count(drawn), 0, tuple(wrong))


def _selected(state: State, rollout: Steps) -> State:
  rest = tuple(x for x in state.wrong if x != rollout)
  return dataclasses.replace(state, visits=state.visits + 1, wrong=rest)


def _merged(old: State | None, new: State, tried: set[Steps]) -> State:
  """Returns a state with more rollouts, as two selections may probe it.

  A wrong rollout that was selected before does not join the pool again.
  """
  if old is None:
    return new
  both = zip(old.counts, new.counts, strict=True)
  wrong = dict.fromkeys(x for x in old.wrong + new.wrong if x not in tried)
  return dataclasses.replace(
    old, counts=MonteCarlo(*map(sum, both)), wrong=tuple(wrong)
  )
