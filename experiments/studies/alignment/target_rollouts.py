"""Rounds of answers to `Targets`, as a masked diffusion model samples them.

`TargetRollouts` is a source of the training loop
(`research.training.rollouts`); `sample` makes a round of it, which the study
scans over on the device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.studies.diffusion.study import Tiny
from experiments.studies.diffusion.tasks import Targets, learn_targets
from research.diffusion.alignment.grpo import GRPO
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.generation.sampling import Sampling
from research.interop.loaded import Loaded
from research.training.alignment.advantages import centered
from research.training.objectives.preference import Part, Select
from research.training.rollouts import Round
from research.typing import Array, Float, Int, Params, PRNGKey, UserError

Judge = Callable[[Float[Array, " N"], PRNGKey], Float[Array, " N"]]
"""`(whether answers are right, key) -> rewards`."""


def exact(right: Float[Array, " N"], key: PRNGKey) -> Float[Array, " N"]:
  """Returns 1 for right answers and 0 for others."""
  del key
  return right


def by_lot(right: Float[Array, " N"], key: PRNGKey) -> Float[Array, " N"]:
  """Returns as many rewards, of answers drawn by lot: the control."""
  return jax.random.permutation(key, right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
  """A model that has read right answers and others: where a policy begins.

  Attributes:
    targets: the task.
    tiny: the model.
    steps: of its training.
    seed: of its weights, order and masks.
  """

  targets: Targets = Targets()
  tiny: Tiny = Tiny()
  steps: int = 1000
  seed: int = 0

  def load(self, shardings: Any = None) -> Loaded:
    """Returns the trained model; its training takes half a minute."""
    del shardings
    model, params = learn_targets(
      self.targets, self.tiny, self.steps, self.seed
    )
    source = {"format": "fresh", "family": "targets", "seed": self.seed}
    return Loaded(model, params, None, source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetRollouts:
  """Rounds of prompts and groups of answers, judged by their sums.

  Attributes:
    targets: the task.
    prompts, group: of a round, and answers to each.
    updates: of the parameters by a round, each with masks of its own.
    judge: `exact` or `by_lot`.
    reference: selects the reference's parameters.
    seed: of prompts, answers and masks.
    objective: the loss, with its model; an experiment sets it.
  """

  targets: Targets = Targets()
  prompts: int = 8
  group: int = 8
  updates: int = 4
  judge: Judge = exact
  reference: Select = Part("reference")
  seed: int = 0
  objective: GRPO | None = None

  def with_objective(self, objective: Any) -> "TargetRollouts":
    """Returns the rollouts of an objective's policy.

    Raises:
      UserError: it is not a GRPO of masked diffusion.
    """
    if not isinstance(objective, GRPO):
      raise UserError(
        f"TargetRollouts: found the objective {type(objective).__name__},"
        " expected a research.diffusion.alignment.grpo.GRPO."
      )
    return dataclasses.replace(self, objective=objective)

  def sample_round(self, params: Params, step: int) -> Round:
    """Returns a round; its metric is the mean `reward`."""
    key = jax.random.key(self.seed)
    common, own, reward = _sample(
      self,
      self.objective.policy(params),
      self.reference(params),
      key,
      jnp.int32(step),
    )
    return Round(common, own, {"reward": float(reward)})


def sample(
  rollouts: TargetRollouts,
  policy: Params,
  reference: Params,
  key: PRNGKey,
  step: Int[Array, ""],
) -> tuple[dict[str, Array], dict[str, Array], Float[Array, ""]]:
  """Returns a round's arrays `[B, ...]` and `[U, B, ...]`, and its mean reward.

  Args:
    rollouts: with their objective.
    policy: parameters that answer.
    reference: parameters that the policy stays near.
    key: of the run.
    step: number of updates done.
  """
  task, goal = rollouts.targets, rollouts.objective
  at = jax.random.fold_in(key, step)
  rows = answers(task, goal.model, policy, at, rollouts.prompts, rollouts.group)
  right = task.right(rows).astype(jnp.float32)
  rewards = rollouts.judge(right, jax.random.fold_in(at, 1))
  groups = rewards.reshape(rollouts.prompts, rollouts.group)
  place = jnp.arange(rows.shape[1])
  common = {
    "tokens": rows,
    "valid": jnp.ones(rows.shape, bool),
    "answer": jnp.broadcast_to(place > 0, rows.shape),
    "advantage": centered(groups).reshape(-1),
  }
  given = common["tokens"], common["valid"], common["answer"]

  def one(update):
    count = rows.shape[0]
    seed = (step + update) * count + jnp.arange(count)
    return {
      "seed": seed,
      "old": goal.estimate(policy, *given, seed),
      "reference": goal.estimate(reference, *given, seed),
    }

  own = jax.lax.map(one, jnp.arange(rollouts.updates))
  return common, own, right.mean()


_sample = functools.partial(jax.jit, static_argnums=0)(sample)


def answers(
  task: Targets,
  model: Any,
  params: Params,
  key: PRNGKey,
  prompts: int,
  group: int,
  sampling: Sampling | None = None,
) -> Int[Array, "N T"]:
  """Returns rows of answers, places by chance, by default at temperature 1.

  Args:
    task: the prompts.
    model: the network.
    params: its parameters.
    key: of prompts and answers.
    prompts: how many.
    group: answers to each, next to each other.
    sampling: of tokens.
  """
  length = task.length
  first, second = jax.random.split(key)
  chosen = jax.random.randint(first, (prompts,), 0, task.sums)
  chosen = jnp.repeat(chosen, group)[:, None] + task.digits
  tokens = jnp.pad(chosen, ((0, 0), (0, length)), constant_values=task.mask_id)
  masked = tokens == task.mask_id
  options = SamplerConfig(
    mask_id=task.mask_id, length=length, block=length, select="random"
  )
  start = sampler.begin(tokens, masked, jnp.ones(tokens.shape, bool), second)
  end, *_ = sampler.fill_block(
    NoCache(model=model),
    params,
    start,
    jnp.int32(1),
    options,
    Sampling(temperature=1.0) if sampling is None else sampling,
  )
  return end.tokens
