"""Packed-weight matmul kernel for Hopper: W4A16 and W8A16 with `wgmma`.

Not yet run on a GPU: the interpreter checks numbers and races, ptxas for an
H100 registers and spills.

Weights are the left operand, from registers: see `weight_operand`. One
warpgroup copies, one or two dequantize and multiply.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_memory
from kernels_pallas.quantized_matmul.gpu import dequantize, weight_operand
from kernels_pallas.quantized_matmul.gpu.dequantize import TILE
from kernels_pallas.quantized_matmul.gpu.tile_sizes import CHUNK, Tile
from kernels_pallas.quantized_matmul.gpu.weight_operand import Problem
from kernels_pallas.quantized_matmul.tpu.problem import varying

GROUP = "group"
REGISTERS = {1: None, 2: (240, 24)}
"""Registers per thread of (a computing, the copying) warpgroup."""


def multiply(
  p: Problem, t: Tile, arrays: dict[str, Any], out: Any, interpret: Any
) -> jax.Array:
  """Returns the result [splits, rows, width], each split's sum.

  Args:
    p: The problem.
    t: Its tile sizes; `groups` divides the number of pieces.
    arrays: x [rows, summed], rows a multiple of the tile's; codes [words,
      outputs]; scale and optionally offset [groups, outputs].
    out: Dtype of the result.
    interpret: As in `plgpu.kernel`.
  """
  rows = len(arrays["x"])
  arrivals = 1 + t.groups * (len(arrays) - 1)
  call = plgpu.kernel(
    functools.partial(_kernel, p, t, bool(interpret)),
    out_type=varying(arrays["x"], (t.splits, rows, p.width), out),
    scratch_types=[
      _buffers(p, t, arrays, out),
      plgpu.Barrier(num_arrivals=arrivals, num_barriers=t.stages),
      plgpu.Barrier(num_arrivals=t.groups, num_barriers=t.stages),
    ],
    grid=(rows // t.rows, p.width // (t.groups * p.kept), t.splits),
    grid_names=("row", "column", "split"),
    num_threads=t.groups + 1,
    thread_name=GROUP,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name="quantized_matmul" + ("" if p.inputs == 1 else "_gradient"),
    interpret=interpret,
  )
  return call(arrays)


def _buffers(p: Problem, t: Tile, arrays, out) -> dict[str, Any]:
  dtype = arrays["x"].dtype
  swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  found = {
    "x": plgpu.SMEM((t.stages, t.rows, p.depth), dtype, transforms=swizzled),
    "y": plgpu.SMEM((t.groups, min(CHUNK, t.rows), TILE), out),
    **weight_operand.buffers(p, t, arrays),
  }
  if t.operand == "shared":
    shape = (t.groups, TILE, TILE)
    found["operand"] = plgpu.SMEM(shape, dtype, transforms=swizzled)
  return found


def _kernel(p, t, interpreted, refs, y_ref, smem, full, free):
  group = lax.axis_index(GROUP)
  row, column, split = map(lax.axis_index, ("row", "column", "split"))
  start = lax.div(split * p.steps, jnp.int32(t.splits))
  count = lax.div((split + 1) * p.steps, jnp.int32(t.splits)) - start
  registers = REGISTERS.get(t.groups)

  @pl.when(group < t.groups)
  def _compute():
    if registers is not None:
      plgpu.set_max_registers(registers[0], action="increase")
    places = y_ref.at[split, pl.ds(row * t.rows, t.rows)]
    columns = (column * t.groups + group) * p.kept
    _sums(p, t, interpreted, smem, (full, free), group, count,
          (places, columns))  # fmt: skip

  @pl.when(group == t.groups)
  def _copy():
    if registers is not None:
      plgpu.set_max_registers(registers[1], action="decrease")

    def turn(n, carry):
      slot = lax.rem(n, jnp.int32(t.stages))

      @pl.when(n >= t.stages)
      def _wait():
        plgpu.barrier_wait(free.at[slot])

      _fetch(p, t, refs, smem, full.at[slot], slot, (row, column, start + n))
      return carry

    lax.fori_loop(0, count, turn, None)


def _fetch(p, t, refs, smem, barrier, slot, place) -> None:
  """Starts the copies of a step."""
  row, column, n = place
  rows, depth = pl.ds(row * t.rows, t.rows), pl.ds(n * p.depth, p.depth)
  copy = plgpu.copy_gmem_to_smem
  copy(refs["x"].at[rows, depth], smem["x"].at[slot], barrier)
  for g in range(t.groups):
    lines, outputs = weight_operand.corners(p, column * t.groups + g, n)
    for name, line in lines.items():
      if name in refs:
        target = smem[name].at[slot, g]
        height = pl.ds(line, target.shape[0])
        copy(refs[name].at[height, pl.ds(outputs, TILE)], target, barrier)


def _sums(p, t, interpreted, smem, barriers, group, count, target) -> None:
  """Computes a warpgroup's sums and stores them."""
  full, free = barriers

  def run(*sums):
    def turn(n, carry):
      slot = lax.rem(n, jnp.int32(t.stages))
      plgpu.barrier_wait(full.at[slot])
      _step(p, interpreted, smem, sums, group, slot)
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(free.at[slot])
      return carry

    lax.fori_loop(0, count, turn, None)
    return [total[...] for total in sums]

  accumulator = plgpu.ACC((TILE, t.rows), jnp.float32)
  found = pl.run_scoped(run, *[accumulator] * p.sums)
  (places, columns), buffer = target, smem["y"].at[group]
  size = min(CHUNK, t.rows)
  for i, total in enumerate(found):
    here = pl.ds(columns + i * TILE, TILE)
    for at in range(0, t.rows, size):
      part = total[:, at : at + size].astype(buffer.dtype)
      part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
      gpu_memory.store(buffer.transpose((1, 0)), part)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(buffer, places.at[pl.ds(at, size), here])
      plgpu.wait_smem_to_gmem(0)


def _step(p, interpreted, smem, sums, group, slot) -> None:
  """Adds the products of one buffer to the sums."""
  loaded = dequantize.load(smem["codes"].at[slot, group], p.inputs)
  for half in range(p.num_halves):
    w = weight_operand.weights(
      p, interpreted, loaded, smem, (slot, group), half
    )
    x, total = smem["x"].at[slot], sums[0]
    if p.inputs == 1:
      x = x.at[:, pl.ds(half * TILE, TILE)]
    else:
      total = sums[half]
    if "operand" in smem:
      operand = smem["operand"].at[group]
      operand[...] = w
      plgpu.commit_smem()
      plgpu.wgmma(total, operand, x.transpose((1, 0)))
      plgpu.wgmma_wait(0)
    else:
      plgpu.wgmma(total, w, x.transpose((1, 0)))
