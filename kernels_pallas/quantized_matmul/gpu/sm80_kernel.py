"""Packed-weight matmul kernel for Ampere, Ada and Blackwell: `mma`, `cp.async`.

Not yet run on a GPU: the interpreter checks numbers and races, ptxas for A100,
H100 and B200 registers and spills; an emulator runs its PTX
(`tests/kernels_pallas/ptx_emulator.py`).

The product is transposed as in `sm90_kernel`: `mma` takes the same left operand
from registers as `wgmma`, so the same code dequantizes weights. A block is one
warpgroup, whose four warps each hold 16 of 64 outputs (or inputs, for the
gradient) for all rows of a tile, once or twice: rows are read from shared
memory once for both. Shared memory is a ring of tiles: while one is multiplied,
the others are in flight. Several blocks per multiprocessor hide the remaining
latency.

Blackwell's own instruction (`tcgen05`) takes weights from tensor memory, an
extra step for dequantized ones; few rows do not need it, and for many rows
'auto' lets XLA dequantize the matrix first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_copy as copy
from kernels_pallas.common import gpu_copy_rows as rows
from kernels_pallas.common import gpu_memory
from kernels_pallas.quantized_matmul.gpu import dequantize, w8a8, weight_operand
from kernels_pallas.quantized_matmul.gpu.dequantize import TILE
from kernels_pallas.quantized_matmul.gpu.tile_sizes import Tile
from kernels_pallas.quantized_matmul.gpu.weight_operand import Problem
from kernels_pallas.quantized_matmul.tpu.problem import varying

DEPTH = 16
"""Terms that one `mma` sums: its K dimension."""

LINES = 16
"""Rows of x whose operand is in registers at a time."""


def multiply(
  p: Problem, t: Tile, arrays: dict[str, Any], out: Any, interpret: Any
) -> jax.Array:
  """As in `sm90_kernel`, by warps."""
  count = len(arrays["x"])
  call = plgpu.kernel(
    functools.partial(_kernel, p, t, bool(interpret)),
    out_type=varying(arrays["x"], (t.splits, count, p.width), out),
    scratch_types=[_buffers(p, t, arrays, bool(interpret))],
    grid=(count // t.rows, p.width // (t.groups * p.kept), t.splits),
    grid_names=("row", "column", "split"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name="quantized_matmul_mma" + ("" if p.inputs == 1 else "_gradient"),
    interpret=interpret,
  )
  return call(arrays)


def _buffers(p: Problem, t: Tile, arrays, interpreted) -> dict[str, Any]:
  shape, dtype = (t.stages, t.rows, p.depth), arrays["x"].dtype
  if p.integers and interpreted:
    x = plgpu.SMEM(shape, dtype)
  elif p.integers:
    x = copy.buffer((*shape[:2], p.depth // 2), jnp.int16)
  else:
    x = copy.buffer(shape, dtype)
  return {"x": x, **weight_operand.buffers(p, t, arrays)}


def _kernel(p, t, interpreted, refs, y_ref, smem):
  row, column, split = map(lax.axis_index, ("row", "column", "split"))
  start = lax.div(split * p.steps, jnp.int32(t.splits))
  count = lax.div((split + 1) * p.steps, jnp.int32(t.splits)) - start
  place = row, column, start, count

  def fetch(n):
    # Hides the indices from loop-invariant code motion: the compiler would keep
    # an address for every instruction, and spill.
    here = lax.optimization_barrier(place)
    _fetch(p, t, interpreted, refs, smem, here, n)

  for n in range(t.stages - 1):
    fetch(jnp.int32(n))

  def turn(n, sums):
    copy.wait(interpreted, t.stages - 2)
    fetch(n + t.stages - 1)
    return _step(p, t, interpreted, smem, sums, lax.rem(n, jnp.int32(t.stages)))

  zeros = plgpu.layout_cast(
    jnp.zeros((TILE, LINES), jnp.int32 if p.integers else jnp.float32),
    plgpu.Layout.WGMMA,
  )
  many = t.groups * p.sums * (t.rows // LINES)
  sums = lax.fori_loop(0, count, turn, [zeros] * many)
  copy.wait(interpreted, 0)
  for at in range(t.groups * p.sums):
    outputs = pl.ds((column * t.groups * p.sums + at) * TILE, TILE)
    for n in range(t.rows // LINES):
      total = sums[at * (t.rows // LINES) + n].astype(y_ref.dtype)
      total = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
      lines = pl.ds(row * t.rows + n * LINES, LINES)
      target = y_ref.at[split, lines, outputs]
      gpu_memory.store(target.transpose((1, 0)), total)


def _fetch(p, t, interpreted, refs, smem, place, n):
  """Starts the copies of a step; past the last one, fills with zeros."""
  row, column, start, count = place
  slot, live = lax.rem(n, jnp.int32(t.stages)), n < count
  step = start + jnp.minimum(n, count - 1)
  first = row * t.rows
  end = jnp.where(live, first + t.rows, 0)
  copy.fetch(
    interpreted, rows.Source(1, None, 1), refs["codes"],
    [(refs["x"], step * p.depth, smem["x"].at[slot])],
    (0, 0, first, first, end),
  )  # fmt: skip
  for g in range(t.groups):
    lines, outputs = weight_operand.corners(p, column * t.groups + g, step)
    for name, line in lines.items():
      if name in refs:
        target, where = smem[name].at[slot, g], (line, outputs, live)
        copy.fetch_rectangle(interpreted, refs[name], target, where)
  copy.commit(interpreted)


def _step(p, t, interpreted, smem, sums, slot):
  """Adds the products of one buffer to the sums."""
  sums, x, halves = list(sums), smem["x"].at[slot], range(p.num_halves)
  # Forward, each half of a block has its own columns of x and the same sums;
  # backward it is the other way round, and one read of x serves both.
  for part in [[half] for half in halves] if p.inputs == 1 else [halves]:
    columns = pl.ds(part[0] * TILE, TILE)
    lefts = []
    for g in range(t.groups):
      words = dequantize.load(smem["codes"].at[slot, g], p.inputs)
      if p.integers:
        lefts.append([w8a8.left(words, interpreted)])
        continue
      for half in part:
        w = weight_operand.weights(p, interpreted, words, smem, (slot, g), half)
        lefts.append(_lefts(interpreted, w))
    for n in range(t.rows // LINES):
      lines = pl.ds(n * LINES, LINES)
      if p.integers:
        rights = [w8a8.right(x.at[lines], interpreted)]
      else:
        rights = _rights(interpreted, x.at[lines, columns])
      for piece, left in enumerate(lefts):
        at = piece * (t.rows // LINES) + n
        sums[at] = _dot(interpreted, sums[at], left, rights)
  return sums


def _dot(interpreted, total, lefts, rights):
  if interpreted:
    (a,), (b,) = lefts, rights
    return total + jnp.dot(a, b, preferred_element_type=total.dtype)
  for a, b in zip(lefts, rights, strict=True):
    total = plgpu.mma(total, a, b)
  return total


def _lefts(interpreted, w):
  """Splits weights [64, 64] into left operands [64, 16], in their registers."""
  if interpreted:
    return [w]
  kind = plgpu.Layout.MMA_LHS(w.dtype)
  shapes = plgpu.Layout.WGMMA, kind, (TILE, DEPTH)
  return _cut(w, *shapes, lambda x, at: x[:, at : at + DEPTH])


def _rights(interpreted, ref):
  """Loads rows [rows, 64] from shared memory as right operands [16, rows]."""
  if interpreted:
    return [ref[...].T]
  kind = plgpu.Layout.MMA_RHS(ref.dtype)
  x = plgpu.load(ref.transpose((1, 0)), layout=kind)
  shapes = kind, kind, (DEPTH, x.shape[1])
  return _cut(x, *shapes, lambda x, at: x[at : at + DEPTH])


def _cut(x, given, kind, shape, part):
  """Slices an operand along the summed axis, relabelled as another layout: cast
  as a whole, Mosaic would keep the old layout."""
  one = plgpu.ShapeDtypeStruct(shape, x.dtype, layout=kind)
  places = range(0, TILE, DEPTH)

  @plgpu.inline_mgpu(arg_types=(given,), return_type=[one] * len(places))
  def run(_, values):
    layout = kind.to_mgpu()
    size = layout.registers_shape(shape)
    return [
      mgpu.FragmentedArray(
        _registers=part(values, at).registers.reshape(size),
        _layout=layout,
        _is_signed=None,
      )
      for at in places
    ]

  return run(x)
