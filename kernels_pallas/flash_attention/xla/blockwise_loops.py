"""Tiles of queries and keys in loops of the program: memory linear in length.

For sequences too long for `unrolled`. The outer loop runs over query tiles and
the inner one over the key tiles of which they may see any, from the table of
`mask_blocks`; only tiles that are partly visible pay for the mask. A tile's
scores are the largest temporary. The backward pass is one sweep (5 matmuls a
tile), with dk and dv as carries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels_pallas.flash_attention import tiles
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.masks import cut, intervals


class _Table(NamedTuple):
  """What is visited, for each tile of queries.

  Fields: entries [q tiles, w], 4 times the tile of keys plus its class;
  counts [q tiles], how many of them; kinds, the classes that may occur.
  """

  entries: Any
  counts: Any
  kinds: frozenset[int]


def forward(spec: Spec, x: Operands) -> tuple[Array, Array]:
  """The output [B, K, G, T, Hv] and log-sum-exp [B, K, G, T], grouped."""
  T, S = x.q.shape[3], x.k.shape[2]
  bq, bk = min(spec.blocks.q, T), min(spec.blocks.k, S)
  table = _table(spec, x)
  x = _padded(spec, x)

  def row(carry, step):
    i, entries, count = step
    rows = (i * bq, bq)

    def tile(n, state):
      keys = (entries[n] // 4 * bk, bk)

      def attend(seen):
        return tiles.attend(spec, x, rows, keys, seen)

      seen = lambda: tiles.visible(x, T, S, rows, keys)  # noqa: E731
      new = _by_class(table.kinds, entries[n] % 4, seen, attend)
      return tiles.merge(state, new)

    state = jax.lax.fori_loop(0, count, tile, tiles.nothing(x, bq))
    return carry, tiles.finish(state, x.sinks)

  _, (o, lse) = jax.lax.scan(row, None, _steps(table))
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
    i, entries, count = step
    rows = (i * bq, bq)
    block = jax.tree.map(lambda c: cut(c, 3, *rows), cotangents)

    def tile(n, carry):
      dq, dk, dv, dbias = carry
      keys = (entries[n] // 4 * bk, bk)

      def gradients(seen):
        return tiles.tile_gradients(spec, x, rows, keys, seen, block)

      seen = lambda: tiles.visible(x, T, S, rows, keys)  # noqa: E731
      parts = _by_class(table.kinds, entries[n] % 4, seen, gradients)
      dk = tiles.add_at(dk, parts[1], (2, keys))
      dv = tiles.add_at(dv, parts[2], (2, keys))
      if dbias is not None:
        dbias = tiles.add_at(dbias, parts[3], (3, rows), (4, keys))
      return dq + parts[0], dk, dv, dbias

    B, K, G, _, H = x.q.shape
    dq = tiles.filled(x, (B, K, H, G, bq))
    dq, *carry = jax.lax.fori_loop(0, count, tile, (dq, *carry))
    return tuple(carry), jnp.moveaxis(dq, 2, 4)

  dbias = None if x.bias is None else tiles.filled(x, x.bias.shape)
  sums = (tiles.filled(x, x.k.shape), tiles.filled(x, x.v.shape), dbias)
  (dk, dv, dbias), dq = jax.lax.scan(row, sums, _steps(table))
  if dbias is not None:
    dbias = dbias[..., : shapes.bias.shape[3], : shapes.bias.shape[4]]
  return _unstack(dq, T), dk[:, :, :S], dv[:, :, :S], dbias


def _table(spec: Spec, x: Operands) -> _Table:
  """The tiles of keys of which any query of a tile, in any row, sees any."""
  T, S = x.q.shape[3], x.k.shape[2]
  bq, bk = min(spec.blocks.q, T), min(spec.blocks.k, S)
  found = intervals.rows(x.mask, T, S)
  classes = intervals.classes(found, T, S, bq, bk)
  static = isinstance(classes, np.ndarray)
  xp = np if static else jnp
  some = (classes != intervals.EMPTY).any(0)
  full = (classes == intervals.FULL).all(0)
  classes = xp.where(some, intervals.PARTIAL, intervals.EMPTY)
  classes = xp.where(full, intervals.FULL, classes)
  counts = some.sum(-1).astype(np.int32)
  kinds = np.unique(classes[some]) if static else (1, 2)
  wide = max(1, int(counts.max())) if static else classes.shape[1]
  return _Table(
    intervals.table(classes, wide), counts, frozenset(map(int, kinds))
  )


def _steps(table: _Table) -> tuple[Array, Array, Array]:
  """What a scan over tiles of queries runs over."""
  lines = np.arange(len(table.counts), dtype=np.int32)
  return tuple(map(jnp.asarray, (lines, table.entries, table.counts)))


def _by_class(
  kinds: frozenset[int],
  kind: Array,
  seen: Callable[[], Array],
  run: Callable[[Array | None], Any],
) -> Any:
  """`run` of what is visible in a tile, None where that is everything."""
  if kinds == {intervals.FULL}:
    return run(None)
  if intervals.FULL not in kinds:
    return run(seen())
  return jax.lax.cond(
    kind == intervals.FULL, lambda: run(None), lambda: run(seen())
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
