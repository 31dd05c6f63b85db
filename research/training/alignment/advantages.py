"""Advantages of sampled answers: rewards compared within a group.

A group is the answers to one prompt. Rewards are `[P, G]`: P prompts, G answers
to each. What an estimate of the value function would do in PPO, the group's
mean does here (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from research.ranges import NonNegativeFloat, OneOf, Ranged
from research.typing import Array, Bool, Float, UserError

Advantages = Callable[[Float[Array, "P G"]], Float[Array, "P G"]]
"""Maps rewards to advantages."""

Selection = Callable[[Float[Array, "P G"]], Bool[Array, " P"]]
"""Maps rewards to whether each group is trained on."""


def centered(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
  """Returns each reward less its group's mean.

  Without the division by the standard deviation, prompts whose answers are
  almost all right or almost all wrong weigh no more than others (Dr. GRPO: Liu
  et al. 2025, arXiv:2503.20783, section 3).
  """
  return rewards - rewards.mean(-1, keepdims=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standardized(Ranged):
  """Rewards less the group's mean, over its standard deviation.

  GRPO (arXiv:2402.03300, section 4.1.2).

  Attributes:
    eps: added to the standard deviation.
    ddof: 0 divides the squares' sum by G, 1 by G - 1 (as TRL does).
  """

  eps: NonNegativeFloat = 1e-4
  ddof: OneOf(0, 1) = 0

  def __call__(self, rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Returns advantages; zeros in a group of equal rewards.

    Raises:
      UserError: a group has too few answers for a standard deviation.
    """
    if rewards.shape[-1] <= self.ddof:
      raise UserError(
        f"Standardized: found groups of {rewards.shape[-1]}, expected at least"
        f" {self.ddof + 1} answers to a prompt."
      )
    apart = centered(rewards)
    spread = rewards.std(-1, keepdims=True, ddof=self.ddof)
    # A mean may be rounded: equal rewards must not become noise over eps.
    return jnp.where(
      varied(rewards)[..., None], apart / (spread + self.eps), 0.0
    )


def leave_one_out(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
  """Returns each reward less the mean of the others in its group.

  RLOO (Ahmadian et al. 2024, arXiv:2402.14740): `G / (G - 1)` times
  what `centered` returns, and an unbiased estimate of the gradient.

  Raises:
    UserError: a group has one answer only.
  """
  count = rewards.shape[-1]
  if count < 2:
    raise UserError(
      f"leave_one_out: found groups of {count}, expected at least 2 answers to"
      " a prompt."
    )
  return centered(rewards) * (count / (count - 1))


def varied(rewards: Float[Array, "P G"]) -> Bool[Array, " P"]:
  """Returns whether a group's rewards differ.

  Other groups have no gradient. DAPO samples until a batch has none of them
  (Yu et al. 2025, arXiv:2503.14476, equation 11).
  """
  return rewards.max(-1) > rewards.min(-1)


def every_group(rewards: Float[Array, "P G"]) -> Bool[Array, " P"]:
  """Returns True for each group."""
  return jnp.ones(rewards.shape[:-1], bool)
