"""W8A8 on GPUs: products of 8-bit codes, summed in int32.

A word of `planar.in_words` holds four codes of an output, which `mma` sums as
neighbours, whichever inputs they belong to: so the codes of the rows are
permuted to that order, and words are left operands as stored except for their
signs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Int8

from kernels_pallas.common.gpu_copy_rows import i32
from kernels_pallas.quantized_matmul.gpu import dequantize
from kernels_pallas.quantized_matmul.gpu.dequantize import TILE
from kernels_pallas.quantized_matmul.planar import PLANE, WORDS

SIGNS = 0x80808080
"""Sign bits of a word's codes, which `planar.in_words` flips."""


def ordered(codes: Int8[Array, "B I"]) -> Int8[Array, "B I"]:
  """Permutes the codes of rows to the words' order, by blocks of 64 inputs."""
  apart = codes.reshape(len(codes), -1, 2, WORDS, PLANE // WORDS)
  return apart.transpose(0, 1, 3, 4, 2).reshape(codes.shape)


def left(words: jax.Array, interpreted: bool) -> jax.Array:
  """Returns codes int8 [64 outputs, 64] of words from `dequantize.load`."""
  if interpreted:
    each = [(words >> 8 * n) & 0xFF for n in range(4)]
    codes = jnp.stack(each, axis=1).reshape(TILE, TILE).T
    return (codes.astype(jnp.int32) - 128).astype(jnp.int8)
  kind = plgpu.Layout.MMA_LHS(jnp.int8)

  @plgpu.inline_mgpu(
    arg_types=(dequantize.words_layout(1),),
    return_type=plgpu.ShapeDtypeStruct((TILE, TILE), jnp.int8, layout=kind),
  )
  def renamed(_, x):
    word = ir.IntegerType.get_signless(32)
    four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    signs = i32(SIGNS - 2**32)
    # Indices: quarter of the words, and eighth of a warp for rows.
    found = []
    for n, m in np.ndindex(WORDS // 4, 2):
      codes = mgpu.utils.bitcast(x.registers[n, 0, 0, 0, m, 0, 0], word)
      found.append(mgpu.utils.bitcast(arith.xori(codes, signs), four))
    return _array(found, kind)

  return renamed(words)


def right(ref: Any, interpreted: bool) -> jax.Array:
  """Returns codes int8 [64, rows] of rows of pairs, int16 [rows, 32]."""
  if interpreted:
    return ref[...].T
  pairs = plgpu.Layout.MMA_RHS(jnp.int16)
  kind = plgpu.Layout.MMA_RHS(jnp.int8)
  x = plgpu.load(ref.transpose((1, 0)), layout=pairs)

  @plgpu.inline_mgpu(
    arg_types=(pairs,),
    return_type=plgpu.ShapeDtypeStruct(
      (TILE, x.shape[1]), jnp.int8, layout=kind
    ),
  )
  def renamed(_, x):
    four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    each = [mgpu.utils.bitcast(y, four) for y in x.registers.flat]
    return _array(each, kind, (TILE, x.shape[1]))

  return renamed(x)


def _array(registers, kind, shape=(TILE, TILE)):
  held = np.empty(len(registers), dtype=object)
  held[:] = registers
  layout = kind.to_mgpu()
  return mgpu.FragmentedArray(
    _registers=held.reshape(layout.registers_shape(shape)),
    _layout=layout,
    _is_signed=True,
  )
