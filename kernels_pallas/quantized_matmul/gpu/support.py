"""What the GPU kernels support, and when they are the fastest.

It imports none of them, so that programs for other devices need not either.
"""

from typing import Any

import jax.numpy as jnp

from kernels_pallas.common.target_platform import (
  BLACKWELL,
  HOPPER,
  NO_GPU_KERNELS,
  has_mma,
  program_device,
)
from kernels_pallas.quantized_matmul.gpu.tile_sizes import DTYPES
from kernels_pallas.quantized_matmul.planar import Planar

FEW = 256
"""Rows up to which Blackwell uses the fused kernel: see README."""

MAX_INPUTS = (2**31 - 1) // (127 * 128)
"""Inputs of a product of 8-bit codes whose int32 sums cannot overflow."""


def unsupported(dtype: Any, w: Planar, activations: Any = None) -> str | None:
  """Returns why the kernels cannot multiply such rows with `w`, or None."""
  if activations is not None and w.group < w.padded[0]:
    return (
      f"activations: found groups of {w.group} of {w.inputs} inputs, expected "
      "a scale for each output"
    )
  if activations is not None and w.inputs > MAX_INPUTS:
    return (
      f"activations: found {w.inputs} inputs, expected at most {MAX_INPUTS}, "
      "whose int32 sums cannot overflow"
    )
  if NO_GPU_KERNELS is not None:
    return NO_GPU_KERNELS
  if dtype not in DTYPES:
    return f"x: found {dtype}, expected bfloat16 or float16"
  if w.codes.dtype != jnp.uint32:
    return "codes: found int8, expected words: see planar.in_words"
  most = float(jnp.finfo(dtype).max)
  if w.codebook and max(map(abs, w.codebook)) > most:
    return f"codebook: found {w.codebook}, expected what {dtype} has"
  return None


def cores() -> str | None:
  """Returns `Tile.cores` for the program's device, or None without a kernel."""
  platform, kind = program_device()
  if platform not in ("gpu", "cuda"):
    return None
  if any(name in kind for name in HOPPER):
    return "wgmma"
  return "mma" if has_mma(kind) else None


def is_for(rows: int = 1) -> bool:
  """Whether the kernels are the fastest option for the program's device.

  Args:
    rows: Rows of activations. On Blackwell `mma` has a fraction of the tensor
      cores' throughput, so for many rows dequantizing first is faster.
  """
  found = cores()
  blackwell = any(name in program_device()[1] for name in BLACKWELL)
  return found is not None and (rows <= FEW or not blackwell)
