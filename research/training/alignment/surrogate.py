"""The clipped surrogate of policy gradients, for policies of any kind.

All that it needs of a policy is an estimate of log p of each token of an
answer, now and when the answer was sampled: exact ones of an autoregressive
policy (`policy_gradient`), or a masked diffusion model's
(`diffusion.alignment`). Its parts are values:

  ratio          of what a ratio is taken: a token, or a whole answer
  clip           within which ratios gain
  normalization  what a token, an answer and a batch weigh
  divergence     the penalty for leaving a reference

GRPO, Dr. GRPO, DAPO and GSPO are choices of these; `grpo()` and the others
below have their papers' numbers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.ranges import PositiveFloat, PositiveInt, Ranged
from research.training.alignment.divergence import KL
from research.training.objectives.objective import Sums
from research.typing import Array, Bool, Float, UserError

Ratio = Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]]
"""`(log p / p_old of tokens, which are an answer's) -> log ratio of each`."""

Normalization = Callable[
  [Float[Array, "B T"], Bool[Array, "B T"]],
  tuple[Float[Array, " B"], Float[Array, " B"]],
]
"""`(terms of tokens, which are an answer's) -> (sum, weight) of each row`; a
batch's loss is the quotient of their sums over all microbatches and devices."""


def token_ratio(
  log_ratio: Float[Array, "B T"], answer: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
  """Returns each token's own log ratio (PPO, GRPO)."""
  del answer
  return log_ratio


def sequence_ratio(
  log_ratio: Float[Array, "B T"], answer: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
  """Returns the mean over an answer's tokens, for each of them.

  GSPO (Zheng et al. 2025, arXiv:2507.18071): rewards are of answers, so
  clipping is, too.
  """
  total = jnp.where(answer, log_ratio, 0.0).sum(-1, keepdims=True)
  return jnp.broadcast_to(total / _length(answer)[:, None], log_ratio.shape)


def sequence_token_ratio(
  log_ratio: Float[Array, "B T"], answer: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
  """Returns the value of `sequence_ratio` with the gradient of a token's own.

  GSPO-token: an answer's ratio where advantages are of tokens.
  """
  whole = jax.lax.stop_gradient(sequence_ratio(log_ratio, answer))
  return whole + log_ratio - jax.lax.stop_gradient(log_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip(Ranged):
  """The pessimistic clip: `min(r A, clip(r, 1 - lower, 1 + upper) A)`.

  Schulman et al. 2017 (PPO, arXiv:1707.06347, equation 7). A larger `upper`
  lets unlikely tokens grow (DAPO's clip-higher, arXiv:2503.14476, section 3.1).

  Attributes:
    lower, upper: how far below and above 1 a ratio still has a gradient where
      it improves the gain.
    dual_clip: ratios are cut here whatever the advantage, which bounds the loss
      of a bad answer that became likely; None for no bound (TRL's `delta`).
  """

  lower: PositiveFloat = 0.2
  upper: PositiveFloat = 0.2
  dual_clip: float | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.dual_clip is not None and not self.dual_clip > 1 + self.upper:
      raise UserError(
        f"Clip.dual_clip: found {self.dual_clip}, expected more than 1 + upper"
        f" = {1 + self.upper}, or None."
      )

  def __call__(
    self, ratio: Float[Array, "B T"], advantage: Float[Array, "B #T"]
  ) -> Float[Array, "B T"]:
    near = jnp.clip(ratio, 1 - self.lower, 1 + self.upper)
    if self.dual_clip is not None:
      ratio = jnp.minimum(ratio, self.dual_clip)
    return jnp.minimum(ratio * advantage, near * advantage)

  def acts(
    self, ratio: Float[Array, "B T"], advantage: Float[Array, "B #T"]
  ) -> Bool[Array, "B T"]:
    low = (ratio < 1 - self.lower) & (advantage < 0)
    return low | ((ratio > 1 + self.upper) & (advantage > 0))


def per_answer(
  terms: Float[Array, "B T"], answer: Bool[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
  """Returns means over tokens, each answer of weight 1 (GRPO).

  A token of a long answer weighs less. Rows without an answer weigh nothing.
  """
  total = jnp.where(answer, terms, 0.0).sum(-1)
  return total / _length(answer), answer.any(-1).astype(jnp.float32)


def per_token(
  terms: Float[Array, "B T"], answer: Bool[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
  """Returns sums over tokens, each of weight 1 (DAPO, equation 12)."""
  total = jnp.where(answer, terms, 0.0).sum(-1)
  return total, answer.sum(-1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PerLength(Ranged):
  """Sums over tokens, over a constant; each answer has weight 1 (Dr. GRPO).

  Neither an answer's length nor the batch's changes what a token weighs
  (arXiv:2503.20783, section 3.1).

  Attributes:
    length: the constant, such as the longest answer's tokens.
  """

  length: PositiveInt

  def __call__(
    self, terms: Float[Array, "B T"], answer: Bool[Array, "B T"]
  ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    total = jnp.where(answer, terms, 0.0).sum(-1)
    return total / self.length, answer.any(-1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surrogate:
  """The loss of answers whose advantages are known.

    -mean of [clip(ratio, advantage) - beta * divergence]

  Attributes:
    ratio: `token_ratio`, `sequence_ratio` or `sequence_token_ratio`.
    clip: how ratios are clipped.
    normalization: `per_answer`, `per_token` or a `PerLength`.
    divergence: the penalty for leaving the reference; None for no reference.
  """

  ratio: Ratio = token_ratio
  clip: Clip = Clip()
  normalization: Normalization = per_answer
  divergence: KL | None = None

  def __call__(
    self,
    new: Float[Array, "B T"],
    old: Float[Array, "B T"],
    advantage: Float[Array, " B"] | Float[Array, "B T"],
    answer: Bool[Array, "B T"],
    reference: Float[Array, "B T"] | None = None,
  ) -> Sums:
    """Returns the sums of loss, weights and metrics.

    Metrics are means over an answer's tokens, weighted as the loss weighs
    answers: `ratio`, `clipped` (the share of tokens without a gradient), and
    `divergence` if there is a reference.

    Args:
      new: log p of each token by the policy that learns.
      old: log p by the policy that sampled them.
      advantage: advantages of answers, or of their tokens.
      answer: which tokens are an answer's.
      reference: log p of each token by the reference.

    Raises:
      UserError: `divergence` has no reference.
    """
    if advantage.ndim == 1:
      advantage = advantage[:, None]
    ratio = jnp.exp(self.ratio(jnp.where(answer, new - old, 0.0), answer))
    metrics = {
      "ratio": ratio,
      "clipped": self.clip.acts(ratio, advantage).astype(jnp.float32),
    }
    terms = self.clip(ratio, advantage)
    if self.divergence is not None:
      if reference is None:
        raise UserError(
          "Surrogate.divergence: found no log p of a reference, expected"
          " `reference` in the batch; set it to None to train without one."
        )
      log_ratio = jnp.where(answer, reference - new, 0.0)
      metrics["divergence"] = self.divergence.estimate(log_ratio)
      terms = terms - self.divergence.beta * metrics["divergence"]
    total, weight = self.normalization(terms, answer)
    share = weight / _length(answer)
    sums = {
      name: (jnp.where(answer, x, 0.0).sum(-1) * share).sum()
      for name, x in metrics.items()
    }
    return -total.sum(), weight.sum(), sums


def grpo(clip: float = 0.2, beta: float = 0.04) -> Surrogate:
  """Returns GRPO's (arXiv:2402.03300, equation 3; section 4.2: beta 0.04)."""
  return Surrogate(clip=Clip(lower=clip, upper=clip), divergence=KL(beta=beta))


def dr_grpo(length: int, clip: float = 0.2) -> Surrogate:
  """Returns Dr. GRPO's: a constant length, no reference; `centered` rewards."""
  return Surrogate(
    clip=Clip(lower=clip, upper=clip), normalization=PerLength(length)
  )


def dapo(lower: float = 0.2, upper: float = 0.28) -> Surrogate:
  """Returns DAPO's: clip-higher, each token alike, no reference."""
  return Surrogate(clip=Clip(lower=lower, upper=upper), normalization=per_token)


def gspo(lower: float = 3e-4, upper: float = 4e-4) -> Surrogate:
  """Returns GSPO's: ratios of answers; clips as in section 5.1."""
  return Surrogate(ratio=sequence_ratio, clip=Clip(lower=lower, upper=upper))


def _length(answer: Bool[Array, "B T"]) -> Array:
  return jnp.maximum(answer.sum(-1), 1)
