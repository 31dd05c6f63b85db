"""Merging one adapted weight so that what rounding loses can be told."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from research import weights
from research.lora.tensor import LoRATensor


def in_float32(weight: Any) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns (merged, base), both float32; None for a weight without adapters.

  Args:
    weight: any; adapters on adapters all count.
  """
  if not isinstance(weight, LoRATensor):
    return None
  below = in_float32(weight.w)
  if below is None:
    base = total = np.asarray(weights.dense(weight.w)).astype(np.float32)
  else:
    total, base = below
  a, b = (np.asarray(jnp.asarray(x, jnp.float32)) for x in (weight.a, weight.b))
  delta = np.swapaxes(a, -1, -2) @ b
  return total + np.float32(weight.scale) * delta, base
