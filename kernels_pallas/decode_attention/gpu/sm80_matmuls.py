"""Matmuls of the sm80 decoding kernel: each warp multiplies its part of a tile.

The GPU interpreter does not support `mma`: with `interpreted` they are
`jnp.dot`.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_copy as copy
from kernels_pallas.decode_attention.gpu import quantized_pages
from kernels_pallas.flash_attention.gpu import tile

ROWS, WARP = 64, 16
"""Rows of a warpgroup and of a warp."""


def scores(p, interpreted, part, q, k):
  """Returns products of queries and keys, [64, mine]."""
  found = tile.zeros(ROWS, p.mine)
  if interpreted:
    q, k = q[...], k[...].astype(q.dtype)
    return found + jnp.concatenate([
      jnp.dot(x, y.T, preferred_element_type=jnp.float32)
      for x, y in _pairs(p, q, k, p.rows)
    ])  # fmt: skip
  own = k.at[pl.ds(pl.multiple_of(part * p.mine, WARP), p.mine)]
  width, many = min(copy.COLUMNS, k.shape[1]), q.shape[1] // k.shape[1]
  for at in range(0, k.shape[1], width):
    # By parts, since operands are held in registers, too.
    left = _for_each_part(p, q.at[:, pl.ds(at * many, width * many)])
    right = own.at[:, pl.ds(at, width)].transpose((1, 0))
    found = plgpu.mma(found, left, _right(p, right, 0))
  return found


def _right(p, ref, axis):
  """Loads a right operand from shared memory, converting quantized codes."""
  right = plgpu.load(ref, layout=plgpu.Layout.MMA_RHS(ref.dtype))
  if p.code is None:
    return right
  return quantized_pages.right(right, p.code, axis)


def scales(p, interpreted, part, ref, first):
  """Returns scales of a tile's keys, or from `keys` on values, [64, mine]."""
  shape = ROWS, p.mine
  if interpreted:
    found = ref[first : first + p.keys]
    return jnp.concatenate([
      jnp.broadcast_to(x, (WARP, p.mine))
      for _, x in _pairs(p, jnp.zeros(ROWS), found, ROWS)
    ])  # fmt: skip
  start = pl.multiple_of(first + part * p.mine, WARP)
  own = plgpu.load(
    ref.at[pl.ds(start, p.mine)],
    layout=plgpu.Layout.WGMMA.reduce(0),
    optimized=False,
  )
  return tile.broadcast_vector(own, shape, 1)


def _for_each_part(p, q):
  """Loads queries [rows, n] as a left operand of 64 rows, repeated by warp."""
  lean = plgpu.Layout.MMA_LHS(q.dtype, m_warps=4 // p.parts)
  full = plgpu.Layout.MMA_LHS(q.dtype)
  kind = plgpu.ShapeDtypeStruct((ROWS, q.shape[1]), q.dtype, layout=full)

  @plgpu.inline_mgpu(arg_types=(lean,), return_type=kind)
  def renamed(_, x):
    shape = full.to_mgpu().registers_shape(kind.shape)
    return mgpu.FragmentedArray(
      _registers=x.registers.reshape(shape),
      _layout=full.to_mgpu(),
      _is_signed=None,
    )

  return renamed(plgpu.load(q, layout=lean))


def values(p, interpreted, part, acc, e, v):
  """Adds the products of probabilities and values to acc."""
  if interpreted:
    dtype = p.arrays["q"].dtype
    e, v = e.astype(dtype), v[...].astype(dtype)
    return acc + jnp.concatenate([
      jnp.dot(x, y, preferred_element_type=jnp.float32)
      for x, y in _pairs(p, e, v, ROWS)
    ])  # fmt: skip
  own = v.at[pl.ds(pl.multiple_of(part * p.mine, WARP), p.mine)]
  dtype = p.arrays["q"].dtype
  for n, left in enumerate(_lefts(e, dtype)):
    right = own.at[pl.ds(n * quantized_pages.K, quantized_pages.K)]
    acc = plgpu.mma(acc, left, _right(p, right, 1))
  return acc


def _lefts(e, dtype):
  """Rounds an accumulator to left operands [64, 16], in its registers."""
  kind = plgpu.Layout.MMA_LHS(dtype)
  columns = e.shape[1]
  one = plgpu.ShapeDtypeStruct((ROWS, quantized_pages.K), dtype, layout=kind)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,),
    return_type=[one] * (columns // quantized_pages.K),
  )
  def rounded(_, values):
    values = values.astype(mgpu.utils.dtype_to_ir_type(dtype))
    layout = kind.to_mgpu()
    shape = layout.registers_shape(one.shape)
    return [
      mgpu.FragmentedArray(
        _registers=values[:, at : at + quantized_pages.K].registers.reshape(
          shape
        ),
        _layout=layout,
        _is_signed=None,
      )
      for at in range(0, columns, quantized_pages.K)
    ]

  return rounded(e)


def _pairs(p, left, right, rows):
  """Yields each warp's operands: its 16 rows, and its part's keys."""
  for warp in range(ROWS // WARP):
    at = WARP * (warp if rows == ROWS else warp // p.parts)
    key = warp % p.parts * p.mine
    yield left[at : at + WARP], right[key : key + p.mine]
