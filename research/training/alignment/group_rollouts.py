"""Groups of answers that an autoregressive policy samples, and their rewards.

`GroupRollouts` is a source of the training loop (`training.rollouts`). A round
draws prompts, samples a group of answers to each, asks the task for rewards,
and makes a batch of `PolicyGradient`: advantages, log p by the policy that
sampled if it is updated several times, and by the reference if there is one.
Everything follows from parameters, step and seed.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.generation import generate
from research.generation.sampling import Sampling
from research.ranges import AtLeast, PositiveInt, Ranged
from research.training.alignment.advantages import (
  Advantages,
  Selection,
  Standardized,
  every_group,
)
from research.training.alignment.overlong import Overlong, keep_overlong
from research.training.alignment.policy_gradient import PolicyGradient
from research.training.alignment.rewarded_task import (
  Prompt,
  RewardedTask,
  judged,
  sampled,
)
from research.training.objectives.preference import Part, Select
from research.training.rollouts import Round
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRollouts(Ranged):
  """Rounds of prompts, groups of answers, and rewards.

  Attributes:
    task: prompts and rewards.
    group: answers to a prompt.
    updates: updates of the parameters by one round; clipping matters from the
      second.
    prompt_tokens: tokens of the longest prompt.
    new_tokens: tokens of the longest answer, its stop token included.
    sampling: how answers are drawn. The objective's temperature must be the
      same, and top-p and the like would sample from another policy than the one
      learned.
    advantages: rewards of groups -> advantages: `Standardized`, `centered`, ...
    select: which groups are learned, by the task's rewards: `every_group`, or
      `varied` (DAPO).
    attempts: as many times new prompts are drawn until `prompts` groups are
      selected; groups that are missing then weigh nothing.
    overlong: what becomes of answers without an end.
    reference: selects the reference's parameters, if the surrogate has a
      divergence.
    objective: the loss, with its model; an experiment sets it.
  """

  task: RewardedTask
  prompts: PositiveInt = 8
  group: AtLeast(2) = 8
  updates: PositiveInt = 1
  prompt_tokens: PositiveInt
  new_tokens: PositiveInt
  sampling: Sampling = Sampling(temperature=1.0)
  advantages: Advantages = Standardized()
  select: Selection = every_group
  attempts: PositiveInt = 1
  overlong: Overlong = keep_overlong
  reference: Select = Part("reference")
  seed: int = 0
  objective: PolicyGradient | None = None

  def with_objective(self, objective: Any) -> "GroupRollouts":
    """Returns the rollouts of an objective's policy.

    Raises:
      UserError: the policy that samples is not the one that is learned.
    """
    if not isinstance(objective, PolicyGradient):
      raise UserError(
        f"GroupRollouts: found the objective {type(objective).__name__},"
        " expected a PolicyGradient."
      )
    if self.sampling.temperature != objective.temperature:
      raise UserError(
        f"GroupRollouts.sampling: found temperature {self.sampling.temperature}"
        f" and PolicyGradient.temperature {objective.temperature}, expected the"
        " same: log p is of the distribution that answers are drawn from."
      )
    return dataclasses.replace(self, objective=objective)

  def sample_round(self, params: Params, step: int) -> Round:
    """Returns a round; see `training.rollouts.Rollouts`.

    Its metrics are `reward`, `varied` (the share of groups whose rewards
    differ), `ended` and `answer_tokens`, all of everything that was sampled,
    and the task's own (`rewarded_task.JudgesTogether`).

    Raises:
      UserError: a prompt is longer than `prompt_tokens`, or a reward is not
        finite.
    """
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    policy = self.objective.policy(params)
    layers = generate.by_layer(policy, self.objective.model)
    groups: list[_Group] = []
    seen: list[_Group] = []
    task_metrics: list[Mapping[str, float]] = []
    for attempt in range(self.attempts):
      rng = np.random.default_rng([self.seed, step, attempt])
      drawn, measured = self._groups(
        layers, rng, jax.random.fold_in(key, attempt)
      )
      task_metrics.append(measured)
      seen += drawn
      groups += [x for x in drawn if x.selected]
      if len(groups) >= self.prompts:
        break
    # Of a fixed shape: groups that are not learned fill what is missing.
    groups += [x for x in seen if not x.selected]
    batch = self._batch(groups[: self.prompts])
    if self.updates > 1:  # the first update's log p is that of the sampling
      batch["old"] = _log_probs(self.objective, policy, batch)
    if self.objective.surrogate.divergence is not None:
      reference = self.reference(params)
      batch["reference"] = _log_probs(self.objective, reference, batch)
    answers = [answer for group in seen for answer in group.answers]
    rewards = np.array([group.rewards for group in seen])
    metrics = {
      "reward": rewards.mean(),
      "varied": (rewards.max(1) > rewards.min(1)).mean(),
      "ended": np.mean([self._ended(answer) for answer in answers]),
      "answer_tokens": np.mean([len(answer) for answer in answers]),
    } | {
      name: np.mean([x[name] for x in task_metrics]) for name in task_metrics[0]
    }
    return Round(batch, metrics={k: float(v) for k, v in metrics.items()})

  def _groups(
    self, policy, rng, key
  ) -> "tuple[list[_Group], Mapping[str, float]]":
    prompts = self.task.sample(rng, self.prompts)
    self._check(prompts)
    answers = sampled(
      self.objective.model,
      policy,
      [prompt.tokens for prompt in prompts],
      self.new_tokens,
      self.task.stop_tokens,
      self.sampling,
      key,
      copies=self.group,
      room=self.prompt_tokens,
    )
    asked = [prompt for prompt in prompts for _ in range(self.group)]
    shape = len(prompts), self.group
    raw, measured = judged(self.task, asked, answers)
    rewards = np.array(raw, np.float32).reshape(shape)
    if not np.isfinite(rewards).all():
      raise UserError(
        f"{type(self.task).__name__}.reward: found a reward that is not finite"
        f" ({raw[int(np.argmin(np.isfinite(rewards)))]}), expected a number."
      )
    lengths = np.array([len(x) for x in answers]).reshape(shape)
    ended = np.array([self._ended(x) for x in answers]).reshape(shape)
    shaped, learned = map(
      np.asarray, self.overlong(*map(jnp.asarray, (rewards, lengths, ended)))
    )
    advantages = np.asarray(self.advantages(jnp.asarray(shaped)))
    # DAPO selects by accuracy: equally right answers differ in length.
    selected = np.asarray(self.select(jnp.asarray(rewards)))
    groups = [
      _Group(
        prompt.tokens,
        answers[i * self.group : (i + 1) * self.group],
        rewards[i],
        advantages[i],
        learned[i] & selected[i],
        bool(selected[i]),
      )
      for i, prompt in enumerate(prompts)
    ]
    return groups, measured

  def _ended(self, answer: Sequence[int]) -> bool:
    """Whether an answer ended by itself, or has no way to."""
    stop_tokens = self.task.stop_tokens
    return not stop_tokens or answer[-1] in stop_tokens

  def _check(self, prompts: Sequence[Prompt]) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest > self.prompt_tokens:
      raise UserError(
        f"GroupRollouts.prompt_tokens: found a prompt of {longest} tokens,"
        f" expected at most {self.prompt_tokens}."
      )

  def _batch(self, groups: "Sequence[_Group]") -> dict[str, np.ndarray]:
    """Returns rows `[B, T]`: a prompt, an answer, padding on the right."""
    rows = [
      (group.prompt, answer, group.advantages[i], group.learned[i])
      for group in groups
      for i, answer in enumerate(group.answers)
    ]
    shape = len(rows), self.prompt_tokens + self.new_tokens
    names = "tokens", "targets"
    batch = {name: np.zeros(shape, np.int32) for name in names}
    for name in ("positions", "segments"):
      batch[name] = np.full(shape, -1, np.int32)
    batch["weights"] = np.zeros(shape, np.float32)
    for i, (prompt, answer, _, learned) in enumerate(rows):
      row = [*prompt, *answer]
      batch["tokens"][i, : len(row)] = row
      batch["targets"][i, : len(row) - 1] = row[1:]
      batch["positions"][i, : len(row)] = np.arange(len(row))
      batch["segments"][i, : len(row)] = 0
      batch["weights"][i, len(prompt) - 1 : len(row) - 1] = learned
    advantage = [advantage for _, _, advantage, _ in rows]
    return batch | {"advantage": np.array(advantage, np.float32)}


@dataclasses.dataclass(frozen=True)
class _Group:
  prompt: tuple[int, ...]
  answers: list[list[int]]
  rewards: np.ndarray
  advantages: np.ndarray
  learned: np.ndarray
  selected: bool


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(objective, params, batch):
  return objective.log_probs(params, batch)
