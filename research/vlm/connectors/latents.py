"""Learned queries of connectors that ask all patches."""

import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.typing import Array, Float


def latents(
  module: nn.Module,
  x: Float[Array, "B N C"],
  count: int,
  width: int,
  std: float,
) -> Float[Array, "B S W"]:
  """Returns a module's parameter `latents`, once for each row of `x`.

  Args:
    x: features of the patches, whose type they get.
    count: number of latents, S.
    width: of each, W.
  """
  init = nn.initializers.normal(std)
  own = weights.weight(module, "latents", init, (count, width))
  return jnp.broadcast_to(own.astype(x.dtype), (x.shape[0], count, width))
