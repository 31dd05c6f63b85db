"""Work list of a decode call: pieces of one shape, for rows of any lengths.

An item is a few adjacent tokens of one row, which share one read of its keys; a
row with one new token is one item, a prompt is many. The G query heads of a key
head are packed with the tokens into the rows of one matrix, `M = queries x G`,
so that a key is read once for all of them. The keys of an item are divided into
blocks, and its blocks into `splits` runs: an entry is one run of one item. The
number of items is the most that the lengths may need; unused entries have no
blocks.
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
"""Rows of a matmul worth filling with tokens of one row."""


@dataclasses.dataclass(frozen=True)
class Work:
  """Entries, all int32 `[E]`, E = splits x items, items fastest.

  Attributes:
    row: Row whose keys are read.
    position: Position of the first token.
    count: Number of tokens.
    low: First key that any of them sees.
    high: One past the last key that any of them sees.
    base: First key of block 0 of the item: the start of a page.
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
  """A contiguous KV cache, one part for each row.

  Attributes:
    k: `[B, K, S, H]`.
    v: `[B, K, S, Hv]`.
  """

  k: Any
  v: Any

  @property
  def size(self) -> int:
    """Tokens per row."""
    return self.k.shape[2]

  @property
  def count(self) -> int:
    """Number of rows."""
    return self.k.shape[0]


@dataclasses.dataclass(frozen=True)
class Problem:
  """Static facts of a call, and its arrays.

  Attributes:
    spec: Static part of the call.
    group: G.
    splits: Runs of blocks per item.
    unit: Contiguous keys: a page, or a block of a cache.
    block: Keys per block, a whole number of units.
    q: `[items, K, M, H]`, heads of a token adjacent.
    storage: Keys and values.
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
  storage: Pages | Cache
  table: Any
  heads: tuple[int, int, int]
  work: Work

  @property
  def capacity(self) -> int:
    """Most keys of a row."""
    return self.storage.size * (
      1 if self.table is None else self.table.shape[1]
    )


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How tokens are grouped into items.

  Attributes:
    queries: Tokens per item.
    items: Number of items.
    ends: int32 `[R]`, one past each row's last item.
  """

  queries: int
  items: int
  ends: Any


def prepare(
  spec: Spec,
  blocks: Blocks,
  q: Float[Array, "T N H"],
  storage: Pages | Cache,
  rows: ragged.RaggedRows,
) -> tuple[Problem, Tiling]:
  """Returns the problem of a call, and the tiling that `untile` needs.

  Args:
    spec: Static part.
    blocks: Block sizes, with `splits` set.
    q: Queries.
    storage: Keys and values.
    rows: The rows that tokens and pages belong to.
  """
  T, N, H = q.shape
  heads = head_sizes(storage)
  K = heads[0]
  tiling = _tiling(blocks, T, N // K, rows)
  size = storage.size
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
    storage=storage,
    table=_clipped(rows.table, storage.count),
    heads=heads,
    work=work,
  ), tiling


def head_sizes(storage: Pages | Cache) -> tuple[int, int, int]:
  """Returns (K, H, Hv) of a cache or pages."""
  if isinstance(storage, Cache):
    return storage.k.shape[1], storage.k.shape[3], storage.v.shape[3]
  _, K, _, width = storage.kv.shape
  return K, storage.head_dim, width - storage.head_dim


def combine_splits(
  p: Problem,
  tiling: Tiling,
  rows: ragged.RaggedRows,
  tokens: int,
  o: Float[Array, "E K M Hv"],
  lse: Float[Array, "E K M"],
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
  """Combines splits and restores token order; 0 and -inf for unused tokens.

  Args:
    p: The problem.
    tiling: Its items.
    rows: The rows that the tokens belong to.
    tokens: T.
    o: Normalised outputs of all entries; rows after an item's last token may
      contain anything.
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
  row, _, live = ragged.token_positions(rows, tokens)
  since = jnp.maximum(jnp.arange(tokens) - rows.starts[row], 0)
  first = tiling.ends[row] - _tiles(rows, queries)[row]
  item = jnp.minimum(first + since // queries, tiling.items - 1)
  o, lse = (x[item, since % queries] for x in (o, lse))
  o = o.reshape(tokens, K * p.group, -1)
  lse = lse.reshape(tokens, K * p.group)
  live = live[:, None]
  return jnp.where(live[..., None], o, 0), jnp.where(live, lse, -jnp.inf)


def queries_per_item(
  blocks: Blocks, T: int, group: int, rows: ragged.RaggedRows
) -> int:
  """Returns the number of tokens per item.

  Args:
    blocks: Requested sizes.
    T: Number of tokens.
    group: G.
    rows: The rows that the tokens belong to.
  """
  many = max(FULL // group, 1) if rows.kv_lens.shape[0] < T else 1
  return min(T, blocks.queries or many)


def _tiling(blocks, T, group, rows) -> Tiling:
  R = rows.kv_lens.shape[0]
  queries = queries_per_item(blocks, T, group, rows)
  ends = jnp.cumsum(_tiles(rows, queries)).astype(jnp.int32)
  # Each row rounds up once, and every item has a token.
  items = min(T, (T + R * (queries - 1)) // queries)
  return Tiling(queries, items, ends)


def _tiles(rows, queries) -> jax.Array:
  """Returns the number of items of each row."""
  new = rows.starts[1:] - rows.starts[:-1]
  return (new + queries - 1) // queries


def _work(spec, cut, tiling, rows):
  """Returns the entries, and the first token of each item."""
  splits, unit, block, room = cut
  starts, lens = rows.starts, rows.kv_lens
  item = jnp.arange(tiling.items, dtype=jnp.int32)
  row = ragged.count_ends(tiling.ends, item)
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
  """Clamps entries to valid pages, since they may not be known yet."""
  return None if table is None else jnp.clip(table, 0, pages - 1)
