"""The kernel of packed weights for a Hopper GPU: W4A16 and W8A16.

The product is computed transposed, `y^T = W^T x^T` or `dx^T = W dy^T`, so that
weights are the left operand, which `wgmma` takes from registers: there they
are decoded and scaled, in float32, and rounded to the type of the rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gpu_memory
from kernels_pallas.quantized_matmul import mosaic_gpu_decode as decode
from kernels_pallas.quantized_matmul.mosaic_gpu_decode import TILE
from kernels_pallas.quantized_matmul.mosaic_gpu_tiling import CHUNK, Tile
from kernels_pallas.quantized_matmul.mosaic_tpu_problem import varying
from kernels_pallas.quantized_matmul.planar import PLANE, WORDS

GROUP = "group"
REGISTERS = {1: None, 2: (240, 24)}
"""Registers a thread of (a computing, the copying) warpgroup."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """Static facts of a product with a matrix.

  Attributes:
    inputs: Axis of inputs in an operand: 1 forward, 0 for the gradient.
    padded: Inputs and outputs of the matrix's arrays.
    bits: Of a code.
    group: Inputs of a scale.
    first: What code 0 stands for.
  """

  inputs: int
  padded: tuple[int, int]
  bits: int
  group: int
  first: float

  @property
  def planes(self) -> int:
    """Planes of a word."""
    return 16 // self.bits

  @property
  def block(self) -> int:
    """Inputs of a block of words."""
    return PLANE * self.planes

  @property
  def halves(self) -> int:
    """Operands that a block of words holds."""
    return self.planes // 2

  @property
  def sums(self) -> int:
    """Accumulators of a warpgroup."""
    return 1 if self.inputs == 1 else self.halves

  @property
  def kept(self) -> int:
    """Outputs, or inputs, of a warpgroup."""
    return TILE if self.inputs == 1 else self.block

  @property
  def depth(self) -> int:
    """Inputs, or outputs, of a step."""
    return self.block if self.inputs == 1 else TILE

  @property
  def steps(self) -> int:
    """Of all splits together."""
    return self.padded[1 - self.inputs] // self.depth

  @property
  def width(self) -> int:
    """Of the result."""
    return self.padded[self.inputs]

  @property
  def scales(self) -> int:
    """Of an output, in a block of words."""
    return max(1, self.block // self.group)


def multiply(
  p: Problem, t: Tile, arrays: dict[str, Any], out: Any, interpret: Any
) -> jax.Array:
  """The result [splits, rows, width], each split's sum.

  Args:
    p: The problem.
    t: Its tile, whose groups divide the width.
    arrays: x [rows, summed], rows a multiple of the tile's; codes [words,
      outputs]; scale and perhaps offset [groups, outputs].
    out: Type of the result.
    interpret: As of `plgpu.kernel`.
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
    "codes": plgpu.SMEM((t.stages, t.groups, WORDS, TILE), jnp.uint32),
    "y": plgpu.SMEM((t.groups, min(CHUNK, t.rows), TILE), out),
  }
  for name in ("scale", "offset"):
    if name in arrays:
      shape = (t.stages, t.groups, p.scales, TILE)
      found[name] = plgpu.SMEM(shape, arrays[name].dtype)
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
  """Issues the copies of a step."""
  row, column, n = place
  rows, depth = pl.ds(row * t.rows, t.rows), pl.ds(n * p.depth, p.depth)
  copy = plgpu.copy_gmem_to_smem
  copy(refs["x"].at[rows, depth], smem["x"].at[slot], barrier)
  for g in range(t.groups):
    kept = column * t.groups + g
    block, outputs = (n, kept) if p.inputs == 1 else (kept, n)
    outputs = pl.ds(outputs * TILE, TILE)
    words = pl.ds(block * WORDS, WORDS)
    copy(refs["codes"].at[words, outputs], smem["codes"].at[slot, g], barrier)
    first = lax.div(block * p.block, jnp.int32(p.group))
    scales = pl.ds(first, p.scales)
    for name in ("scale", "offset"):
      if name in refs:
        part = refs[name].at[scales, outputs]
        copy(part, smem[name].at[slot, g], barrier)


def _sums(p, t, interpreted, smem, barriers, group, count, target) -> None:
  """Sums what a warpgroup keeps, and stores it."""
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
  """Adds the products of one buffer."""
  loaded = decode.load(smem["codes"].at[slot, group], p.inputs)
  dtype, of_scales = smem["x"].dtype, smem["scale"].dtype
  narrow = decode.narrow(p.bits, p.first, dtype, of_scales)
  words = None
  if not narrow:
    words = decode.expand(loaded, p.inputs, interpreted)
  across = plgpu.Layout.WGMMA.reduce(p.inputs)

  def of_outputs(name, half):
    if name not in smem:
      return []
    each = decode.groups(p.group)
    first = half * each if p.scales > 1 else 0
    parts = [
      plgpu.load(
        smem[name].at[slot, group, first + n], layout=across, optimized=False
      )
      for n in range(each)
    ]
    return [x.astype(dtype if narrow else jnp.float32) for x in parts]

  for half in range(p.halves):
    static = p.inputs, half, p.bits, p.group, p.first
    scales = of_outputs("scale", half), of_outputs("offset", half)
    if narrow:
      w = decode.short(loaded, *static, *scales, dtype, interpreted)
    else:
      w = decode.weights(words, *static, *scales)
    w = w.astype(dtype)
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
