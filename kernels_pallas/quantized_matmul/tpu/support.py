"""What the TPU kernels support. It imports none of them."""

from typing import Any

import jax.numpy as jnp

from kernels_pallas.quantized_matmul.planar import Planar


def unsupported(dtype: Any, w: Planar) -> str | None:
  """Returns why the kernels cannot multiply such rows with `w`, or None."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    return (
      f"found {dtype}, expected bfloat16 or float32, which are what TPUs "
      "compute in"
    )
  if w.bits == 8 and w.words:
    return "codes: found 8 bits in words, expected int8, as planar.pack leaves"
  return None
