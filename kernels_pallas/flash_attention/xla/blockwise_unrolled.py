"""Blocks of queries unrolled by Python, each against all its keys at once.

For a few thousand tokens and for decoding. A block of queries knows its key
range before the program runs, so causal attention does half the work, and
every matmul is large. Nothing here is longer than one block of queries times
the keys. It is plain differentiable lax, so second derivatives work too.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention import tiles
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.masks import Tile, cut


def forward(spec: Spec, x: Operands) -> tuple[Array, Array]:
  """The output [B, K, G, T, Hv] and log-sum-exp [B, K, G, T], grouped."""
  T, S = x.q.shape[3], x.k.shape[2]
  parts = []
  for rows, keys in _blocks(spec, x):
    if keys[1]:
      x, parts = _in_turn(x, parts)
      seen = _visible(x, T, S, rows, keys)
      state = tiles.attend(spec, x, rows, keys, seen)
    else:
      state = tiles.nothing(x, rows[1])
    parts.append(tiles.finish(state, x.sinks))
  o, lse = zip(*parts, strict=True)
  return jnp.concatenate(o, axis=3), jnp.concatenate(lse, axis=3)


def backward(
  spec: Spec, x: Operands, cotangents: tiles.Cotangents
) -> tuple[Array, Array, Array, Array | None]:
  """(dq, dk, dv, dbias), grouped, in the accumulator dtype."""
  T, S = x.q.shape[3], x.k.shape[2]
  dtype = accumulator(x.q.dtype)
  dk, dv = jnp.zeros(x.k.shape, dtype), jnp.zeros(x.v.shape, dtype)
  dbias = None if x.bias is None else jnp.zeros(x.bias.shape, dtype)
  dqs = []
  for rows, keys in _blocks(spec, x):
    if not keys[1]:
      B, K, G, _, H = x.q.shape
      dqs.append(jnp.zeros((B, K, H, G, rows[1]), dtype))
      continue
    block = jax.tree.map(lambda c, rows=rows: cut(c, 3, *rows), cotangents)
    x, (dk, dv, dbias) = _in_turn(x, (dk, dv, dbias))
    dq, dk_part, dv_part, dbias_part = tiles.tile_gradients(
      spec, x, rows, keys, _visible(x, T, S, rows, keys), block
    )
    dqs.append(dq)
    dk = tiles.add_at(dk, dk_part, (2, keys))
    dv = tiles.add_at(dv, dv_part, (2, keys))
    if dbias is not None:
      dbias = tiles.add_at(dbias, dbias_part, (3, rows), (4, keys))
  dq = jnp.concatenate(dqs, axis=4)
  return jnp.moveaxis(dq, 2, 4), dk, dv, dbias


def _blocks(spec: Spec, x: Operands) -> Iterator[tuple[Tile, Tile]]:
  """Each block of queries and the range of keys that it may see."""
  T, S = x.q.shape[3], x.k.shape[2]
  for start in range(0, T, spec.blocks.q):
    stop = min(start + spec.blocks.q, T)
    lo, hi = x.mask.key_range(start, stop, T, S)
    yield (start, stop - start), (lo, hi - lo)


def _visible(
  x: Operands, T: int, S: int, rows: Tile, keys: Tile
) -> Array | None:
  """`tiles.visible`, or None where that is everything."""
  if x.mask.is_full_tile(rows[0], sum(rows), keys[0], sum(keys), T, S):
    return None
  return tiles.visible(x, T, S, rows, keys)


def _in_turn(x: Operands, done):
  """The same values, `x` for use after `done` has been computed.

  Blocks do not depend on each other, and XLA would hold the scores of all of
  them at the same time.
  """
  (q, k), done = jax.lax.optimization_barrier(((x.q, x.k), done))
  return x._replace(q=q, k=k), done
