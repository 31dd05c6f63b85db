"""Tasks whose answers have rewards, and how well a policy answers them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from research.generation import generate
from research.generation.decoding import PromptMask
from research.generation.generated import NO_TOKEN
from research.generation.sampling import GREEDY, Sampling
from research.training.objectives.preference import Select, all_params
from research.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt of the policy."""

  tokens: tuple[int, ...]
  problem: Any = None


@runtime_checkable
class RewardedTask(Protocol):
  """Prompts, and an exact judge of answers to them."""

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    """Ids that end an answer; none if every answer has all of its tokens."""
    ...

  def sample(self, rng: np.random.Generator, count: int) -> Sequence[Prompt]:
    """Returns prompts of the training split."""
    ...

  def reward(self, prompt: Prompt, answer: Sequence[int]) -> float:
    """Returns the reward of an answer's tokens, its stop token included."""
    ...


class AnswerRewards(NamedTuple):
  """What is made of answers.

  Attributes:
    rewards: one for each answer.
    metrics: means over all of them, by name, to be logged beside the reward.
  """

  rewards: Sequence[float]
  metrics: Mapping[str, float]


@runtime_checkable
class JudgesTogether(Protocol):
  """A rewarded task that judges all answers of a round at once."""

  def judge(
    self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
  ) -> AnswerRewards:
    """Returns rewards; each answer has its own prompt."""
    ...


def judged(
  task: RewardedTask,
  prompts: Sequence[Prompt],
  answers: Sequence[Sequence[int]],
) -> AnswerRewards:
  """Returns the rewards of answers, one by one or all at once."""
  if isinstance(task, JudgesTogether):
    return task.judge(prompts, answers)
  pairs = zip(prompts, answers, strict=True)
  return AnswerRewards(
    [task.reward(prompt, answer) for prompt, answer in pairs], {}
  )


def sampled(
  model: Any,
  params: Params,
  prompts: Sequence[Sequence[int]],
  new_tokens: int,
  stop_tokens: Sequence[int],
  sampling: Sampling,
  key: Array,
  mask: PromptMask | None = None,
  copies: int = 1,
  room: int = 1,
) -> list[list[int]]:
  """Returns answers to prompts, each with its stop token if it ended by one.

  Args:
    new_tokens: most tokens of an answer.
    mask: what the tokens of a prompt see of each other; None for causal.
    copies: answers to each prompt, one after the other.
    room: tokens of the longest prompt of several calls, which then share their
      programs.
  """
  parts = generate.chunks(
    *(model, params, prompts, new_tokens, sampling, key, stop_tokens),
    mask=mask,
    copies=copies,
    room=room,
  )
  rows = np.concatenate(list(parts), axis=1)
  return [[t for t in row if t != NO_TOKEN] for row in rows.tolist()]


@dataclasses.dataclass(frozen=True)
class AnswerRate:
  """The share of prompts that a model answers right."""

  right: float
  count: int

  def __str__(self) -> str:
    return f"{100 * self.right / self.count:.1f} of {self.count} prompts"

  def to_json(self) -> dict[str, Any]:
    return {"reward": self.right / self.count, "count": self.count}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyReward:
  """The mean reward of greedy answers: `Experiment.answers` of a policy.

  Attributes:
    task: prompts and rewards.
    new_tokens: tokens of the longest answer, its stop token included.
    seed: random seed of the prompts; the task decides which are held out.
  """

  task: RewardedTask
  count: int = 256
  new_tokens: int
  policy: Select = all_params
  seed: int = 0

  def __call__(self, loaded: Any) -> AnswerRate:
    key = jax.random.key(0)
    return self._rate(loaded, self._prompts(), GREEDY, key)

  def _prompts(self) -> Sequence[Prompt]:
    return self.task.sample(np.random.default_rng(self.seed), self.count)

  def _rate(
    self,
    loaded: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    key: Array,
  ) -> AnswerRate:
    answers = sampled(
      loaded.model,
      self.policy(loaded.params),
      [prompt.tokens for prompt in prompts],
      self.new_tokens,
      self.task.stop_tokens,
      sampling,
      key,
    )
    judgement = judged(self.task, prompts, answers)
    return AnswerRate(float(sum(judgement.rewards)), len(prompts))


@dataclasses.dataclass(frozen=True)
class PolicyRates:
  """The shares of right answers, greedy and sampled.

  Attributes:
    greedy: rate of greedy answers.
    sampled: rate of all sampled ones.
    samples: answers sampled to each prompt.
  """

  greedy: AnswerRate
  sampled: AnswerRate
  samples: int

  def __str__(self) -> str:
    return (
      f"greedy {self.greedy}\nsampled {self.sampled}, {self.samples} times each"
    )

  def to_json(self) -> dict[str, Any]:
    return {
      "greedy": self.greedy.right / self.greedy.count,
      "sampled": self.sampled.right / self.sampled.count,
      "count": self.greedy.count,
      "samples": self.samples,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledReward(GreedyReward):
  """The mean rewards of greedy and of sampled answers.

  Attributes:
    sampling: how their tokens are drawn.
  """

  samples: int = 4
  sampling: Sampling = Sampling(temperature=1.0)

  def __call__(self, loaded: Any) -> PolicyRates:
    prompts = self._prompts()
    keys = jax.random.split(jax.random.key(self.seed), self.samples + 1)
    greedy = self._rate(loaded, prompts, GREEDY, keys[0])
    rounds = [
      self._rate(loaded, prompts, self.sampling, key) for key in keys[1:]
    ]
    right = sum(x.right for x in rounds)
    every = AnswerRate(right, self.samples * greedy.count)
    return PolicyRates(greedy, every, self.samples)
