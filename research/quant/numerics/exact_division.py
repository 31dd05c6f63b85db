"""Arithmetic that is rounded as written, also when it is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float


def divided(
  x: Float[Array, "..."] | np.ndarray, by: Any
) -> Float[Array, "..."] | np.ndarray:
  """Returns `x / by`, rounded once.

  XLA multiplies by the reciprocals of constants instead, and turns
  `a / (b / c)` into `a * c / b`; where a weight lies halfway between two codes,
  as the largest of a group does on some grids, that decides.
  """
  by = np.float32(by) if isinstance(by, float | int) else by
  if isinstance(x, np.ndarray):
    return x / by
  # Broadcast as well: of one number for many, too, it takes the reciprocal.
  by = jnp.asarray(by)
  shape = jnp.broadcast_shapes(x.shape, by.shape)
  return x / jax.lax.optimization_barrier(jnp.broadcast_to(by, shape))
