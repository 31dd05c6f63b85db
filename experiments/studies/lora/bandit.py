"""Policy gradient on the smallest task there is: one answer, right or wrong.

A prompt's last token has one right answer among a few; the policy is the
model's distribution over them. An episode tells at most one bit, which is why
adapters of rank 1 are said to be enough for it (Schulman et al. 2025, "LoRA
Without Regret").
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from research.nn.transformer import Transformer
from research.training.objectives.objective import Batch, Sums
from research.typing import Array, Float, Int, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bandit:
  """REINFORCE with the batch's mean reward as baseline (Williams 1992).

  Training reports the surrogate's gradient; evaluation, without a key, the
  chance of a wrong answer, exactly.

  Attributes:
    model: the network.
    actions: tokens 0 to this are answers.
    seed: of which one is right.
  """

  model: Transformer | None = None
  actions: int = 8
  seed: int = 0

  def answers(self) -> Int[np.ndarray, "V"]:
    """Returns the right answer to each last token."""
    rng = np.random.default_rng(self.seed)
    return rng.integers(0, self.actions, self.model.vocab_size)

  def policy(
    self, params: Params, tokens: Int[Array, "B T"]
  ) -> Float[Array, "B A"]:
    """Returns log probabilities of the answers."""
    hidden, _ = self.model.apply({"params": params}, tokens)
    logits = self.model.apply(
      {"params": params}, hidden[:, -1], method="logits"
    )
    return jax.nn.log_softmax(logits[:, : self.actions])

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums over prompts; `accuracy` is the expected reward."""
    tokens = batch["tokens"]
    right = jnp.asarray(self.answers())[tokens[:, -1]]
    policy = self.policy(params, tokens)
    reward = jnp.exp(_picked(policy, right))
    weight = jnp.float32(tokens.shape[0])
    sums = {"accuracy": reward.sum()}
    if key is None:
      return jnp.sum(1 - reward), weight, sums
    chosen = jax.random.categorical(key, jax.lax.stop_gradient(policy))
    won = (chosen == right).astype(jnp.float32)
    loss = -(won - won.mean()) * _picked(policy, chosen)
    return loss.sum(), weight, sums


def _picked(policy, actions):
  return jnp.take_along_axis(policy, actions[:, None], -1)[:, 0]
