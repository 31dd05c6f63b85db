"""What becomes of answers that ran into the limit of their length.

Such an answer never ended, so its reward says little of it: a wrong answer
would be punished for its length, a right one that goes on is no right one.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from research.ranges import Ranged
from research.typing import Array, Bool, Float, Int

Overlong = Callable[
  [Float[Array, "*B"], Int[Array, "*B"], Bool[Array, "*B"]],
  tuple[Float[Array, "*B"], Bool[Array, "*B"]],
]
"""`(rewards, lengths, ended) -> (rewards, trained)`: the tokens of answers that
are not `trained` have no loss, while their rewards count in the group."""


def keep_overlong(
  rewards: Float[Array, "*B"],
  lengths: Int[Array, "*B"],
  ended: Bool[Array, "*B"],
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
  """Returns rewards as they are, and that all answers are trained on."""
  del lengths
  return rewards, jnp.ones(ended.shape, bool)


def mask_overlong(
  rewards: Float[Array, "*B"],
  lengths: Int[Array, "*B"],
  ended: Bool[Array, "*B"],
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
  """Returns rewards as they are, and that answers without an end do not train.

  DAPO's overlong filtering (arXiv:2503.14476, section 3.4); TRL's
  `mask_truncated_completions`.
  """
  del lengths
  return rewards, ended


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftOverlong(Ranged):
  """A punishment that grows linearly towards the limit (DAPO, equation 13).

    0 up to `limit - buffer` tokens, -1 from `limit` on, linear between

  Attributes:
    limit: tokens of the longest answer.
    buffer: tokens before the limit in which the punishment grows.
  """

  limit: int
  buffer: int

  def __post_init__(self):
    super().__post_init__()
    self.expect("buffer", 1, self.limit)

  def __call__(
    self,
    rewards: Float[Array, "*B"],
    lengths: Int[Array, "*B"],
    ended: Bool[Array, "*B"],
  ) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    """Returns rewards with the punishment, and that all answers train."""
    beyond = jnp.clip(lengths - (self.limit - self.buffer), 0, self.buffer)
    return rewards - beyond / self.buffer, jnp.ones(ended.shape, bool)
