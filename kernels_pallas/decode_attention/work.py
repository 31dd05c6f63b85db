"""A call as a list of pieces of work of one shape, for any lengths of rows.

An item is a few neighbouring tokens of one row, which share a reading of its
keys; a row of one new token is one item, a prompt is many. The G query heads
of a key head are packed with the tokens into the rows of one matrix, `M =
queries x G`, so that a key that was read is used for all of them. The keys of
an item are cut into blocks, and its blocks into `splits` runs: an entry is
one run of one item. There are as many items as the lengths may need at most;
entries that are left over have no blocks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.decode_attention import ragged
from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.decode_attention.spec import Blocks, Spec
from kernels_pallas.sequence_parallel.combine import combine

FULL = 128
"""Rows of a matmul that are worth filling with tokens of one row."""


@dataclasses.dataclass(frozen=True)
class Work:
  """Entries, all int32 `[E]`, E = splits x items, items fastest.

  Attributes:
    row: Whose keys.
    position: Of the first token.
    count: Tokens.
    low: First key that any of them sees.
    high: The key after the last that any of them sees.
    base: First key of block 0 of the item: where a page starts.
    start, stop: Range of blocks.
  """

  row: Any
  position: Any
  count: Any
  low: Any
  high: Any
  base: Any
  start: Any
  stop: Any


@dataclasses.dataclass(frozen=True)
class Cache:
  """Memory of which each row has its own part.

  Attributes:
    k: `[B, K, S, H]`.
    v: `[B, K, S, Hv]`.
  """

  k: Any
  v: Any

  @property
  def size(self) -> int:
    """Tokens a row."""
    return self.k.shape[2]

  @property
  def count(self) -> int:
    """Rows."""
    return self.k.shape[0]


@dataclasses.dataclass(frozen=True)
class Problem:
  """Static facts of a call, and its arrays.

  Attributes:
    spec: Static part of the call.
    group: G.
    splits: Runs of blocks of an item.
    unit: Keys that lie together: a page, or a block of a cache.
    block: Keys of a block, a whole number of units.
    q: `[items, K, M, H]`, heads of a token together.
    held: Keys and values.
    table: int32 `[R, W]`, or None for a cache.
    heads: (K, H, Hv).
    work: The entries.
  """

  spec: Spec
  group: int
  splits: int
  unit: int
  block: int
  q: Any
  held: Pages | Cache
  table: Any
  heads: tuple[int, int, int]
  work: Work

  @property
  def capacity(self) -> int:
    """Keys that a row has memory for."""
    return self.held.size * (1 if self.table is None else self.table.shape[1])


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How tokens are laid out as items.

  Attributes:
    queries: Tokens of an item.
    items: Their number.
    ends: int32 `[R]`, the item after each row's last.
  """

  queries: int
  items: int
  ends: Any


