"""Stores from Mosaic GPU kernels, for every supported version of JAX."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def store(ref: Any, value: jax.Array) -> None:
  """Stores registers to shared or global memory, for any layout.

  JAX 0.11 has no `plgpu.store`; there an assignment does the same.

  Args:
    ref: Target reference.
    value: Value of the reference's dtype.
  """
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
