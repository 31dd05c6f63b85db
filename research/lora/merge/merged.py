"""Merging one adapted weight so that what rounding loses can be told."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from research import weights
from research.lora.adapted import AdaptedBias, AdaptedTensor


def in_float32(weight: Any) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns (merged, base), both float32; None for a weight without adapters.

  Args:
    weight: any, or a bias of `wrap.biases`; adapters on adapters all count.
  """
  if isinstance(weight, AdaptedBias):
    base = jnp.asarray(weight.w).astype(jnp.float32)
    return np.asarray(weight.matrix.scaled_bias(base)), np.asarray(base)
  if not isinstance(weight, AdaptedTensor):
    return None
  below = in_float32(weight.w)
  if below is None:
    base = total = np.asarray(weights.dense(weight.w)).astype(np.float32)
  else:
    total, base = below
  delta = dataclasses.replace(weight, w=jnp.asarray(total)).delta()
  return total + np.asarray(delta), base
