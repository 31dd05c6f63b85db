"""Building blocks of the Hopper kernels: `wgmma`, and stores by the copy
engine.

A matmul reads its right operand from shared memory, and its left one from there
or from registers, where the accumulators are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_memory
from kernels_pallas.flash_attention.gpu.tile import TileContext


def product(a: Any, b: Any, free: Callable[[], None] = lambda: None):
  """Computes a b^T of two references, [64, rows of b].

  Args:
    a: [64, H] in shared memory.
    b: [n, H] in shared memory.
    free: Called while the matmul runs.
  """

  def run(out):
    plgpu.wgmma(out, a, b.transpose((1, 0)))
    free()
    return out[...]

  size = (a.shape[0], b.shape[0])
  return pl.run_scoped(run, plgpu.ACC(size, jnp.float32))


def accumulate(
  x: TileContext,
  acc: jax.Array,
  left: jax.Array,
  right: Any,
  free: Callable[[], None] = lambda: None,
) -> jax.Array:
  """Computes acc + left right, with left rounded to the dtype of `right`.

  Args:
    x: The context.
    acc: [64, n].
    left: [64, m], values.
    right: [m, n] in shared memory.
    free: Called while the matmul runs.
  """
  left = left.astype(right.dtype)
  if x.operand is None:

    def into(out):
      plgpu.wgmma(out, left, right)
      free()

    return pl.run_state(into)(plgpu.ACC.init(acc))

  x.operand[...] = left
  plgpu.commit_smem()

  def alone(out):
    plgpu.wgmma(out, x.operand, right)
    free()
    return out[...]

  return acc + pl.run_scoped(alone, plgpu.ACC(acc.shape, jnp.float32))


def store(buffer: Any, value: jax.Array, out: Any) -> None:
  """Stores an accumulator: rounded through a buffer, or float32 directly.

  The caller waits with `plgpu.wait_smem_to_gmem`.

  Args:
    buffer: Shared memory that is no longer needed, 16-bit.
    value: [64, n].
    out: Reference, of the buffer's dtype, or float32, which the buffer cannot
      hold.
  """
  if out.dtype != buffer.dtype:
    gpu_memory.store(out, value.astype(out.dtype))
    return
  buffer[...] = value.astype(out.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffer, out)
