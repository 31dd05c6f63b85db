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
    min_tokens: tokens below which an end is replaced.
    max_tokens: tokens after which the answer is forced.
    wait: tokens in place of an end.
    max_waits: how often an end is replaced, at most.
    answer: tokens that lead to the answer, needed if `max_tokens` is set; they,
      and the answer, are not part of the budget.
  """

  copies: int = 1
  min_tokens: int = 0
  max_tokens: int = 2**30
  wait: Sequence[int] = ()
  max_waits: int = 2
  answer: Sequence[int] = ()

  def __post_init__(self):
    if self.min_tokens > self.max_tokens or (self.min_tokens and not self.wait):
      raise UserError(
        f"BudgetForcing: found min_tokens {self.min_tokens}, max_tokens"
        f" {self.max_tokens} and {len(self.wait)} tokens to wait with, expected"
        " min_tokens <= max_tokens, and tokens if min_tokens is above 0"
      )
    if self.max_tokens < type(self).max_tokens and not self.answer:
      raise UserError(
        f"BudgetForcing: found max_tokens {self.max_tokens} and no answer,"
        " expected tokens that lead to it: nothing else ends a path's thoughts"
      )

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's paths; see `Strategy`.

    Each pause of the policy is a chance to cut a path: its steps should not be
    longer than what `max_tokens` may be missed by.

    Raises:
      UserError: `max_tokens` is set, and the policy pauses nowhere.
    """
    policy = engine.policy
    endless = isinstance(policy, Stepwise) and policy.boundary is None
    if self.max_tokens < type(self).max_tokens and endless:
      raise UserError(
        f"BudgetForcing: found max_tokens {self.max_tokens} and a policy that"
        " pauses at the end of a text alone, expected steps, such as"
        " step_ends.EveryTokens"
      )
    frontier = engine.start(prompts, limits.tokens, self.copies, limits.key)
    waited = np.zeros(len(frontier.paths), int)
    forced = np.zeros(len(frontier.paths), bool)
    for _ in range(limits.steps - 1):
      appended, replace = [], []
      for row, path in enumerate(frontier.paths):
        count = len(path.tokens)
        early = path.stopped and count < self.min_tokens and not forced[row]
        late = not path.done and count >= self.max_tokens and not forced[row]
        forced_tokens: Sequence[int] = ()
        if early and waited[row] < self.max_waits:
          forced_tokens, waited[row] = self.wait, waited[row] + 1
        elif late:
          forced_tokens, forced[row] = self.answer, True
        room = limits.tokens - count + early
        appended.append(forced_tokens[: max(room - 1, 0)])
        replace.append(early)
      frontier = engine.append(frontier, appended, replace)
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
