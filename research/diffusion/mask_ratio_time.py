"""The time that a model is conditioned on, where none was drawn.

Samplers that choose places by what the model says have no time. What rows look
like has: at time t a share `1 - alpha(t)` of them is masked. The time of that
share is one of the row alone, so that caches, policies, first hitting and the
bounds of `likelihood` mean for a conditioned model (`nn.time_embedding`) what
they mean for any other. Ancestral steps, first hitting and the bound can take
the process's own times instead.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from research.diffusion.schedule import Linear, Schedule
from research.nn.transformer import Transformer
from research.typing import Array, Bool, Float, Int


def if_conditioned(model: Transformer, time: Any) -> Any:
  """Returns the time for a model that is conditioned on it, else None."""
  return None if model.time_embedding is None else time


def for_model(model: Transformer, mask_id: int) -> "MaskRatioTime | None":
  """Returns what denoisers of a model need to time it, or None."""
  return if_conditioned(model, MaskRatioTime(mask_id=mask_id))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRatioTime:
  """Times by the ratio of masks.

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
