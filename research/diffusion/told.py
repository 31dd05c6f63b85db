"""Which time a model is told (`research.nn.time_embedding`) where nobody drew one.

Samplers that choose places by what the model says have no time. What rows look
like has: at time t a share `1 - alpha(t)` of them is masked. A model that is
told the time of that share is one of the row alone, so that caches, policies,
first hitting and the bounds of `likelihood` mean for it what they mean for a
model that is not told. Ancestral steps, first hitting and the bound can tell it
the process's own times instead.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from research.diffusion.schedule import Linear, Schedule
from research.nn.transformer import Transformer
from research.typing import Array, Bool, Float, Int


def given(model: Transformer, time: Any) -> Any:
  """Returns the time for a model that is told it, None for any other."""
  return None if model.clock is None else time


def shares(model: Transformer, mask_id: int) -> "Shares | None":
  """Returns what denoisers of a model need to tell it times, or None."""
  return given(model, Shares(mask_id=mask_id))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
  """Times by the share of masks.

  Attributes:
    mask_id: of the mask.
    schedule: that the model was trained with.
  """

  mask_id: int
  schedule: Schedule = Linear()

  def rows(
    self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
  ) -> Float[Array, "B"]:
    """Returns each row's time, by the masks among its valid tokens."""
    masked = ((tokens == self.mask_id) & valid).sum(-1)
    return self.schedule.time(masked / jnp.maximum(valid.sum(-1), 1))

  def blocks(
    self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], block: int
  ) -> Float[Array, "B T"]:
    """Returns each token's time, by its block; they start at index 0."""
    rows, length = tokens.shape
    pad = ((0, 0), (0, -length % block))
    tokens, valid = (
      jnp.pad(x, pad).reshape(-1, block) for x in (tokens, valid)
    )
    time = self.rows(tokens, valid).reshape(rows, -1)
    return jnp.repeat(time, block, axis=1)[:, :length]
