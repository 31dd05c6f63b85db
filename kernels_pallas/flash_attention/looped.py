"""Tiles of queries and keys in loops of the program: memory linear in length.

For sequences too long for `unrolled`. The outer loop runs over query tiles and
the inner one over the key tiles that they may see; a tile's scores are the
largest temporary. The backward pass is one sweep (5 matmuls a tile), with dk
and dv as carries.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels_pallas.flash_attention import tiles
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.masks import cut


def forward(spec: Spec, x: Operands) -> tuple[Array, Array]:
  """The output [B, K, G, T, Hv] and log-sum-exp [B, K, G, T], grouped."""
  T, S = x.q.shape[3], x.k.shape[2]
  bq, bk = min(spec.blocks.q, T), min(spec.blocks.k, S)
  table = _table(spec, x)
  x = _padded(spec, x)

  def row(carry, step):
    i, lo, hi = step
    rows = (i * bq, bq)

    def tile(j, state):
      new = tiles.attend(spec, x, T, S, rows, (j * bk, bk))
      return tiles.merge(state, new)

    state = jax.lax.fori_loop(lo, hi, tile, tiles.nothing(x, bq))
    return carry, tiles.finish(state, x.sinks)

  _, (o, lse) = jax.lax.scan(row, None, table)
  return _unstack(o, T), _unstack(lse, T)


def backward(
  spec: Spec, x: Operands, cotangents: tiles.Cotangents
) -> tuple[Array, Array, Array, Array | None]:
  """(dq, dk, dv, dbias), grouped, in the accumulator dtype."""
  T, S, shapes = x.q.shape[3], x.k.shape[2], x
  bq, bk = min(spec.blocks.q, T), min(spec.blocks.k, S)
  table = _table(spec, x)
  x = _padded(spec, x)
  do, lse, shift = cotangents
  cotangents = tiles.Cotangents(
    _pad(do, 3, bq), _pad(lse, 3, bq, jnp.inf), _pad(shift, 3, bq)
  )

  def row(carry, step):
    i, lo, hi = step
    rows = (i * bq, bq)
    block = jax.tree.map(lambda c: cut(c, 3, *rows), cotangents)

    def tile(j, carry):
      dq, dk, dv, dbias = carry
      keys = (j * bk, bk)
      parts = tiles.tile_gradients(spec, x, T, S, rows, keys, block)
      dk = tiles.add_at(dk, parts[1], (2, keys))
      dv = tiles.add_at(dv, parts[2], (2, keys))
      if dbias is not None:
        dbias = tiles.add_at(dbias, parts[3], (3, rows), (4, keys))
      return dq + parts[0], dk, dv, dbias

    B, K, G, _, H = x.q.shape
    dq = tiles.filled(x, (B, K, H, G, bq))
    dq, *carry = jax.lax.fori_loop(lo, hi, tile, (dq, *carry))
    return tuple(carry), jnp.moveaxis(dq, 2, 4)

  dbias = None if x.bias is None else tiles.filled(x, x.bias.shape)
  sums = (tiles.filled(x, x.k.shape), tiles.filled(x, x.v.shape), dbias)
  (dk, dv, dbias), dq = jax.lax.scan(row, sums, table)
  if dbias is not None:
    dbias = dbias[..., : shapes.bias.shape[3], : shapes.bias.shape[4]]
  return _unstack(dq, T), dk[:, :, :S], dv[:, :, :S], dbias


def _table(spec: Spec, x: Operands) -> tuple[Array, Array, Array]:
  """Query tiles, and the first and last + 1 key tile that each may see."""
  T, S = x.q.shape[3], x.k.shape[2]
  bq, bk = min(spec.blocks.q, T), min(spec.blocks.k, S)
  starts = range(0, T, bq)
  ranges = [x.mask.key_range(i, min(i + bq, T), T, S) for i in starts]
  lo, hi = np.asarray(ranges, np.int32).T
  first = np.where(hi > lo, lo // bk, 0)
  last = np.where(hi > lo, -(-hi // bk), 0)
  return tuple(
    jnp.asarray(a, jnp.int32) for a in (np.arange(len(starts)), first, last)
  )


def _padded(spec: Spec, x: Operands) -> Operands:
  """The arrays padded to whole tiles; `Mask.visible` hides what is past S."""
  T, S = x.q.shape[3], x.k.shape[2]
  bq, bk = min(spec.blocks.q, T), min(spec.blocks.k, S)
  bias = x.bias
  if bias is not None:
    bias = bias if bias.shape[3] == 1 else _pad(bias, 3, bq)
    bias = bias if bias.shape[4] == 1 else _pad(bias, 4, bk)
  return x._replace(
    q=_pad(x.q, 3, bq),
    k=_pad(x.k, 2, bk),
    v=_pad(x.v, 2, bk),
    mask=x.mask.padded(-T % bq, -S % bk),
    bias=bias,
  )


def _pad(x: Array, axis: int, multiple: int, value: float = 0) -> Array:
  amount = -x.shape[axis] % multiple
  widths = [(0, amount if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value) if amount else x


def _unstack(x: Array, T: int) -> Array:
  """[tiles, B, K, G, t, ...] to [B, K, G, T, ...]."""
  x = jnp.moveaxis(x, 0, 3)
  return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :T]
