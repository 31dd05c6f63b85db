"""What the Blackwell kernels are made of: `tcgen05.mma` and tensor memory.

Products and sums are in tensor memory: 128 lanes, which are the rows of a
warpgroup, by 512 columns of 32 bits. A matmul is issued by one thread and
reports to barriers when it is done. A warpgroup issues its own: the scores of
the next tile as soon as it has read those of this one, so that tensor cores run
while it computes. Nothing here relies on the order in which the matmuls of two
accumulators end: what one reads is overwritten when its barrier says so.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_memory
from kernels_pallas.flash_attention.gpu import gpu_tile as tile
from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.gpu_problem import Problem
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import COLUMNS, LANES

LAYOUT = plgpu.Layout.TCGEN05
"""Of sums on their way to memory."""

TENSOR_COLUMNS = 512
"""Of tensor memory, 32 bits wide."""


def barriers(
  p: Problem, copies: tuple[int, ...], reports: tuple[int, ...] = (1, 1)
) -> list[Any]:
  """As `stream.barriers`: a buffer is free when matmuls that read it end.

  Args:
    p: The problem.
    copies: Into each operand's buffer.
    reports: Of a warpgroup that it has read each: one of its matmuls, and one
      of its threads where they read what was copied with the operand.
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


def done(p: Problem) -> Any:
  """Type of the barriers, one a warpgroup, that say a matmul is done."""
  return plgpu.Barrier(num_barriers=p.tile.groups, orders_tensor_core=True)


def memory(
  p: Problem, sums: dict[str, int], operands: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Types of tensor memory, and of shared memory for what found no room.

  Args:
    p: The problem.
    sums: Columns of each float32 accumulator of a warpgroup.
    operands: Names of left operands, as wide as a tile and 16 bits; they are
      in shared memory where tensor memory has no room for all.

  Raises:
    ValueError: The sums alone take too many columns.
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
    add: Whether to add to what is there.
  """
  plgpu.tcgen05_mma(acc, a, b, accumulate=add)


def meet() -> None:
  """Waits for all threads of the warpgroup, after they waited for a copy.

  One of them issues the matmul that frees the buffer. Another one that was
  still asking whether it is full might miss that it was, once it is full again.
  """
  plgpu.wait_load_tmem()


def report(*barriers: Any) -> None:
  """Has barriers told when all matmuls that were started are done."""
  for barrier in barriers:
    plgpu.tcgen05_commit_arrive(barrier)


def load(kind: Any, ref: Any) -> jax.Array:
  """A value of tensor memory, which may then be overwritten.

  Args:
    kind: Layout that it gets.
    ref: [128, n].
  """
  found = plgpu.async_load_tmem(ref, layout=kind)
  plgpu.wait_load_tmem()
  return found


def put(operand: Any, value: jax.Array, shared: bool) -> None:
  """A left operand to where matmuls read it.

  Args:
    operand: [128, m] in tensor or shared memory.
    value: Of its dtype.
    shared: Whether it is shared memory.
  """
  if shared:
    gpu_memory.store(operand, value)
    plgpu.commit_smem()
  else:
    plgpu.async_store_tmem(operand, value)
    plgpu.commit_tmem()


def scale(p: Problem, acc: Any, alpha: jax.Array) -> None:
  """Multiplies the rows of a sum; the caller commits it.

  Args:
    p: The problem.
    acc: [128, n] in tensor memory.
    alpha: [128].
  """
  for part in parts(acc, 32):
    value = load(tile.layout(p), part)
    plgpu.async_store_tmem(part, tile.scaled(value, alpha))


def clear(p: Problem, *sums: Any) -> None:
  """Zeros, of a line that visits no tile."""
  for acc in sums:
    for part in parts(acc):
      zeros = plgpu.layout_cast(
        jnp.zeros(part.shape, jnp.float32), tile.layout(p)
      )
      plgpu.async_store_tmem(part, zeros)
  plgpu.commit_tmem()


def drain(
  acc: Any,
  buffer: Any,
  out: Any,
  finish: Callable[[jax.Array], jax.Array],
) -> None:
  """A sum to memory, as `sm90_wgmma.store` but by parts.

  In the layout whose stores are the fewest, whatever that of the scores was.

  Args:
    acc: [128, n] in tensor memory.
    buffer: Shared memory that is no longer needed, in 16 bits.
    out: Reference, of the buffer's type or float32.
    finish: What is done to a part of it first.
  """
  wide = out.dtype != buffer.dtype
  for n, part in enumerate(parts(acc)):
    value = load(LAYOUT, part)
    value = finish(value).astype(out.dtype)
    columns = slice(None), pl.ds(n * part.shape[1], part.shape[1])
    gpu_memory.store((out if wide else buffer).at[columns], value)
  if not wide:
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, out)


def parts(acc: Any, most: int = COLUMNS) -> list[Any]:
  """A sum by columns, so that few registers hold one."""
  n = min(acc.shape[1], most)
  return [
    acc.at[:, pl.ds(start, n)] for start in range(0, acc.shape[1], n)
  ]  # fmt: skip
