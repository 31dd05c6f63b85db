"""Groups of answers that a masked diffusion policy samples, with rewards."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.diffusion.alignment.grpo import GRPO
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.generation.sampling import Sampling
from research.training.alignment.advantages import Advantages, centered
from research.training.alignment.rewarded_task import RewardedTask, judged
from research.training.objectives.preference import Part, Select
from research.training.rollouts import Round
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionRollouts:
  """Rounds of prompts, groups of answers, and rewards: a source of `GRPO`.

  Attributes:
    task: prompts and rewards.
    prompts: number of prompts in a round.
    group: number of answers to a prompt.
    updates: number of updates by one round, each with masks of its own.
    new_tokens: tokens of every answer.
    select: order in which places are filled, see `SamplerConfig`.
    sampling: how tokens are drawn.
    advantages: of rewards in a group.
    reference: selects the reference's parameters.
    seed: of prompts, answers and masks.
    objective: the loss, with its model; an experiment sets it.
  """

  task: RewardedTask
  prompts: int = 8
  group: int = 8
  updates: int = 4
  new_tokens: int
  select: str = "random"
  sampling: Sampling = Sampling(temperature=1.0)
  advantages: Advantages = centered
  reference: Select = Part("reference")
  seed: int = 0
  objective: GRPO | None = None

  def with_objective(self, objective: Any) -> "DiffusionRollouts":
    """Returns the rollouts of an objective's policy.

    Raises:
      UserError: it is not a GRPO of masked diffusion.
    """
    if not isinstance(objective, GRPO):
      raise UserError(
        f"DiffusionRollouts: found the objective {type(objective).__name__},"
        " expected a research.diffusion.alignment.grpo.GRPO."
      )
    return dataclasses.replace(self, objective=objective)

  def sample_round(self, params: Params, step: int) -> Round:
    """Returns a round; its metric is the mean `reward`."""
    goal, length = self.objective, self.new_tokens
    policy = goal.policy(params)
    prompts = self.task.sample(
      np.random.default_rng([self.seed, step]), self.prompts
    )
    asked = [prompt for prompt in prompts for _ in range(self.group)]
    config = SamplerConfig(
      mask_id=goal.mask_id, length=length, block=length, select=self.select
    )
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    start = sampler.start([[*x.tokens] for x in asked], config, key)
    denoiser = NoCache(model=goal.model, shift=goal.shift)
    made = sampler.sample(denoiser, policy, start, config, self.sampling)
    answers = made.tokens[:, -length:].tolist()
    rewards, metrics = judged(self.task, asked, answers)
    groups = jnp.asarray(rewards, jnp.float32).reshape(-1, self.group)
    common = {
      "tokens": jnp.asarray(made.tokens),
      "valid": start.valid,
      "answer": start.masked,
      "advantage": self.advantages(groups).reshape(-1),
    }
    rows = len(asked)
    seeds = rows * (step + np.arange(self.updates))[:, None] + np.arange(rows)
    seeds = jnp.asarray(seeds, jnp.int32)
    both = policy, self.reference(params)
    old, reference = (_estimates(goal, x, common, seeds) for x in both)
    per_update = {"seed": seeds, "old": old, "reference": reference}
    measured = {"reward": float(groups.mean()), **metrics}
    return Round(common, per_update, measured)


@functools.partial(jax.jit, static_argnums=0)
def _estimates(goal, params, rows, seeds):
  """Returns log p of each token, `[U, B, T]`, by the masks of each seed."""
  texts = rows["tokens"], rows["valid"], rows["answer"]
  return jax.lax.map(lambda seed: goal.estimate(params, *texts, seed), seeds)
