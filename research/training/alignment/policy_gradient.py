"""Policy gradients of an autoregressive model, whose log p is exact."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research import weights
from research.nn.transformer import Transformer
from research.ranges import PositiveFloat, PositiveInt, Ranged
from research.training import positions
from research.training.alignment.surrogate import Surrogate
from research.training.objectives.objective import Batch, Sums
from research.training.objectives.preference import Select, all_params
from research.typing import Array, Float, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(Ranged):
  """The clipped surrogate of answers that a policy sampled.

  A batch has what text has (`tokens`, `targets`, `positions`, `segments` and
  `weights`, which is above 0 where the target is an answer's token), and:

    advantage   float32 `[B]`, or `[B, T]` of each target
    old         float32 `[B, T]`, log p of each target when it was sampled;
                without it, of the policy that the update finds: all ratios
                are 1, and the gradient is that of a round's first update
    reference   float32 `[B, T]`, by the reference, if there is a divergence

  `rollouts.GroupRollouts` samples such batches.

  Attributes:
    model: the network; the experiment sets it.
    temperature: by which logits are divided, that of the sampling: the policy
      is the distribution that answers were drawn from.
    policy: selects the policy's parameters.
    rows: rows of logits materialised at a time.
  """

  model: Transformer | None = None
  surrogate: Surrogate = Surrogate()
  temperature: PositiveFloat = 1.0
  policy: Select = all_params
  rows: PositiveInt = 256

  def log_probs(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """Returns log p of each target, 0 where it is not an answer's."""
    mask = Mask.causal(segments=batch["segments"])
    params = weights.with_tokens(params, batch["tokens"], batch["segments"])
    hidden, _ = self.model.apply(
      {"params": params}, batch["tokens"], batch["positions"], mask
    )
    scores = positions.log_probs(
      self.model,
      params,
      hidden,
      batch["targets"],
      self.rows,
      temperature=self.temperature,
    )
    return jnp.where(batch["weights"] > 0, scores, 0.0)

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the surrogate's sums, and `surprisal`, the mean of -log p.

    At the first update of a round `surprisal` estimates the policy's entropy:
    where it falls to 0, answers have stopped to vary.
    """
    params = weights.bind(self.policy(params), key=key)
    answer = batch["weights"] > 0
    new = self.log_probs(params, batch)
    old = batch.get("old", jax.lax.stop_gradient(new))
    loss_sum, weight, sums = self.surrogate(
      new, old, batch["advantage"], answer, batch.get("reference")
    )
    total, count = self.surrogate.normalization(jnp.ones_like(new), answer)
    del total
    length = jnp.maximum(answer.sum(-1), 1)
    surprisal = jax.lax.stop_gradient(-new.sum(-1) / length)
    return loss_sum, weight, sums | {"surprisal": (surprisal * count).sum()}
