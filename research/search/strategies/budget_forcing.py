"""Budget forcing: how long a model thinks is set from outside.

Muennighoff et al. 2025 (s1, arXiv:2501.19393, section 3). A path that stops to
think too early goes on: its end is replaced by words such as "Wait". One that
thinks too long is cut, and words such as "Final answer:" lead to its answer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from research.generation.stepwise import Stepwise
from research.search.engine import Engine, Frontier
from research.search.step_search import Limits, Samples
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetForcing:
  """Paths that think at least and at most so many tokens.

  Attributes:
    copies: paths of a problem.
    least: tokens below which an end is replaced.
    most: tokens after which the answer is forced.
    wait: tokens in place of an end.
    waits: how often at most.
    answer: tokens that lead to the answer, needed if `most` is set; they, and
      the answer, are not part of the budget.
  """

  copies: int = 1
  least: int = 0
  most: int = 2**30
  wait: Sequence[int] = ()
  waits: int = 2
  answer: Sequence[int] = ()

  def __post_init__(self):
    if self.least > self.most or (self.least and not self.wait):
      raise UserError(
        f"BudgetForcing: found least {self.least}, most {self.most} and"
        f" {len(self.wait)} tokens to wait with, expected least <= most, and"
        " tokens if least is above 0"
      )
    if self.most < type(self).most and not self.answer:
      raise UserError(
        f"BudgetForcing: found most {self.most} and no answer, expected tokens"
        " that lead to it: nothing else ends a path's thoughts"
      )

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's paths; see `Strategy`.

    Each pause of the policy is a chance to cut a path: its steps should not be
    longer than what `most` may be missed by.

    Raises:
      UserError: `most` is set, and the policy pauses nowhere.
    """
    policy = engine.policy
    endless = isinstance(policy, Stepwise) and policy.boundary is None
    if self.most < type(self).most and endless:
      raise UserError(
        f"BudgetForcing: found most {self.most} and a policy that pauses at the"
        " end of a text alone, expected steps, such as step_ends.EveryTokens"
      )
    frontier = engine.start(prompts, limits.tokens, self.copies, limits.key)
    waited = np.zeros(len(frontier.paths), int)
    forced = np.zeros(len(frontier.paths), bool)
    for _ in range(limits.steps - 1):
      words, replace = [], []
      for row, path in enumerate(frontier.paths):
        count = len(path.tokens)
        early = path.stopped and count < self.least and not forced[row]
        late = not path.done and count >= self.most and not forced[row]
        own: Sequence[int] = ()
        if early and waited[row] < self.waits:
          own, waited[row] = self.wait, waited[row] + 1
        elif late:
          own, forced[row] = self.answer, True
        room = limits.tokens - count + early
        words.append(own[: max(room - 1, 0)])
        replace.append(early)
      frontier = engine.append(frontier, words, replace)
      if all(path.done for path in frontier.paths):
        break
      frontier = engine.advance(frontier)
    return _by_problem(frontier, len(prompts))


def _by_problem(frontier: Frontier, count: int) -> list[Samples]:
  return [
    Samples(
      tuple(path for path in frontier.paths if path.problem == i),
      frontier.ledgers[i],
    )
    for i in range(count)
  ]
