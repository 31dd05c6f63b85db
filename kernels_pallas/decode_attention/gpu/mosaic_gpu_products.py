"""Products of the decoding kernel's warps, each with its part of a tile.

The GPU interpreter has no `mma`: with `interpreted` they are `jnp.dot`.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_copy as copy
from kernels_pallas.decode_attention.gpu import mosaic_gpu_codes as codes
from kernels_pallas.flash_attention.gpu import gpu_tile as tile

ROWS, WARP = 64, 16
"""Rows of a warpgroup and of a warp."""


def scores(p, interpreted, part, q, k):
  """Products of queries and keys, [64, mine]."""
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
    # By parts, since operands are registers, too.
    left = _for_each_part(p, q.at[:, pl.ds(at * many, width * many)])
    right = own.at[:, pl.ds(at, width)].transpose((1, 0))
    found = plgpu.mma(found, left, _right(p, right, 0))
  return found


def _right(p, ref, axis):
  """A right operand from shared memory, which may hold pairs of codes."""
  right = plgpu.load(ref, layout=plgpu.Layout.MMA_RHS(ref.dtype))
  if p.code is None:
    return right
  return codes.right(right, p.code, axis)


def scales(p, interpreted, part, ref, first):
  """Scales of a tile's keys, or from `keys` on of its values, [64, mine]."""
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
  return tile.spread(own, shape, 1)


def _for_each_part(p, q):
  """Queries [rows, n] as the left operand of 64 rows: warps repeat them."""
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
  """acc and the probabilities' products with values."""
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
    right = own.at[pl.ds(n * codes.K, codes.K)]
    acc = plgpu.mma(acc, left, _right(p, right, 1))
  return acc


def _lefts(e, dtype):
  """Left operands [64, 16] out of an accumulator: rounded, in its registers."""
  kind = plgpu.Layout.MMA_LHS(dtype)
  columns = e.shape[1]
  one = plgpu.ShapeDtypeStruct((ROWS, codes.K), dtype, layout=kind)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,), return_type=[one] * (columns // codes.K)
  )
  def rounded(_, values):
    values = values.astype(mgpu.utils.dtype_to_ir_type(dtype))
    layout = kind.to_mgpu()
    shape = layout.registers_shape(one.shape)
    return [
      mgpu.FragmentedArray(
        _registers=values[:, at : at + codes.K].registers.reshape(shape),
        _layout=layout,
        _is_signed=None,
      )
      for at in range(0, columns, codes.K)
    ]

  return rounded(e)


def _pairs(p, left, right, rows):
  """What each warp multiplies: its rows, of as many, and its part's keys."""
  for warp in range(ROWS // WARP):
    at = WARP * (warp if rows == ROWS else warp // p.parts)
    key = warp % p.parts * p.mine
    yield left[at : at + WARP], right[key : key + p.mine]
