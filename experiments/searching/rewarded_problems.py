"""Tasks of `training.alignment`, whose prompts are token ids, as problems."""

import dataclasses
from typing import ClassVar

import numpy as np

from research.reasoning.problem import Problem, Verdict
from research.reasoning.tasks.task import Task
from research.training.alignment.rewarded_task import Prompt, RewardedTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardedProblems(Task):
  """Prompts of a rewarded task; an answer of reward 1 is correct.

  Texts are ids with spaces between them, the end token included: the model has
  no tokenizer.

  Attributes:
    rewards: prompts, and an exact judge of answers.
  """

  NAME: ClassVar[str] = "rewarded"

  rewards: RewardedTask

  def problem(self, index: int) -> Problem:
    text = " ".join(map(str, self._prompt(index).tokens))
    return Problem(id=text, prompt=text, meta={"index": index})

  def _prompt(self, index: int) -> Prompt:
    rng = np.random.default_rng((self.seed, index))
    return self.rewards.sample(rng, 1)[0]

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    words = (text or "").split()
    if not words or not all(word.isdecimal() for word in words):
      return Verdict(False, reason="no answer")
    prompt = self._prompt(problem.meta["index"])
    reward = self.rewards.reward(prompt, [int(word) for word in words])
    answer = " ".join(words)
    reason = "correct" if reward >= 1 else f"wrong: reward {reward:.3g}"
    return Verdict(reward >= 1, answer, answer, reason)
