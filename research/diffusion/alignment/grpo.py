"""Group-relative policy gradients: diffu-GRPO and coupled-GRPO.

Zhao et al. 2025 (d1, arXiv:2504.12216): answers to one prompt are a group, an
answer's advantage is its reward less the group's mean, and the ratio of policy
to old policy is taken token by token from an estimate of log p that one seed
makes the same for all of policy, old policy and reference. With `FullMask` it
is diffu-GRPO, with `Coupled` coupled-GRPO (Gong et al. 2025, arXiv:2506.20639).
The surrogate, divergence and advantages are those of any policy
(`research.training.alignment`).
"""

import dataclasses

import jax

from research import weights
from research.diffusion import process
from research.diffusion.alignment import estimators
from research.diffusion.alignment.estimators import Estimator, FullMask
from research.diffusion.schedule import Linear, Schedule
from research.generation.sampling import row_keys
from research.nn.transformer import Transformer
from research.training.alignment.surrogate import Surrogate, grpo
from research.training.objectives.objective import Batch, Sums
from research.training.objectives.preference import Select, all_params
from research.typing import (
  Array,
  Bool,
  Float,
  Int,
  Params,
  PRNGKey,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
  """The clipped surrogate of estimated log-likelihoods.

  A batch has `tokens [B, T]`, `valid` and `answer` (bool), `advantage [B]`,
  `seed [B]` (int32, of each row's masks), and `old` and `reference`, estimates
  `[B, T]` by `estimate` with the same seeds.

  Attributes:
    model: the network.
    mask_id: the token that hides others.
    estimator: of log-likelihoods.
    surrogate: the loss; d1 clips at 0.5, with beta 0.04.
    shift: see `denoiser.own_rows`.
    block, schedule: see `estimators.estimate`.
    policy: selects the policy's parameters.
    rows: rows of logits held at a time.
  """

  model: Transformer | None = None
  mask_id: int = -1
  estimator: Estimator = FullMask()
  surrogate: Surrogate = grpo(clip=0.5, beta=0.04)
  shift: bool = False
  block: int | None = None
  schedule: Schedule = Linear()
  policy: Select = all_params
  rows: int = 256

  @property
  def rearranged(self) -> str | None:
    """What the network reads; see `Rearranges`."""
    return "each row twice" if self.block is not None else None

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
    hidden = process.without_images(params, tokens, valid)
    views = self.estimator.plan(keys, answer, hidden)
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
    """Returns the surrogate's sums."""
    params = weights.bind(self.policy(params), key=key)
    answer = batch["answer"]
    new = self.estimate(
      params, batch["tokens"], batch["valid"], answer, batch["seed"]
    )
    return self.surrogate(
      new, batch["old"], batch["advantage"], answer, batch.get("reference")
    )
