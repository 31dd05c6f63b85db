"""Division that XLA does not rewrite, rounded once as in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float


def divide(
  x: Float[Array, "..."] | np.ndarray, by: Any
) -> Float[Array, "..."] | np.ndarray:
  """Returns `x / by`, rounded once.

  XLA replaces division by a constant with multiplication by its reciprocal, and
  `a / (b / c)` with `a * c / b`. The different rounding changes codes of
  weights halfway between two codes, such as the largest of a group on some
  grids.
  """
  by = np.float32(by) if isinstance(by, float | int) else by
  if isinstance(x, np.ndarray):
    return x / by
  # Broadcast `by`: XLA also takes the reciprocal of a scalar divisor.
  by = jnp.asarray(by)
  shape = jnp.broadcast_shapes(x.shape, by.shape)
  return x / jax.lax.optimization_barrier(jnp.broadcast_to(by, shape))
