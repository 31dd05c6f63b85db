"""Tasks whose answers have rewards, and how well a policy answers them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from research.generation import generate
from research.generation.generated import NO_TOKEN
from research.generation.sampling import GREEDY, Sampling
from research.training.objectives.preference import Select, all_params
from research.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the policy is asked.

  Attributes:
    tokens: ids, at least one.
    problem: what the task needs to judge an answer.
  """

  tokens: tuple[int, ...]
  problem: Any = None


@runtime_checkable
class RewardedTask(Protocol):
  """Prompts, and an exact judge of answers to them."""

  def sample(self, rng: np.random.Generator, count: int) -> Sequence[Prompt]:
    """Returns prompts of the training split."""
    ...

  def reward(self, prompt: Prompt, answer: Sequence[int]) -> float:
    """Returns the reward of an answer's tokens, its stop token included."""
    ...


def sampled(
  model: Any,
  params: Params,
  prompts: Sequence[Sequence[int]],
  new_tokens: int,
  stop_tokens: Sequence[int],
  sampling: Sampling,
  key: Array,
) -> list[list[int]]:
  """Returns answers to prompts, each with its stop token if it ended by one.

  Args:
    model: the Transformer.
    params: its parameters.
    prompts: token ids.
    new_tokens: most tokens of an answer.
    stop_tokens: ids that end an answer.
    sampling: of tokens.
    key: of the sampling.
  """
  parts = generate.chunks(
    model, params, prompts, new_tokens, sampling, key, stop_tokens
  )
  rows = np.concatenate(list(parts), axis=1)
  return [[t for t in row if t != NO_TOKEN] for row in rows.tolist()]


@dataclasses.dataclass(frozen=True)
class AnswerRate:
  """The share of prompts that a model answers right.

  Attributes:
    right: number of them.
    count: of all.
  """

  right: float
  count: int

  def __str__(self) -> str:
    return f"{100 * self.right / self.count:.1f} of {self.count} prompts"

  def to_json(self) -> dict[str, Any]:
    """Returns numbers."""
    return {"reward": self.right / self.count, "count": self.count}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyReward:
  """The mean reward of greedy answers: `Experiment.answers` of a policy.

  Attributes:
    task: prompts and rewards.
    count: of prompts.
    new_tokens, stop_tokens: as for `GroupRollouts`.
    policy: selects the policy's parameters.
    seed: of the prompts; the task decides which are held out.
  """

  task: RewardedTask
  count: int = 256
  new_tokens: int
  stop_tokens: tuple[int, ...] = ()
  policy: Select = all_params
  seed: int = 0

  def __call__(self, loaded: Any) -> AnswerRate:
    """Returns the rate of a model's greedy answers."""
    rng = np.random.default_rng(self.seed)
    prompts = self.task.sample(rng, self.count)
    answers = sampled(
      loaded.model,
      self.policy(loaded.params),
      [prompt.tokens for prompt in prompts],
      self.new_tokens,
      self.stop_tokens,
      GREEDY,
      jax.random.key(0),
    )
    rewards = [
      self.task.reward(prompt, answer)
      for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return AnswerRate(float(sum(rewards)), self.count)
