"""What Mosaic GPU kernels write, by any JAX that the package admits."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def store(ref: Any, value: jax.Array) -> None:
  """Registers to shared or global memory, in whatever pieces a layout has.

  JAX 0.11 has no `plgpu.store`; an assignment is one there, of this kind.

  Args:
    ref: Where to.
    value: Of its dtype.
  """
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
