"""What the GPU kernel supports, and into how many splits it divides keys.

It imports no kernel, so that programs for other devices need not either.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common.target_platform import NO_GPU_KERNELS, has_mma
from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.decode_attention.work import Cache, head_sizes
from kernels_pallas.flash_attention.gpu.support import DTYPES, no_kernel_reason

KEYS = 64
"""Keys per tile."""

HEAD_DIMS = (64, 128, 256)
"""Head dims whose chunks divide a block's threads."""

PROCESSORS = 132
"""Multiprocessors to fill: those of an H100."""

MAX_SPLITS = 32


def unsupported(
  kind: str, dtype: Any, storage: Cache | Pages | None, precision: Any = None
) -> str | None:
  """Returns why the kernel cannot run a call, or None.

  Args:
    kind: Device kind, or '' for any with a kernel.
    dtype: Dtype of the queries.
    storage: Keys and values, or None for any.
    precision: Precision of the matmuls.
  """
  if NO_GPU_KERNELS is not None:
    return NO_GPU_KERNELS
  if kind and not has_mma(kind):
    return no_kernel_reason(kind)
  if dtype not in DTYPES:
    return f"GPU kernels compute in bfloat16 and float16, found {dtype}"
  if precision not in (None, jax.lax.Precision.DEFAULT):
    return f"GPU kernels have one precision, found {precision}"
  if storage is None:
    return None
  if is_quantized(storage) and dtype != jnp.bfloat16:
    # Operands are probabilities times the values' scales: the exponent range of
    # float16 is too small for the scales of small values.
    return f"GPU kernels read codes for bfloat16 queries, found {dtype}"
  for found in (x.dtype for x in _arrays(storage)):
    # Codes have scales, which only pages store: a cache's float8 are numbers.
    if found != dtype and not is_quantized(storage):
      return f"GPU kernels take keys of the queries' {dtype}, found {found}"
  dims = head_sizes(storage)[1:]
  if not set(dims) <= set(HEAD_DIMS):
    return f"GPU kernels take head dims of {HEAD_DIMS}, found {dims}"
  return None


def _arrays(storage):
  return (storage.k, storage.v) if isinstance(storage, Cache) else (storage.kv,)


def splits_for(pieces: int, keys: int) -> int:
  """Returns the splits that fill the multiprocessors twice, of 4 tiles or more.

  Args:
    pieces: Items times key heads.
    keys: Most keys of a row.
  """
  wanted = -(-2 * PROCESSORS // pieces)
  return max(1, min(wanted, keys // (4 * KEYS), MAX_SPLITS))


def is_quantized(storage: Cache | Pages) -> bool:
  """Whether keys and values are codes with scales."""
  return isinstance(storage, Pages) and storage.scale is not None
