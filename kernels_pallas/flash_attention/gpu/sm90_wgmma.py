"""What the Hopper kernels are made of: `wgmma`, and stores by the copy engine.

A matmul reads its right operand from shared memory, and its left one from there
or from registers, in which the sums are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_memory
from kernels_pallas.flash_attention.gpu.gpu_tile import View


def product(a: Any, b: Any, free: Callable[[], None] = lambda: None):
  """a b^T of two references, [64, rows of b].

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
  x: View,
  acc: jax.Array,
  left: jax.Array,
  right: Any,
  free: Callable[[], None] = lambda: None,
) -> jax.Array:
  """acc + left right, left rounded to the type of `right`.

  Args:
    x: The view.
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
  """Sums to memory: rounded by way of a buffer, or from registers as they are.

  The caller waits, by `plgpu.wait_smem_to_gmem`.

  Args:
    buffer: Shared memory that is no longer needed, in 16 bits.
    value: [64, n].
    out: Reference, of the buffer's type or float32, for which it is too small.
  """
  if out.dtype != buffer.dtype:
    gpu_memory.store(out, value.astype(out.dtype))
    return
  buffer[...] = value.astype(out.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffer, out)
