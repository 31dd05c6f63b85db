"""VRPO: preferences for masked diffusion, by bounds with shared masks.

Zhu et al. 2025 (LLaDA 1.5, arXiv:2505.19223): DPO (Rafailov et al. 2023,
arXiv:2305.18290) with each log-likelihood replaced by an estimate of its bound.
The loss' bias and variance are bounded by the estimate's variance, so the same
masks serve policy and reference, and the passes go to many times.
"""

import dataclasses

import jax
import jax.numpy as jnp

from research import weights
from research.diffusion import process
from research.diffusion.alignment import estimators
from research.diffusion.alignment.estimators import Elbo, Estimator
from research.diffusion.schedule import Linear, Schedule
from research.generation.sampling import row_keys
from research.nn.transformer import Transformer
from research.ranges import PositiveFloat, Ranged
from research.training.objectives.objective import Batch, Sums
from research.training.objectives.preference import Part, Select, all_params
from research.typing import Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class VRPO(Ranged):
  """-log sigmoid(b [ratio(chosen) - ratio(rejected)]), ratios of bounds.

  The batch is that of `research.data.sources.pairs`.

  Attributes:
    model: the network of both; an experiment fills it in.
    mask_id: the token that hides others.
    estimator: of log-likelihoods.
    beta: how dear it is to leave the reference.
    shared: whether policy and reference see the same masks; only for showing
      what happens otherwise.
    by_length: whether an answer's estimate is divided by its length.
    shift: see `denoiser.own_rows`.
    block, schedule: see `estimators.estimate`.
    policy, reference: as for `training.preference.DPO`.
    rows: rows of logits held at a time.
  """

  model: Transformer | None = None
  mask_id: int = -1
  estimator: Estimator = Elbo()
  beta: PositiveFloat = 0.2
  shared: bool = True
  by_length: bool = False
  shift: bool = False
  block: int | None = None
  schedule: Schedule = Linear()
  policy: Select = all_params
  reference: Select = Part("reference")
  rows: int = 256

  @property
  def rearranged(self) -> str:
    """What the network reads; see `Rearranges`."""
    return "pairs of answers"

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns sums over pairs; metrics as DPO's."""
    drawn = process.drawing(key, batch["tokens"])
    policy = weights.bind(self.policy(params), key=key)
    reference = jax.lax.stop_gradient(self.reference(params))
    flat = {
      k: v.reshape(-1, v.shape[-1]) for k, v in batch.items() if v.ndim == 3
    }
    real = flat["segments"] >= 0
    answer = process.learned(flat["weights"])
    # Each answer has masks of its own; chosen and rejected differ anyway.
    keys = row_keys(drawn, jnp.arange(real.shape[0]))
    other = row_keys(jax.random.fold_in(drawn, 1), jnp.arange(real.shape[0]))

    def total(params, keys):
      views = self.estimator.plan(keys, answer & real, real)
      found = estimators.estimate(
        self.model,
        params,
        flat["tokens"],
        real,
        views,
        self.mask_id,
        self.shift,
        self.rows,
        self.block,
        self.schedule,
      ).sum(-1)
      if self.by_length:
        found = found / jnp.maximum(answer.sum(-1), 1)
      return found.reshape(-1, 2)

    ratios = total(policy, keys)
    ratios -= total(reference, keys if self.shared else other)
    rewards = self.beta * ratios
    margin = rewards[:, 0] - rewards[:, 1]
    loss = -jax.nn.log_sigmoid(margin)
    counts = (batch["weights"] > 0).any((1, 2)).astype(jnp.float32)
    found = {
      "accuracy": (margin > 0).astype(jnp.float32),
      "margin": margin,
      "reward_chosen": rewards[:, 0],
      "reward_rejected": rewards[:, 1],
    }
    sums = {k: (v * counts).sum() for k, v in found.items()}
    return (loss * counts).sum(), counts.sum(), sums
