"""Asynchronous copies into GPU shared memory by `cp.async`, 16 bytes a thread.

A copy gives an address for each row, so a tile can be any run of tokens of a
cache or of pages, and a flag whether to read it: rows outside the valid range
are filled with zeros in shared memory without reading global memory. NaN in
skipped rows therefore never reaches a result. Pallas' own copies are `cp.async`
before Hopper and need a barrier in memory from Hopper on; these copies are the
same instruction on every architecture.

`gpu_copy_rows` emits the instructions. The GPU interpreter does not support
them: with `interpreted` a copy is an assignment.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, nvvm

from kernels_pallas.common import gpu_copy_rows as rows
from kernels_pallas.common.gpu_copy_rows import LINES, Source

COLUMNS = 64
"""The most 16-bit elements in a row of a swizzled tile."""


def buffer(shape: tuple[int, ...], dtype: Any) -> Any:
  """Returns shared memory for rows of 16-bit elements, or of pairs of codes."""
  return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[-1]))


def _transforms(columns: int) -> tuple[Any, ...]:
  columns = min(columns, COLUMNS)
  return (
    plgpu.TilingTransform((LINES, columns)),
    plgpu.SwizzleTransform(2 * columns),
  )


def fetch(
  interpreted: bool,
  x: Source,
  table: Any,
  copies: list[tuple[Any, Any, Any]],
  where: tuple[Any, ...],
) -> None:
  """Starts copying a tile's rows; `commit` closes the group of copies.

  Args:
    interpreted: Whether to assign instead.
    x: How tokens map to lines of the arrays.
    table: Reference to the page table; unused without pages.
    copies: For each copy, the array of rows, its first column, and the target
      [tile, n] in shared memory.
    where: (row, head, first token, begin, end); tokens outside [begin, end)
      are filled with zeros.
  """
  if interpreted:
    for lines, column, target in copies:
      _assign(x, table, lines, column, target, where)
    return
  scalar = plgpu.Layout.WG_SPLAT(())
  types = [
    (plgpu.RefType(), scalar, plgpu.RefType(_transforms(into.shape[-1])))
    for _, _, into in copies
  ]

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), types, [scalar] * len(where))
  )  # fmt: skip
  def copy(_, table, copies, where):
    rows.copy_rows(x, table, copies, [s.registers.item() for s in where])

  each = [(a, jnp.int32(n), b) for a, n, b in copies]
  copy(table, each, [jnp.int32(n) for n in where])


def fetch_scales(
  interpreted: bool,
  x: Source,
  table: Any,
  scales: Any,
  target: Any,
  where: tuple[Any, ...],
) -> None:
  """Starts copying a tile's scales, 4 bytes a thread.

  Args:
    interpreted: Whether to assign instead.
    x: How tokens map to pages.
    table: Reference to the page table.
    scales: `[pages * 2 * stride * size]`; for each page the scales of keys, by
      head, then those of values.
    target: [2 * tile] in shared memory.
    where: As in `fetch`; scales outside of the range are 0.
  """
  if interpreted:
    _assign_scales(x, table, scales, target, where)
    return
  scalar = plgpu.Layout.WG_SPLAT(())

  @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, [scalar] * len(where)))
  def copy(_, table, scales, into, where):
    rows.copy_scales(
      x, table, scales, into, [s.registers.item() for s in where]
    )

  copy(table, scales, target, [jnp.int32(n) for n in where])


def fetch_rectangle(
  interpreted: bool, source: Any, target: Any, where: tuple[Any, ...]
) -> None:
  """Starts copying a rectangle of a matrix.

  Args:
    interpreted: Whether to assign instead.
    source: [lines, columns].
    target: [height, width] in shared memory, rows of multiples of 16 bytes.
    where: (first line, first column, whether to read; if not, zeros are
      written).
  """
  line, column, live = where
  if interpreted:
    height, width = target.shape
    target[...] = source[pl.ds(line, height), pl.ds(column, width)]
    return
  scalar = plgpu.Layout.WG_SPLAT(())

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), [scalar] * 3))
  def copy(_, source, target, where):
    rows.copy_rectangle(source, target, [s.registers.item() for s in where])

  copy(source, target, [line, column, jnp.where(live, rows.CHUNK, 0)])


def commit(interpreted: bool) -> None:
  """Closes a group of all copies since the last commit, possibly none."""
  if interpreted:
    return

  @plgpu.inline_mgpu()
  def run(_):
    nvvm.cp_async_commit_group()

  run()


def wait(interpreted: bool, most: int) -> None:
  """Waits until at most `most` groups are in flight, then synchronizes threads.

  After it, no thread still needs what it read before.
  """
  if interpreted:
    return

  @plgpu.inline_mgpu()
  def run(_):
    nvvm.cp_async_wait_group(most)
    mgpu.utils.warpgroup_barrier()

  run()


def sync_warpgroup(interpreted: bool) -> None:
  """Synchronizes the warpgroup: all threads see stores to shared memory.

  Without the fence of `commit_smem`, which Ampere does not have.
  """
  if interpreted:
    return

  @plgpu.inline_mgpu()
  def run(_):
    mgpu.utils.warpgroup_barrier()

  run()


def warp_part(interpreted: bool, parts: int) -> Any:
  """Returns which part of a tile this warp works on."""
  if interpreted:
    return 0
  scalar = plgpu.Layout.WG_SPLAT(())

  @plgpu.inline_mgpu(
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
  )
  def run(_):
    index = mgpu.utils.warp_idx(sync=True)
    index = arith.remui(index, rows.i32(parts))
    return mgpu.FragmentedArray.splat(index, (), scalar.to_mgpu(),
                                      is_signed=True)  # fmt: skip

  return run()


def _assign(x: Source, table, lines, column, target, where):
  """The copy of rows, as the interpreter runs it."""
  row, head, first, begin, end = where
  tile, n = target.shape
  # Contiguous runs of rows; rows outside the range may read any others.
  found, step = [], tile if x.width is None else math.gcd(tile, x.size)
  for at in range(0, tile, step):
    line = row * x.size + first + at
    if x.width is not None:
      token = jnp.minimum(first + at, jnp.maximum(end - 1, 0))
      place = table[row * x.width + lax.div(token, jnp.int32(x.size))]
      line = (place * x.stride + head) * x.size
      line += lax.rem(first + at, jnp.int32(x.size))
    line = jnp.minimum(line, lines.shape[0] - step)
    found.append(lines[pl.ds(line, step), pl.ds(column, n)])
  value = found[0] if len(found) == 1 else jnp.concatenate(found)
  token = first + lax.broadcasted_iota(jnp.int32, (tile, n), 0)
  inside = (token >= begin) & (token < end)
  target[...] = jnp.where(inside, value, jnp.zeros_like(value))


def _assign_scales(x: Source, table, scales, target, where):
  """The copy of scales as the interpreter runs it."""
  row, head, first, begin, end = where
  tile = target.shape[0] // 2
  step, found = math.gcd(tile, x.size), []
  for which in range(2):
    for at in range(0, tile, step):
      token = jnp.minimum(first + at, jnp.maximum(end - 1, 0))
      place = table[row * x.width + lax.div(token, jnp.int32(x.size))]
      line = ((place * 2 + which) * x.stride + head) * x.size
      line += lax.rem(first + at, jnp.int32(x.size))
      found.append(
        scales[pl.ds(jnp.minimum(line, scales.shape[0] - step), step)]
      )
  token = first + lax.rem(
    lax.broadcasted_iota(jnp.int32, (2 * tile,), 0), jnp.int32(tile)
  )
  inside = (token >= begin) & (token < end)
  target[...] = jnp.where(inside, jnp.concatenate(found), 0.0)
