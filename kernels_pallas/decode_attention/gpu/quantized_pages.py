"""Dequantization of KV pages into `mma` operands, in registers.

A code is a byte. `ldmatrix` reads shared memory as pairs of codes: a thread
then holds four adjacent dims of a token's key, or two adjacent dims of two
tokens' values. `mma` expects pairs of dims that are 8 apart, and pairs of
tokens. A product does not depend on the order of dims as long as both sides
agree, so queries are permuted before the kernel (`for_keys`) and outputs after
it (`from_values`), and no byte moves between threads.

An int8 code c becomes 2^23 + 128 + c in float32 by inserting a byte, and the
constant is subtracted. A float8_e4m3fn becomes a float16 divided by 256 by
moving bits, subnormal numbers included, which `factor` compensates in the
scales. Both are exact in bfloat16, the operands' dtype: float16 could not
represent probabilities times the scales of small values.

The two NaN of float8_e4m3fn become 480 and -480. If a vector contains NaN,
`pages.quantize` makes its scale NaN, too, which propagates; if it contains an
infinity, the scale is infinite and that code NaN, which reads as infinite here
and as NaN in other backends.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

K, N = 16, 8
"""K and N of one `mma`: the sizes of its right operand."""

HIGH = 0x4B000000
"""Bits of 2^23 in float32."""


def factor(dtype: Any) -> float:
  """Returns the factor that the results of `right` must be multiplied by."""
  return 1.0 if jnp.dtype(dtype) == jnp.int8 else 256.0


def for_keys(q: jax.Array) -> jax.Array:
  """Permutes queries [..., H] to the order of the keys' dims in registers."""
  x = q.reshape(*q.shape[:-1], -1, 4, 2, 2).swapaxes(-3, -2)
  return x.reshape(q.shape)


def from_values(o: jax.Array) -> jax.Array:
  """Permutes outputs [..., Hv] back to the order of the values' dims."""
  x = o.reshape(*o.shape[:-1], -1, 2, N).swapaxes(-2, -1)
  return x.reshape(o.shape)


def right(pairs: jax.Array, code: Any, axis: int) -> jax.Array:
  """Converts pairs of codes to a bfloat16 right operand.

  Args:
    pairs: int16, in the layout of a right operand.
    code: Dtype of the codes.
    axis: Axis along which codes are paired: 0 for keys [H / 2, n], 1 for values
      [n, Hv / 2].
  """
  shape = tuple(n * (1 + (i == axis)) for i, n in enumerate(pairs.shape))
  source = plgpu.Layout.MMA_RHS(pairs.dtype)
  layout = plgpu.Layout.MMA_RHS(jnp.bfloat16)
  kind = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=layout)

  @plgpu.inline_mgpu(arg_types=(source,), return_type=kind)
  def convert(_, x):
    element = ir.BF16Type.get()
    zero = arith.constant(element, ir.FloatAttr.get(element, 0.0))
    found = mgpu.FragmentedArray.splat(zero, shape, layout.to_mgpu())
    decode = _int8 if jnp.dtype(code) == jnp.int8 else _float8
    for k in range(0, x.shape[0], K):
      for n in range(0, x.shape[1], N):
        words = [
          mgpu.utils.bitcast(r, _type(32))
          for r in x[k : k + K, n : n + N].registers.flatten()
        ]
        for i in range(2):
          if axis == 0:
            # Each register is one operand: bytes 0, 1 and 2, 3.
            picked = [(words[i], (0, 1)), (words[i], (2, 3))]
            at = 2 * k + i * K, n
          else:
            # Each byte of a pair belongs to one operand: two tokens, twice.
            picked = [(word, (i, i + 2)) for word in words]
            at = k, 2 * n + i * N
          small = found[at[0] : at[0] + K, at[1] : at[1] + N]
          registers = [decode(w, where) for w, where in picked]
          found[at[0] : at[0] + K, at[1] : at[1] + N] = mgpu.FragmentedArray(
            _registers=np.array(registers, dtype=object).reshape(
              small.registers.shape
            ),
            _layout=small.layout,
            _is_signed=None,
          )
    return found

  return convert(pairs)


def _int8(word, where):
  """Converts two bytes of a word to a pair of bfloat16."""
  word = arith.xori(word, _i32(0x80808080))
  bias = arith.constant(ir.F32Type.get(), 2.0**23 + 128)
  values = [
    arith.subf(
      mgpu.utils.bitcast(_prmt(word, HIGH, 0x7440 | n), ir.F32Type.get()), bias
    )
    for n in where
  ]
  return _packed(*values)


def _float8(word, where):
  """Converts two bytes of a word to a pair of bfloat16, divided by 256."""
  low, high = where
  # Each byte becomes the upper byte of a half: sign, 4 bits, 3 bits, 8 zeros.
  x = _prmt(word, 0, high << 12 | 0x0404 | low << 4)
  sign = arith.andi(x, _i32(0x80008000))
  rest = arith.shrui(arith.andi(x, _i32(0x7F007F00)), _i32(1))
  pair = mgpu.utils.bitcast(
    arith.ori(sign, rest), ir.VectorType.get((2,), ir.F16Type.get())
  )
  values = [
    arith.extf(
      ir.F32Type.get(),
      llvm.extractelement(pair, _i32(n)),
    )
    for n in range(2)
  ]
  return _packed(*values)


def _packed(low, high):
  word = llvm.inline_asm(
    _type(32), [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"
  )
  kind = ir.VectorType.get((2,), ir.BF16Type.get())
  return mgpu.utils.bitcast(word, kind)


def _prmt(word, other, selector):
  """Selects bytes of a word (0 to 3) and of a constant (4 to 7)."""
  return llvm.inline_asm(
    _type(32),
    [word, _i32(other)],
    f"prmt.b32 $0, $1, $2, {selector:#x};",
    "=r,r,r",
  )


def _type(bits):
  return ir.IntegerType.get_signless(bits)


def _i32(value: int):
  value -= (value >= 2**31) << 32
  return arith.constant(_type(32), value)
