"""Building blocks of the Blackwell kernels: `tcgen05.mma` and tensor memory.

Products and accumulators are in tensor memory: 128 lanes, the rows of a
warpgroup, by 512 columns of 32 bits. One thread issues a matmul, which arrives
on barriers when it is done. Each warpgroup issues its own: the scores of the
next tile as soon as it has read those of this one, so that tensor cores run
while it computes. Nothing relies on the order in which matmuls into different
accumulators complete: an operand is overwritten only after the barrier of its
matmul.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_memory
from kernels_pallas.flash_attention.gpu import tile
from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.problem import Problem
from kernels_pallas.flash_attention.gpu.tile_sizes import COLUMNS, LANES

LAYOUT = plgpu.Layout.TCGEN05
"""Layout of accumulators on their way to memory."""

TENSOR_COLUMNS = 512
"""Columns of tensor memory, 32 bits wide."""


def barriers(
  p: Problem, copies: tuple[int, ...], reports: tuple[int, ...] = (1, 1)
) -> list[Any]:
  """As `stream.barriers`, but a buffer is free when matmuls that read it end.

  Args:
    p: The problem.
    copies: Copies into each operand's buffer.
    reports: Arrivals of a warpgroup per buffer: one of its matmuls, and one of
      its threads if they read what was copied with the operand.
  """
  full, _ = stream.barriers(p, copies)
  free = [
    plgpu.Barrier(
      num_arrivals=p.tile.groups * each,
      num_barriers=stages,
      orders_tensor_core=True,
    )
    for stages, each in zip(p.tile.stages, reports, strict=True)
  ]
  return [full, free]


def completion_barriers(p: Problem) -> Any:
  """Type of the barriers, one per warpgroup, on which a matmul arrives."""
  return plgpu.Barrier(num_barriers=p.tile.groups, orders_tensor_core=True)


def allocate(
  p: Problem, sums: dict[str, int], operands: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Types of tensor memory, and of shared memory for operands that do not fit.

  Args:
    p: The problem.
    sums: Columns of each float32 accumulator of a warpgroup.
    operands: Names of left operands, 16-bit and as wide as a tile; they are all
      in shared memory if tensor memory has no room for all.

  Raises:
    ValueError: The accumulators alone need too many columns.
  """
  groups, streamed = p.tile.groups, p.tile.streamed
  dtype = p.arrays["q"].dtype
  taken = groups * sum(sums.values())
  if taken > TENSOR_COLUMNS:
    raise ValueError(
      f"config: found {p.tile}, whose sums take {taken} columns of tensor "
      f"memory, expected at most {TENSOR_COLUMNS}; pass fewer groups or a "
      "smaller streamed"
    )
  found = {
    name: plgpu.TMEM((groups, LANES, n), jnp.float32)
    for name, n in sums.items()
  }
  size = groups, LANES, streamed
  if taken + groups * len(operands) * streamed // 2 > TENSOR_COLUMNS:
    return found, {name: stream.buffer(size, dtype) for name in operands}
  for name in operands:
    found[name] = plgpu.TMEM(size, dtype, packed=True)
  return found, {}


def multiply(acc: Any, a: Any, b: Any, add: Any = False) -> None:
  """Starts acc = a b, or acc += a b.

  Args:
    acc: [128, n] in tensor memory.
    a: [128, m] in tensor or shared memory.
    b: [m, n] in shared memory.
    add: Whether to accumulate.
  """
  plgpu.tcgen05_mma(acc, a, b, accumulate=add)


def sync_warpgroup() -> None:
  """Synchronizes the threads of the warpgroup after they waited for a copy.

  One of them then issues the matmul that frees the buffer. A thread still
  polling the full barrier could otherwise miss a phase, once the buffer is full
  again.
  """
  plgpu.wait_load_tmem()


def commit_arrive(*barriers: Any) -> None:
  """Lets all matmuls started so far arrive on the barriers when done."""
  for barrier in barriers:
    plgpu.tcgen05_commit_arrive(barrier)


def load(kind: Any, ref: Any) -> jax.Array:
  """Loads a value from tensor memory, which may then be overwritten.

  Args:
    kind: Layout of the result.
    ref: [128, n].
  """
  found = plgpu.async_load_tmem(ref, layout=kind)
  plgpu.wait_load_tmem()
  return found


def store_operand(operand: Any, value: jax.Array, shared: bool) -> None:
  """Stores a left operand where matmuls read it.

  Args:
    operand: [128, m] in tensor or shared memory.
    value: Value of the operand's dtype.
    shared: Whether it is in shared memory.
  """
  if shared:
    gpu_memory.store(operand, value)
    plgpu.commit_smem()
  else:
    plgpu.async_store_tmem(operand, value)
    plgpu.commit_tmem()


def scale(p: Problem, acc: Any, alpha: jax.Array) -> None:
  """Scales the rows of an accumulator; the caller commits it.

  Args:
    p: The problem.
    acc: [128, n] in tensor memory.
    alpha: [128].
  """
  for part in column_parts(acc, 32):
    value = load(tile.layout(p), part)
    plgpu.async_store_tmem(part, tile.scale_rows(value, alpha))


def zero(p: Problem, *sums: Any) -> None:
  """Zeroes the accumulators of a line that visits no tile."""
  for acc in sums:
    for part in column_parts(acc):
      zeros = plgpu.layout_cast(
        jnp.zeros(part.shape, jnp.float32), tile.layout(p)
      )
      plgpu.async_store_tmem(part, zeros)
  plgpu.commit_tmem()


def store_accumulator(
  acc: Any,
  buffer: Any,
  out: Any,
  finish: Callable[[jax.Array], jax.Array],
) -> None:
  """Stores an accumulator to memory, like `sm90_wgmma.store` but by parts.

  Uses the layout with the fewest stores, whatever that of the scores was.

  Args:
    acc: [128, n] in tensor memory.
    buffer: Shared memory that is no longer needed, 16-bit.
    out: Reference, of the buffer's dtype or float32.
    finish: Applied to each part first.
  """
  wide = out.dtype != buffer.dtype
  for n, part in enumerate(column_parts(acc)):
    value = load(LAYOUT, part)
    value = finish(value).astype(out.dtype)
    columns = slice(None), pl.ds(n * part.shape[1], part.shape[1])
    gpu_memory.store((out if wide else buffer).at[columns], value)
  if not wide:
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, out)


def column_parts(acc: Any, most: int = COLUMNS) -> list[Any]:
  """Splits an accumulator by columns, so that a part needs few registers."""
  n = min(acc.shape[1], most)
  return [
    acc.at[:, pl.ds(start, n)] for start in range(0, acc.shape[1], n)
  ]  # fmt: skip
