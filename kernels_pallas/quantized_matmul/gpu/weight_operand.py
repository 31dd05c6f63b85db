"""A GPU matmul with packed weights: its static facts, and its left operand.

The product is computed transposed, `y^T = W^T x^T` or `dx^T = W dy^T`, so that
weights are the left operand, which tensor cores read from registers: there they
are decoded, scaled and rounded to the dtype of the rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.quantized_matmul.gpu import codebook_lookup, dequantize
from kernels_pallas.quantized_matmul.gpu.dequantize import TILE
from kernels_pallas.quantized_matmul.gpu.tile_sizes import Tile
from kernels_pallas.quantized_matmul.planar import PLANE, WORDS


@dataclasses.dataclass(frozen=True)
class Problem:
  """Static facts of a product with a matrix.

  Attributes:
    inputs: Axis of inputs in an operand: 1 forward, 0 for the gradient.
    padded: Inputs and outputs of the matrix's arrays.
    bits: Bits per code.
    group: Inputs per scale.
    first: Value of code 0, if values are consecutive; else None.
    codebook: Otherwise the values of the 16 codes.
    integers: Whether rows are 8-bit codes, too, and sums int32.
  """

  inputs: int
  padded: tuple[int, int]
  bits: int
  group: int
  first: float | None
  codebook: tuple[float, ...] = ()
  integers: bool = False

  @property
  def planes(self) -> int:
    """Planes per word."""
    return 16 // self.bits

  @property
  def block(self) -> int:
    """Inputs per block of words."""
    return PLANE * self.planes

  @property
  def num_halves(self) -> int:
    """Operands per block of words."""
    return self.planes // 2

  @property
  def sums(self) -> int:
    """Accumulators per piece."""
    return 1 if self.inputs == 1 else self.num_halves

  @property
  def kept(self) -> int:
    """Outputs, or inputs, per piece."""
    return TILE if self.inputs == 1 else self.block

  @property
  def depth(self) -> int:
    """Inputs, or outputs, per step."""
    return self.block if self.inputs == 1 else TILE

  @property
  def steps(self) -> int:
    """Number of steps, over all splits."""
    return self.padded[1 - self.inputs] // self.depth

  @property
  def width(self) -> int:
    """Width of the result."""
    return self.padded[self.inputs]

  @property
  def scales(self) -> int:
    """Scales per output in a block of words."""
    return max(1, self.block // self.group)


def buffers(p: Problem, t: Tile, arrays: dict[str, Any]) -> dict[str, Any]:
  """Shared memory `[stages, groups, ...]` for words, scales and offsets."""
  lead = t.stages, t.groups
  found = {"codes": plgpu.SMEM((*lead, WORDS, TILE), jnp.uint32)}
  for name in ("scale", "offset"):
    if name in arrays:
      found[name] = plgpu.SMEM((*lead, p.scales, TILE), arrays[name].dtype)
  return found


def corners(p: Problem, kept: Any, step: Any) -> tuple[dict[str, Any], Any]:
  """Returns where words, scales and offsets of a piece start.

  Args:
    p: The problem.
    kept: Index of the piece.
    step: Index of the step along the summed axis.

  Returns:
    The first line of each, and the first column of all.
  """
  block, outputs = (step, kept) if p.inputs == 1 else (kept, step)
  group = lax.div(block * p.block, jnp.int32(p.group))
  lines = {"codes": block * WORDS, "scale": group, "offset": group}
  return lines, outputs * TILE


def weights(
  p: Problem,
  interpreted: bool,
  loaded: jax.Array,
  smem: dict[str, Any],
  place: Any,
  half: int,
) -> jax.Array:
  """Returns weights [64, 64] in the dtype of the rows, in the `wgmma` layout.

  Args:
    p: The problem.
    interpreted: Whether the GPU interpreter runs it, which has no registers.
    loaded: Words of a stage and group, from `dequantize.load`.
    smem: scale and optionally offset, `[stages, groups, scales, 64]`; x.
    place: (stage, group).
    half: Which 64 inputs of a block of words.
  """
  dtype = smem["x"].dtype
  narrow = all(
    dequantize.narrow(p.bits, p.first, dtype, smem[name].dtype)
    for name in ("scale", "offset")
    if name in smem
  )
  levels = None
  if p.first is None:
    levels = codebook_lookup.entries(
      loaded, p.inputs, half, p.codebook, dtype, interpreted
    )
  across = plgpu.Layout.WGMMA.reduce(p.inputs)

  def of_outputs(name):
    if name not in smem:
      return []
    each = dequantize.groups(p.group)
    first = half * each if p.scales > 1 else 0
    parts = [
      plgpu.load(
        smem[name].at[*place, first + n], layout=across, optimized=False
      )
      for n in range(each)
    ]
    return [x.astype(dtype if narrow else jnp.float32) for x in parts]

  if levels is None and narrow:
    levels = dequantize.short(
      loaded, p.inputs, half, p.bits, p.first, dtype, interpreted
    )
  elif levels is None:
    words = dequantize.expand(loaded, p.inputs, interpreted)
    levels = dequantize.wide(words, p.inputs, half, p.bits, p.first)
  w = dequantize.scaled(
    levels if narrow else levels.astype(jnp.float32), p.inputs, p.group,
    of_outputs("scale"), of_outputs("offset"), interpreted,
  )  # fmt: skip
  return w.astype(dtype)
