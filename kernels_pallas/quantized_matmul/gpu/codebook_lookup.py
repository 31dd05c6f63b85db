"""Codebook lookup of packed weights, in a GPU's registers.

An entry has 16 bits, in the activations' dtype. The low bytes of all 16 entries
are in four registers, the high bytes in four more. `prmt` selects four bytes
from two registers by four 4-bit selectors, of which 3 bits count: two `prmt`
cover all entries, and a third chooses between them by the codes' last bit. So
three instructions look up one byte of four entries.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels_pallas.common.gpu_copy_rows import i32
from kernels_pallas.quantized_matmul.gpu import dequantize
from kernels_pallas.quantized_matmul.gpu.dequantize import TILE

BITS = 4


def entries(
  words: jax.Array,
  inputs: int,
  half: int,
  codebook: tuple[float, ...],
  dtype: Any,
  interpreted: bool,
) -> jax.Array:
  """Looks up 16-bit entries [64, 64] of planes 2 half and 2 half + 1 of words.

  Args:
    words: From `dequantize.load`.
    inputs: The operand's axis of inputs.
    half: Which 64 inputs of a block.
    codebook: 16 numbers, rounded to `dtype`.
    dtype: bfloat16 or float16.
    interpreted: Whether the GPU interpreter runs it, which has no registers.
  """
  if interpreted:
    return _chosen(words, inputs, half, codebook, dtype)
  kind = plgpu.ShapeDtypeStruct((TILE, TILE), dtype, layout=plgpu.Layout.WGMMA)

  @plgpu.inline_mgpu(
    arg_types=(dequantize.words_layout(inputs),), return_type=kind
  )
  def looked_up(_, x):
    layout = plgpu.Layout.WGMMA.to_mgpu()
    pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    found = np.empty(layout.registers_shape((TILE, TILE)), dtype=object)
    tables = _tables(codebook, dtype)
    codes = _codes_forward if inputs == 1 else _codes_back
    # Four codes at a time, for two registers of the result.
    for where, selector, picks in codes(x, half, found.shape):
      low, high = (_pick(table, selector) for table in tables)
      for at, pick in zip(where, picks, strict=True):
        both = mgpu.utils.prmt(low, high, i32(pick))
        found[at] = mgpu.utils.bitcast(both, pair)
    return mgpu.FragmentedArray(
      _registers=found, _layout=layout, _is_signed=None
    )

  return looked_up(words)


def _chosen(words, inputs, half, codebook, dtype):
  """The lookup as the interpreter runs it."""
  codes = dequantize.interpreted_codes(words, inputs, half, BITS)
  found = jnp.zeros(codes.shape, dtype)
  for code, entry in enumerate(codebook):
    found = jnp.where(codes == code, jnp.asarray(entry, dtype), found)
  return found


def _codes_forward(x, half, shape):
  """A word's planes are in one thread, both neighbours in one register: yields
  codes (plane 0, plane 1) of the first one, then of the second."""
  for at in np.ndindex(shape):
    if at[1] >= shape[1] // 2:
      continue
    word = _bits(x.registers[dequantize.source(at, 1)])
    selector = mgpu.utils.prmt(word, word, i32(0x4420 + 0x11 * half))
    other = (at[0], at[1] + shape[1] // 2, *at[2:])
    yield (at, other), selector, (0x6240, 0x7351)


def _codes_back(x, half, shape):
  """Yields codes of a register, as in `dequantize.neighbours`, then another."""
  found = dequantize.neighbours(half, BITS)

  def codes(at):
    both = found(x.registers[at])
    return arith.ori(both, arith.shrui(both, i32(16 - BITS)))

  places = list(np.ndindex(shape))
  for first, second in zip(places[::2], places[1::2], strict=True):
    # Bytes 0 of both; the upper bits are ignored.
    selector = mgpu.utils.prmt(codes(first), codes(second), i32(0x5140))
    yield (first, second), selector, (0x5140, 0x7362)


def _tables(codebook, dtype):
  """Returns low and high bytes of the entries, four registers each."""
  entry_bytes = np.asarray(codebook, dtype).view(np.uint8).reshape(4, 4, 2)
  words = np.ascontiguousarray(entry_bytes.transpose(2, 0, 1)).view(np.int32)
  return [[i32(int(word)) for word in table[:, 0]] for table in words]


def _pick(table, selector):
  """Looks up a byte of each of four entries, for codes in the low 16 bits."""
  within = arith.andi(selector, i32(0x7777))
  lower, upper = (mgpu.utils.prmt(*table[n : n + 2], within) for n in (0, 2))
  which = arith.andi(arith.shrui(selector, i32(1)), i32(0x4444))
  return mgpu.utils.prmt(lower, upper, arith.ori(which, i32(0x3210)))


def _bits(register):
  return mgpu.utils.bitcast(register, ir.IntegerType.get_signless(32))