def prepare(
  spec: Spec,
  blocks: Blocks,
  q: Float[Array, "T N H"],
  held: Pages | Cache,
  rows: ragged.Rows,
) -> tuple[Problem, Tiling]:
  """The problem of a call, and what `untile` needs.

  Args:
    spec: Static part.
    blocks: Sizes, with `splits` set.
    q: Queries.
    held: Keys and values.
    rows: Whose tokens and pages they are.
  """
  T, N, H = q.shape
  heads = heads_of(held)
  K = heads[0]
  tiling = _tiling(blocks, T, N // K, rows)
  size = held.size
  if rows.table is None:
    unit = block = min(size, blocks.keys)
  else:
    width = rows.table.shape[1]
    unit, block = size, size * min(max(blocks.keys // size, 1), width)
  room = size if rows.table is None else size * rows.table.shape[1]
  cut = blocks.splits, unit, block, room
  work, tokens = _work(spec, cut, tiling, rows)
  offset = jnp.arange(tiling.queries)
  index = jnp.minimum(tokens[:, None] + offset, T - 1)
  tiles = q[index].reshape(tiling.items, tiling.queries, K, N // K, -1)
  tiles = tiles.swapaxes(1, 2).reshape(tiling.items, K, -1, H)
  return Problem(
    spec=spec,
    group=N // K,
    splits=blocks.splits,
    unit=unit,
    block=block,
    q=tiles,
    held=held,
    table=_clipped(rows.table, held.count),
    heads=heads,
    work=work,
  ), tiling


def heads_of(held: Pages | Cache) -> tuple[int, int, int]:
  """K, H and Hv of a memory."""
  if isinstance(held, Cache):
    return held.k.shape[1], held.k.shape[3], held.v.shape[3]
  _, K, _, width = held.kv.shape
  return K, held.head_dim, width - held.head_dim


def untile(
  p: Problem,
  tiling: Tiling,
  rows: ragged.Rows,
  tokens: int,
  o: Float[Array, "E K M Hv"],
  lse: Float[Array, "E K M"],
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
  """Splits combined, and tokens where they were; 0 and -inf for none's.

  Args:
    p: The problem.
    tiling: Its items.
    rows: Whose tokens they are.
    tokens: T.
    o: Normalised outputs of all entries, whose rows after the last token of
      an item may hold anything.
    lse: Their log-sum-exps.
  """
  if p.splits > 1:
    o, lse = (x.reshape(p.splits, tiling.items, *x.shape[1:]) for x in (o, lse))
    o, lse = combine(list(o.swapaxes(2, 3)), list(lse))
    o = o.swapaxes(1, 2)
  K, queries = o.shape[1], tiling.queries
  o, lse = (
    x.reshape(tiling.items, K, queries, p.group, *x.shape[3:]).swapaxes(1, 2)
    for x in (o, lse)
  )
  row, _, live = ragged.places(rows, tokens)
  since = jnp.maximum(jnp.arange(tokens) - rows.starts[row], 0)
  first = tiling.ends[row] - _tiles(rows, queries)[row]
  item = jnp.minimum(first + since // queries, tiling.items - 1)
  o, lse = (x[item, since % queries] for x in (o, lse))
  o = o.reshape(tokens, K * p.group, -1)
  lse = lse.reshape(tokens, K * p.group)
  live = live[:, None]
  return jnp.where(live[..., None], o, 0), jnp.where(live, lse, -jnp.inf)


def queries_of(blocks: Blocks, T: int, group: int, rows: ragged.Rows) -> int:
  """Tokens of an item.

  Args:
    blocks: What was asked for.
    T: Tokens.
    group: G.
    rows: Whose they are.
  """
  many = max(FULL // group, 1) if rows.kv_lens.shape[0] < T else 1
  return min(T, blocks.queries or many)


def _tiling(blocks, T, group, rows) -> Tiling:
  R = rows.kv_lens.shape[0]
  queries = queries_of(blocks, T, group, rows)
  ends = jnp.cumsum(_tiles(rows, queries)).astype(jnp.int32)
  # Each row rounds up once, and every item has a token.
  items = min(T, (T + R * (queries - 1)) // queries)
  return Tiling(queries, items, ends)


def _tiles(rows, queries) -> jax.Array:
  """Items of each row."""
  new = rows.starts[1:] - rows.starts[:-1]
  return (new + queries - 1) // queries


def _work(spec, cut, tiling, rows):
  """The entries, and the first token of each item."""
  splits, unit, block, room = cut
  starts, lens = rows.starts, rows.kv_lens
  item = jnp.arange(tiling.items, dtype=jnp.int32)
  row = ragged.ended(tiling.ends, item)
  live = row < lens.shape[0]
  row = jnp.minimum(row, lens.shape[0] - 1).astype(jnp.int32)
  before = tiling.ends[row] - _tiles(rows, tiling.queries)[row]
  since = (item - before) * tiling.queries
  new = starts[row + 1] - starts[row]
  count = jnp.where(live, jnp.clip(new - since, 0, tiling.queries), 0)
  position = lens[row] - new + since
  high = jnp.where(count > 0, jnp.clip(position + count, 0, room), 0)
  low = jnp.zeros_like(high)
  if spec.window is not None:
    low = jnp.clip(position - spec.window + 1, 0, high)
  base = low // unit * unit
  total = (high - base + block - 1) // block
  run = (total + splits - 1) // splits
  start = jnp.minimum(jnp.arange(splits)[:, None] * run, total)
  stop = jnp.minimum(start + run, total)

  def entries(x):
    x = jnp.broadcast_to(x, (splits, tiling.items)).reshape(-1)
    return x.astype(jnp.int32)

  fields = row, position, count, low, high, base, start, stop
  return Work(*map(entries, fields)), starts[row] + since


def _clipped(table, pages) -> jax.Array | None:
  """No entry leads outside the pages, though it may not be known yet."""
  return None if table is None else jnp.clip(table, 0, pages - 1)
