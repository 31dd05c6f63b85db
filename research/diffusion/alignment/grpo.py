"""Group-relative policy gradients: diffu-GRPO and coupled-GRPO.

Zhao et al. 2025 (d1, arXiv:2504.12216): answers to one prompt are a group, an
answer's advantage is its reward less the group's mean, and the ratio of policy
to old policy is taken token by token from an estimate of log p that one seed
makes the same for all of policy, old policy and reference. With `FullMask` it
is diffu-GRPO, with `Coupled` coupled-GRPO (Gong et al. 2025, arXiv:2506.20639).
"""

import dataclasses

import jax
import jax.numpy as jnp

from research import weights
from research.diffusion.alignment import estimators
from research.diffusion.alignment.estimators import Estimator, FullMask
from research.diffusion.schedule import Linear, Schedule
from research.generation.sampling import row_keys
from research.nn.transformer import Transformer
from research.training.objectives.objective import Batch, Sums
from research.typing import (
  Array,
  Bool,
  Float,
  Int,
  Params,
  PRNGKey,
  UserError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
  """The clipped surrogate, less a divergence from the reference.

  A batch has `tokens [B, T]`, `valid` and `answer` (bool), `advantage [B]`,
  `seed [B]` (int32, of each row's masks), and `old` and `reference`, estimates
  `[B, T]` by `estimate` with the same seeds.

  Attributes:
    model: the network.
    mask_id: the token that hides others.
    estimator: of log-likelihoods.
    clip: ratios count within 1 - clip and 1 + clip.
    beta: of the divergence, estimated as `r - 1 - log r`.
    shift: see `denoiser.own_rows`.
    block, schedule: see `estimators.estimate`.
    rows: rows of logits held at a time.
  """

  model: Transformer | None = None
  mask_id: int = -1
  estimator: Estimator = FullMask()
  clip: float = 0.5
  beta: float = 0.04
  shift: bool = False
  block: int | None = None
  schedule: Schedule = Linear()
  rows: int = 256

  def __post_init__(self):
    if not self.clip > 0 or self.beta < 0:
      raise UserError(
        f"GRPO: clip is {self.clip} and beta {self.beta}, expected clip above "
        "0 and beta at least 0"
      )

  def estimate(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    answer: Bool[Array, "B T"],
    seed: Int[Array, "B"],
  ) -> Float[Array, "B T"]:
    """Returns log p of each token; masks follow a row's seed, not its place."""
    keys = row_keys(jax.random.key(0), seed)
    views = self.estimator.plan(keys, answer, valid)
    return estimators.estimate(
      self.model,
      params,
      tokens,
      valid,
      views,
      self.mask_id,
      self.shift,
      self.rows,
      self.block,
      self.schedule,
    )

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns sums over answers, each the mean over its tokens."""
    params = weights.bind(params, key=key)
    answer = batch["answer"]
    new = self.estimate(
      params, batch["tokens"], batch["valid"], answer, batch["seed"]
    )
    ratio = jnp.exp(jnp.where(answer, new - batch["old"], 0.0))
    near = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
    advantage = batch["advantage"][:, None]
    gain = jnp.minimum(ratio * advantage, near * advantage)
    apart = jnp.where(answer, batch["reference"] - new, 0.0)
    divergence = jnp.exp(apart) - apart - 1
    each = jnp.where(answer, gain - self.beta * divergence, 0.0)
    size = jnp.maximum(answer.sum(-1), 1)
    count = answer.any(-1).sum().astype(jnp.float32)
    sums = {
      "ratio": (jnp.where(answer, ratio, 0).sum(-1) / size).sum(),
      "divergence": (jnp.where(answer, divergence, 0).sum(-1) / size).sum(),
    }
    return -(each.sum(-1) / size).sum(), count, sums


def advantages(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
  """Returns each answer's reward less the mean of its group's."""
  return rewards - rewards.mean(-1, keepdims=True)


def answers(
  tokens: Int[Array, "B T"], prompt: int, end: tuple[int, ...]
) -> Bool[Array, "B T"]:
  """Returns which tokens are an answer's: up to its first end, that included.

  Args:
    tokens: rows.
    prompt: tokens of the prompt, padding included.
    end: token ids that end a text.
  """
  place = jnp.arange(tokens.shape[1])
  ends = jnp.isin(tokens, jnp.array(end or (-1,))) & (place >= prompt)
  before = jnp.cumsum(ends, axis=-1) - ends
  return (place >= prompt) & (before == 0)
