"""Arguments of the GPU kernels: padded arrays, and a table of tiles to visit.

Arrays keep the call's layout `[B, T, N, H]`: the copy engine (TMA) slices a
head out of it. The table lists the streamed tiles that each block visits, fully
visible ones first, so that a kernel is two loops, one without and one with mask
arithmetic, and no branch between them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.gpu.tile_sizes import (
  COLUMNS,
  GpuTile,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.tiles import zero_padding
from kernels_pallas.flash_attention.tpu.problem import pad, varying
from kernels_pallas.masks import intervals

QUERIES, KEYS = 1, 2
"""Axes of `intervals.tile_classes`: which side is streamed."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """Static facts of a kernel and its arrays, by name.

  Attributes:
    spec: Static part of the call.
    tile: Sizes of the kernel.
    streamed: `QUERIES` or `KEYS`.
    dims: (B, N, K, T, S, H, Hv), padded.
    rows: Names of the rows of `arrays['rows']`, mask arrays of queries.
    columns: Names of the rows of `arrays['columns']`, mask arrays of keys.
    kinds: Classes of tiles that occur, without EMPTY.
    wide: Most tiles that a line visits.
    visited: Upper bound on the tiles that all lines of a head visit.
    work: Number of tiles that each line visits, [B or 1, lines].
    arrays: q, k, v, table, and if needed rows, columns, sinks, seed.
  """

  spec: Spec
  tile: GpuTile
  streamed: int
  dims: tuple[int, ...]
  rows: tuple[str, ...]
  columns: tuple[str, ...]
  kinds: tuple[int, ...]
  wide: int
  visited: int
  work: Any
  arrays: dict[str, Any]

  @property
  def group(self) -> int:
    """Query heads per key head."""
    return self.dims[1] // self.dims[2]

  @property
  def heads(self) -> int:
    """Heads with their own lines: those of the stationary side."""
    return self.dims[1 if self.streamed == KEYS else 2]

  @property
  def walks(self) -> int:
    """How often a line is traversed: once per query head of a key head."""
    return 1 if self.streamed == KEYS else self.group

  @property
  def lines(self) -> int:
    """Number of blocks of rows along the stationary side."""
    return self.dims[3 if self.streamed == KEYS else 4] // self.tile.rows

  def cost(self, matmuls: int) -> pl.CostEstimate:
    """Estimates a kernel with `matmuls` a tile, each half as wide as H + Hv."""
    B, N, _, T, S, H, Hv = self.dims
    pairs = B * N * self.tile.rows * self.tile.streamed * self.visited
    size = self.arrays["q"].dtype.itemsize
    stays = B * N * (T if self.streamed == KEYS else S)
    return pl.CostEstimate(
      flops=matmuls * pairs * (H + Hv),
      transcendentals=pairs,
      bytes_accessed=(stays + pairs // self.tile.rows) * (H + Hv) * size,
    )


def prepare(spec: Spec, x: Operands, tile: GpuTile, streamed: int) -> Problem:
  """Prepares the problem of a kernel that streams one side.

  Args:
    spec: Static part of the call.
    x: Arrays of the call.
    tile: Sizes of the kernel.
    streamed: `QUERIES` or `KEYS`.
  """
  T, S = x.q.shape[1], x.k.shape[1]
  bq, bk = tile.rows, tile.streamed
  if streamed == QUERIES:
    bq, bk = bk, bq
  found = intervals.mask_intervals(x.mask, T, S)
  classes = intervals.tile_classes(found, T, S, bq, bk)
  wide = intervals.max_visited(found, T, S, bq, bk, streamed)
  keys, queries = x.mask.valid_keys(), x.mask.valid_queries()
  # Padding may contain anything, even NaN, and 0 * NaN would reach the output.
  arrays = {
    "q": padded(zero_padding(x.q, queries), bq),
    "k": padded(zero_padding(x.k, keys), bk),
    "v": padded(zero_padding(x.v, keys), bk),
    "sinks": None if x.sinks is None else x.sinks.astype(jnp.float32),
    "seed": None if x.seed is None else _seed(x.seed),
  }
  kinds, visited = (intervals.FULL, intervals.PARTIAL), None
  if isinstance(classes, np.ndarray):
    kinds = tuple(kind for kind in kinds if np.any(classes == kind))
    visited = int((classes[0] != intervals.EMPTY).sum())
  tiles = classes if streamed == KEYS else classes.swapaxes(1, 2)
  arrays["table"] = _table(tiles, wide)
  rows, columns = {}, {}
  if intervals.PARTIAL in kinds:
    rows, columns = _mask_arrays(found, bq, bk)
  arrays["rows"], arrays["columns"] = _stack(rows), _stack(columns)
  (B, T, N, H), (_, S, K, Hv) = arrays["q"].shape, arrays["v"].shape
  return Problem(
    spec=spec,
    tile=tile,
    streamed=streamed,
    dims=(B, N, K, T, S, H, Hv),
    rows=tuple(rows),
    columns=tuple(columns),
    kinds=kinds,
    wide=wide,
    visited=tiles.shape[1] * wide if visited is None else visited,
    work=(tiles != intervals.EMPTY).sum(-1),
    arrays={k: v for k, v in arrays.items() if v is not None},
  )


def output_types(p: Problem) -> list[jax.ShapeDtypeStruct]:
  """Types of a forward kernel's results: o [B, T, N, Hv], lse [B, N, T]."""
  (B, N, _, T, _, _, Hv), q = p.dims, p.arrays["q"]
  return [
    varying(q, (B, T, N, Hv), p.spec.output or q.dtype),
    varying(q, (B, N, T), jnp.float32),
  ]


def padded(x: jax.Array, tokens: int) -> jax.Array:
  """Pads [B, T, N, H] to multiples of `tokens` and of `COLUMNS` with zeros."""
  return pad(pad(x, 1, tokens), 3, COLUMNS)


def _table(tiles: Any, wide: int) -> jax.Array:
  """Flat; per line: number of FULL, of PARTIAL tiles, then their indices."""
  xp = np if isinstance(tiles, np.ndarray) else jnp
  # FULL is the largest class and EMPTY the smallest.
  order = xp.argsort(
    -tiles, axis=-1, **({"kind": "stable"} if xp is np else {})
  )
  full = (tiles == intervals.FULL).sum(-1, keepdims=True)
  partial = (tiles == intervals.PARTIAL).sum(-1, keepdims=True)
  table = xp.concatenate([full, partial, order[..., :wide]], axis=-1)
  return jnp.asarray(table.reshape(-1), jnp.int32)


def _mask_arrays(found, bq: int, bk: int):
  """Returns the mask's arrays [B or 1, T] and [B or 1, S], by name."""
  rows, columns = intervals.tile_arrays(found)
  # Padding: no interval contains coordinate -1, or anything before 0.
  rows = {
    k: pad(jnp.asarray(v), 1, bq, -1 if k == "segment" else 0)
    for k, v in rows.items()
  }
  columns = {
    k: pad(jnp.asarray(v), 1, bk, -2 if k == "segment" else -1)
    for k, v in columns.items()
  }
  return rows, columns


def _stack(named: dict[str, Any]) -> jax.Array | None:
  if not named:
    return None
  return jnp.stack(jnp.broadcast_arrays(*named.values()), 1).astype(jnp.int32)


def _seed(seed: Any) -> jax.Array:
  seed = jnp.asarray(seed).astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(seed, jnp.int32).reshape(1)
