"""A task whose rewards are a reward model's scores: what a policy can exploit.

A policy that is optimized against a learned reward finds what the reward model
gets wrong (Gao et al. 2023, arXiv:2210.10760). So the share of answers that the
task itself accepts is measured beside the reward, and never rewarded.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from research.prm import judge
from research.prm.labelled import LabelledSolution
from research.prm.scores.aggregate import Aggregate, Product
from research.ranges import OneOf, Ranged
from research.reasoning.problem import Verdict
from research.reasoning.segmentation import SEGMENTERS, steps_of
from research.training.alignment.rewarded_task import AnswerRewards, Prompt
from research.training.reasoning_tasks import VerifiedTask
from research.typing import UserError

VERIFIED = "verified"
"""Name of the metric: share of answers that the task accepts."""


@runtime_checkable
class RewardSource(Protocol):
  """Where a reward model comes from, e.g. `interop.rewards`."""

  def load(self) -> Any:
    """Returns `model`, `params` and `tokenizer`."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredTask(Ranged):
  """Prompts of a task, and a reward model that judges answers to them.

  A `RewardedTask`. The reward of an answer is from 0 to 1: the aggregate of its
  steps' scores, and 0 for one that was cut or has no step. Steps are scored
  whether or not they are complete, so a policy may learn to stop in the middle
  of its first one; `answer_required` gives that nothing.

  Attributes:
    task: has the prompts; its verdicts are measured, not rewarded.
    reward_model: source of the model that scores steps.
    segmenter: splits an answer into steps, a key of `SEGMENTERS`.
    aggregate: makes a reward of the scores of steps.
    separator: text after each step, as for `rows.encode`.
    answer_required: whether a text from which the task extracts no final
      answer, right or wrong, earns 0: a reward of format.
  """

  task: VerifiedTask
  reward_model: RewardSource
  segmenter: OneOf(*SEGMENTERS)
  aggregate: Aggregate = Product()
  separator: str = ""
  answer_required: bool = False

  @functools.cached_property
  def _loaded(self) -> Any:
    loaded = self.reward_model.load()
    if not hasattr(loaded.model, "scores"):
      raise UserError(
        f"ScoredTask.reward_model: found a {type(loaded.model).__name__},"
        " expected a reward model, such as interop.rewards.PretrainedReward."
      )
    return dataclasses.replace(loaded, params=jax.device_put(loaded.params))

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    return self.task.stop_tokens

  def sample(self, rng: np.random.Generator, count: int) -> list[Prompt]:
    """Returns prompts of different problems of the task."""
    return self.task.sample(rng, count)

  def reward(self, prompt: Prompt, answer: Sequence[int]) -> float:
    """Returns the reward of one answer; `judge` is for many."""
    return float(self.judge([prompt], [answer]).rewards[0])

  def judge(
    self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
  ) -> AnswerRewards:
    """Returns rewards, and the share of answers that the task accepts.

    Args:
      prompts: one for each answer.
      answers: token ids, the end's included.
    """
    pairs = list(zip(prompts, answers, strict=True))
    verdicts = [self.task.verdict(prompt, answer) for prompt, answer in pairs]
    steps = [
      self._steps(verdict, answer)
      for verdict, answer in zip(verdicts, answers, strict=True)
    ]
    solutions = [
      LabelledSolution(
        prompt=prompt.problem.prompt, steps=texts, labels=(None,) * len(texts)
      )
      for (prompt, _), texts in zip(pairs, steps, strict=True)
      if texts
    ]
    scores = iter(self._scores(solutions))
    rewards = [
      float(self.aggregate.weight(next(scores))) if texts else 0.0
      for texts in steps
    ]
    right = [verdict is not None and verdict.correct for verdict in verdicts]
    return AnswerRewards(rewards, {VERIFIED: float(np.mean(right))})

  def _steps(
    self, verdict: Verdict | None, answer: Sequence[int]
  ) -> tuple[str, ...]:
    """Returns the steps of an answer; none of one that earns nothing."""
    if verdict is None or (self.answer_required and verdict.extracted is None):
      return ()
    text = self.task.tokenizer.decode(answer)
    return tuple(steps_of(SEGMENTERS[self.segmenter], text))

  def _scores(self, solutions):
    loaded = self._loaded
    return judge.score_solutions(
      loaded.model,
      loaded.params,
      loaded.tokenizer,
      solutions,
      self.separator,
    )
