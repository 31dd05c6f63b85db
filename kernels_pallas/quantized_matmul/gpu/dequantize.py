"""Dequantization of packed weights in a GPU's registers; layout in `planar`.

A word holds two adjacent inputs of each of its planes, one in each half, for
one output. This matches what a thread needs for a left operand of `wgmma`, or
of four `mma`, with rows in eighths of a warp and neighbours of a row in one
register: a thread loads words and has the codes of 64 x 64 weights, forward
with outputs as rows, and for the input gradient with inputs as rows. No code
moves between threads.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels_pallas.common.gpu_copy_rows import i32
from kernels_pallas.quantized_matmul.planar import PLANE, WORDS

TILE = 64
"""Rows and columns of an operand: outputs, and inputs of two planes."""

# A code in the low bits of this float32 is exactly 2^23 + code.
_LARGE = 0x4B000000
_POWER = 2.0**23

# The same in 16 bits: (bits of the power, the power, bits of the fraction).
_MAGIC = {
  jnp.dtype(jnp.bfloat16): (0x4300, 128.0, 7),
  jnp.dtype(jnp.float16): (0x6400, 1024.0, 10),
}

# Tilings of words [16, 64] and the placement of their dims: see `TiledLayout`.
FORWARD = (((4, 64), (16,), (8,), (1,)), (-4,), (-2, -5))
GRADIENT = (
  ((16, 8), (8, 8), (4, 8), (2,)),
  (("twice", 2), -7),
  (-3, ("twice", 2), -2),
)


def load(ref: Any, inputs: int) -> jax.Array:
  """Loads words [16, 64] from shared memory, in the layout of `expand`.

  Args:
    ref: The words.
    inputs: The operand's axis of inputs.
  """
  return plgpu.load(ref, layout=words_layout(inputs), optimized=False)


@functools.cache
def words_layout(inputs: int) -> Any:
  """Returns a warpgroup's layout of words, for an operand's axis of inputs."""
  from jax.experimental.mosaic.gpu import fragmented_array as fragments

  def dims(names):
    return tuple(
      fragments.Replicated(d[1]) if isinstance(d, tuple) else d for d in names
    )

  tiles, warps, lanes = FORWARD if inputs == 1 else GRADIENT
  return plgpu.Layout.TILED(
    fragments.Tiling(tiles), dims(warps), dims(lanes), -1
  )


def expand(words: jax.Array, inputs: int, interpreted: bool) -> jax.Array:
  """Returns the word of every weight, uint32 [64, 64], in the `wgmma` layout.

  Args:
    words: [16, 64], from `load`.
    inputs: The operand's axis of inputs, two planes of 32.
    interpreted: Whether the GPU interpreter runs it, which has no registers.
  """
  if interpreted:
    each = jnp.concatenate([jnp.repeat(words, 2, axis=0)] * 2)
    return each if inputs == 0 else each.T

  @plgpu.inline_mgpu(
    arg_types=(words_layout(inputs),),
    return_type=plgpu.ShapeDtypeStruct(
      (TILE, TILE), jnp.uint32, layout=plgpu.Layout.WGMMA
    ),
  )
  def renamed(_, x):
    layout = plgpu.Layout.WGMMA.to_mgpu()
    found = np.empty(layout.registers_shape((TILE, TILE)), dtype=object)
    for at in np.ndindex(found.shape):
      register = x.registers[source(at, inputs)]
      if inputs == 1:
        register = mgpu.utils.vector_concat([register, register])
      found[at] = register
    return mgpu.FragmentedArray(
      _registers=found, _layout=layout, _is_signed=False
    )

  return renamed(words)


def source(at: tuple[int, ...], inputs: int) -> tuple[int, ...]:
  """Returns the register of the words that one of the operand's comes from.

  Args:
    at: Its index: (0, eighth of the columns, 0, 0, half of 16 rows, ...).
    inputs: The operand's axis of inputs.
  """
  eighth, half = at[1], at[4]
  if inputs == 0:
    return at
  return (eighth % (WORDS // 4), 0, 0, 0, half, 0, 0)


def wide(
  words: jax.Array, inputs: int, half: int, bits: int, first: float
) -> jax.Array:
  """Returns the codes' values, float32 [64, 64], of planes 2 half, 2 half + 1.

  Args:
    words: From `expand`.
    inputs: The axis of inputs.
    half: Which 64 inputs of a block.
    bits: Bits per code.
    first: Value of code 0; the others are consecutive.
  """
  at = _iota(words.shape, inputs)
  shift = (at & 1) * 16 + (at >> 5) * bits + 2 * half * bits
  codes = lax.shift_right_logical(words, shift.astype(jnp.uint32))
  codes = codes & jnp.uint32(2**bits - 1) | jnp.uint32(_LARGE)
  return lax.bitcast_convert_type(codes, jnp.float32) - (_POWER - first)


def narrow(bits: int, first: float | None, dtype: Any, scale: Any) -> bool:
  """Whether weights are scaled in 16 bits with a single rounding.

  True if codes are exact in 16 bits, or are looked up, and scales have the
  activations' dtype.

  Args:
    bits: Bits per code.
    first: Value of code 0; None with a codebook.
    dtype: Dtype of the activations.
    scale: Dtype of the scales, or of the offsets.
  """
  if first is None:
    return scale == dtype
  _, base, fraction = _MAGIC[jnp.dtype(dtype)]
  # Integers up to 2 base are exact.
  found = first, first + 2**bits - 1, base - first
  exact = bits <= fraction and max(map(abs, found)) <= 2 * base
  return exact and scale == dtype


def short(
  words: jax.Array,
  inputs: int,
  half: int,
  bits: int,
  first: float,
  dtype: Any,
  interpreted: bool,
) -> jax.Array:
  """Returns the codes' 16-bit values [64, 64], of planes 2 half, 2 half + 1.

  Two codes at a time: a code in the fraction bits of a power of two is exactly
  that power plus the code, and the power is subtracted.

  Args:
    words: From `load`.
    inputs, half, bits, first: As in `wide`.
    dtype: bfloat16 or float16.
    interpreted: Whether the GPU interpreter runs it, which has no registers.
  """
  base = _MAGIC[jnp.dtype(dtype)][1]
  found = _levels(words, inputs, half, bits, dtype, interpreted)
  return found - jnp.asarray(base - first, dtype)


def scaled(
  levels: jax.Array,
  inputs: int,
  group: int,
  scale: list[jax.Array],
  offset: list[jax.Array],
  interpreted: bool,
) -> jax.Array:
  """Scales weights [64, 64] in the dtype of `levels`, with a single rounding.

  Args:
    levels: The codes' values.
    inputs: The axis of inputs.
    group: Inputs per scale.
    scale: Scales of each output, [64], for each group of these inputs.
    offset: Offsets likewise, or empty.
    interpreted: Whether the GPU interpreter runs it, which has no registers.
  """
  scale = _of_group(levels.shape, inputs, group, scale)
  if not offset:
    return levels * scale
  offset = _of_group(levels.shape, inputs, group, offset)
  if levels.dtype == jnp.float32:
    return levels * scale + offset
  return _fused(levels, scale, offset, interpreted)


def interpreted_codes(
  words: jax.Array, inputs: int, half: int, bits: int
) -> jax.Array:
  """Returns codes, uint32 [64, 64], in the GPU interpreter.

  Args:
    words: From `load`.
    inputs, half, bits: As in `wide`.
  """
  each = expand(words, inputs, True)
  at = lax.broadcasted_iota(jnp.uint32, each.shape, inputs)
  shift = (at & 1) * 16 + (at >> 5) * bits + 2 * half * bits
  return (each >> shift) & (2**bits - 1)


def neighbours(half: int, bits: int) -> Callable[[Any], Any]:
  """Returns a function for a thread's codes of two words, one per 16-bit half.

  For the input gradient, where neighbours are outputs, each with its own word:
  the half of the word, and the plane, depend on the thread.

  Args:
    half: Which 64 inputs of a block.
    bits: Bits per code.
  """
  thread = mgpu.utils.thread_idx()
  odd = arith.andi(arith.shrui(thread, i32(2)), i32(1))
  upper = arith.andi(arith.shrui(thread, i32(6)), i32(1))
  halves = arith.addi(i32(0x5410), arith.muli(odd, i32(0x2222)))
  shift = arith.addi(arith.muli(upper, i32(bits)), i32(2 * half * bits))

  def codes(register):
    word = ir.IntegerType.get_signless(32)
    two = [
      mgpu.utils.bitcast(
        mgpu.utils.vector_slice(register, slice(n, n + 1)), word
      )
      for n in range(2)
    ]
    both = arith.shrui(mgpu.utils.prmt(*two, halves), shift)
    return arith.andi(both, i32((2**bits - 1) * 0x10001))

  return codes


def _levels(words, inputs, half, bits, dtype, interpreted):
  """Returns codes plus `base`, [64, 64] in 16 bits."""
  magic, base, _ = _MAGIC[jnp.dtype(dtype)]
  if interpreted:
    codes = interpreted_codes(words, inputs, half, bits)
    return codes.astype(dtype) + jnp.asarray(base, dtype)

  @plgpu.inline_mgpu(
    arg_types=(words_layout(inputs),),
    return_type=plgpu.ShapeDtypeStruct(
      (TILE, TILE), dtype, layout=plgpu.Layout.WGMMA
    ),
  )
  def decoded(_, x):
    pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    layout = plgpu.Layout.WGMMA.to_mgpu()
    found = np.empty(layout.registers_shape((TILE, TILE)), dtype=object)
    codes = neighbours(half, bits)
    for at in np.ndindex(found.shape):
      register = x.registers[source(at, inputs)]
      if inputs == 1:
        word = mgpu.utils.bitcast(register, ir.IntegerType.get_signless(32))
        shift = i32(bits * (2 * half + at[1] // 4))
        mask = i32((2**bits - 1) * 0x10001)
        both = arith.andi(arith.shrui(word, shift), mask)
      else:
        both = codes(register)
      both = arith.ori(both, i32(magic * 0x10001))
      found[at] = mgpu.utils.bitcast(both, pair)
    return mgpu.FragmentedArray(
      _registers=found, _layout=layout, _is_signed=None
    )

  return decoded(words)


def _fused(a, b, c, interpreted):
  """Returns a b + c, rounded once."""
  if interpreted:
    a, b, c = (x.astype(jnp.float32) for x in (a, b, c))
    return a * b + c
  layout = plgpu.Layout.WGMMA

  name = "bf16x2" if a.dtype == jnp.bfloat16 else "f16x2"

  @plgpu.inline_mgpu(
    arg_types=(layout,) * 3,
    return_type=plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=layout),
  )
  def run(_, *operands):
    word = ir.IntegerType.get_signless(32)
    first = operands[0]
    found = np.empty(first.registers.shape, dtype=object)
    for at in np.ndindex(found.shape):
      words = [mgpu.utils.bitcast(x.registers[at], word) for x in operands]
      done = mgpu.utils.inline_ptx(
        f"fma.rn.{name} $0, $1, $2, $3;", *words, result_types=word
      )
      found[at] = mgpu.utils.bitcast(done, first.registers[at].type)
    return mgpu.FragmentedArray(
      _registers=found, _layout=first.layout, _is_signed=None
    )

  return run(*(plgpu.layout_cast(x, layout) for x in (a, b, c)))


def _of_group(shape, inputs, group, each):
  """Broadcasts per-group vectors over outputs to the weights."""
  spread = [lax.broadcast_in_dim(x, shape, [1 - inputs]) for x in each]
  chosen = spread[0]
  if len(spread) > 1:
    at = _iota(shape, inputs)
    for n, x in enumerate(spread[1:], 1):
      chosen = jnp.where(at >= n * group, x, chosen)
  return chosen


def _iota(shape, inputs):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, inputs, layout=plgpu.Layout.WGMMA
  )


def groups(group: int) -> int:
  """Returns the number of scales for an operand's 64 inputs."""
  return max(1, 2 * PLANE // group)
