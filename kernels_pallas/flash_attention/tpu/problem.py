"""Arguments of the TPU kernels: padded, transposed arrays and a visit table.

Kernels work on `[B, N, T, H]` and on transposed scores (keys in sublanes,
queries in lanes), so a value per query is a row of lanes: bounds of its visible
keys, its maximum, its log-sum-exp. A value per key is repeated over the lanes
of a vector register.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.tiles import zero_padding
from kernels_pallas.flash_attention.tpu.tile_sizes import LANES, Tile, fit
from kernels_pallas.masks import intervals

PREFETCHED = 2
"""Number of scalar prefetch arguments: the table and the dropout seed."""

VMEM_LIMIT = 100 * 2**20

Place = Callable[..., tuple[Any, ...]]
"""Maps the ids of a grid step and the table to (b, h, i, j, class)."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """Static facts of a call and its arrays, by name.

  Attributes:
    spec: Static part of the call.
    tile: Tile sizes, fitted to the lengths.
    dims: (B, N, K, T, S, H, Hv), T and S padded to whole tiles.
    lengths: (T, S), not padded.
    dtype: Accumulator dtype.
    rows: Names of the rows of `arrays['rows']`.
    columns: Names of the columns of `arrays['columns']`.
    classes: The class of every tile, NumPy or JAX, [B or 1, q tiles, k tiles].
    found: The mask's intervals.
    bias: Whether the bias varies along the keys, along the queries.
    arrays: q, k, v, and if needed rows, columns, bias, sinks, seed.
  """

  spec: Spec
  tile: Tile
  dims: tuple[int, ...]
  lengths: tuple[int, int]
  dtype: Any
  rows: tuple[str, ...]
  columns: tuple[str, ...]
  classes: Any
  found: Any
  bias: tuple[bool, bool]
  arrays: dict[str, Any]

  @property
  def group(self) -> int:
    """Query heads per key head."""
    return self.dims[1] // self.dims[2]

  @property
  def tiles(self) -> tuple[int, int]:
    """Number of tiles along the queries and along the keys."""
    return self.dims[3] // self.tile.q, self.dims[4] // self.tile.kv

  def kinds(self) -> tuple[int, ...]:
    """Returns the classes of tiles that occur, EMPTY included."""
    if isinstance(self.classes, np.ndarray):
      return tuple(int(c) for c in np.unique(self.classes))
    return intervals.EMPTY, intervals.PARTIAL, intervals.FULL

  def width(self, axis: int) -> int:
    """Returns the most tiles along `axis` (1: queries, 2: keys) per line."""
    return intervals.max_visited(
      self.found, *self.lengths, self.tile.q, self.tile.kv, axis
    )

  def table(self, axis: int) -> jax.Array:
    """Returns the flat table of the tiles along `axis` that lines visit."""
    tiles = self.classes if axis == 2 else self.classes.swapaxes(1, 2)
    table = intervals.visit_table(tiles, self.width(axis))
    return jnp.asarray(table.reshape(-1), jnp.int32)

  def cost(self, matmuls: int) -> pl.CostEstimate:
    """Estimates a kernel with `matmuls` a tile, each half as wide as H + Hv."""
    B, N, _, _, _, H, Hv = self.dims
    pairs = B * N * self.tile.q * self.tile.kv * self._visited()
    size = self.arrays["q"].dtype.itemsize
    # A tile of queries is stationary while those of keys are streamed.
    bytes_accessed = B * N * self.dims[3] * (H + Hv) * size
    bytes_accessed += pairs // self.tile.q * (H + Hv) * size
    return pl.CostEstimate(
      flops=matmuls * pairs * (H + Hv),
      transcendentals=pairs,
      bytes_accessed=bytes_accessed,
    )

  def _visited(self) -> int:
    """Returns an upper bound on the tiles visited by one head."""
    if isinstance(self.classes, np.ndarray):
      return int((self.classes[0] != intervals.EMPTY).sum())
    return self.tiles[0] * self.width(2)

  def seed(self) -> jax.Array:
    """Returns the dropout seed, int32 [1]."""
    seed = self.arrays.get("seed")
    if seed is None:
      return jnp.zeros(1, jnp.int32)
    seed = jnp.asarray(seed).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(seed, jnp.int32).reshape(1)


def prepare(spec: Spec, x: Operands, tile: Tile) -> Problem:
  """Prepares a call's problem for tiles of the given size."""
  (B, T, N, H), (S, K), Hv = x.q.shape, x.k.shape[1:3], x.v.shape[-1]
  tile = fit(tile, T, S)
  found = intervals.mask_intervals(x.mask, T, S)
  kinds = intervals.tile_classes(found, T, S, tile.q, tile.kv)
  keys, queries = x.mask.valid_keys(), x.mask.valid_queries()
  # Padding may contain anything, even NaN, and 0 * NaN would reach the output.
  arrays = {
    "q": heads_first(zero_padding(x.q, queries), tile.q),
    "k": heads_first(zero_padding(x.k, keys), tile.kv),
    "v": heads_first(zero_padding(x.v, keys), tile.kv),
    "sinks": x.sinks,
    "seed": x.seed,
  }
  arrays["bias"], varies = _bias(x.bias, T, S, tile)
  rows, columns = {}, {}
  plain = isinstance(kinds, np.ndarray) and np.all(kinds == intervals.FULL)
  if not plain:
    rows, columns = _mask_arrays(found, tile)
  arrays["rows"] = _stack(rows, axis=1)
  arrays["columns"] = _stack(columns, axis=1)
  padded = arrays["q"].shape[2], arrays["k"].shape[2]
  return Problem(
    spec=spec,
    tile=tile,
    dims=(B, N, K, *padded, H, Hv),
    lengths=(T, S),
    dtype=accumulator(x.q.dtype),
    rows=tuple(rows),
    columns=tuple(columns),
    classes=kinds,
    found=found,
    bias=varies,
    arrays={k: v for k, v in arrays.items() if v is not None},
  )


def heads_first(x: jax.Array, multiple: int) -> jax.Array:
  """Transposes [B, T, N, H] to [B, N, T, H], T zero-padded to whole tiles."""
  return pad(jnp.swapaxes(x, 1, 2), 2, multiple)


def pad(x: Any, axis: int, multiple: int, value: float | int = 0) -> jax.Array:
  """Pads the end of `axis` with `value` up to a multiple."""
  amount = -x.shape[axis] % multiple
  widths = [(0, amount if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value) if amount else x


def operand_specs(p: Problem, place: Place) -> dict[str, pl.BlockSpec]:
  """Returns the block specifications of the arrays that a kernel reads, by
  name.

  Args:
    p: The problem.
    place: Maps a grid step to its tile.
  """
  t, (_, _, _, _, _, H, Hv), G = p.tile, p.dims, p.group

  def block(shape, where):
    return pl.BlockSpec(shape, lambda *ids: where(*place(*ids)[:4]))

  def one(shape, index):
    return index if shape > 1 else jnp.int32(0)

  specs = {
    "q": block((None, None, t.q, H), lambda b, h, i, j: (b, h, i, 0)),
    "k": block(
      (None, None, t.kv, H),
      lambda b, h, i, j: (b, jax.lax.div(h, np.int32(G)), j, 0),
    ),
    "v": block(
      (None, None, t.kv, Hv),
      lambda b, h, i, j: (b, jax.lax.div(h, np.int32(G)), j, 0),
    ),
    "do": block((None, None, t.q, Hv), lambda b, h, i, j: (b, h, i, 0)),
    "lse": block((None, None, 1, t.q), lambda b, h, i, j: (b, h, 0, i)),
    "shift": block((None, None, 1, t.q), lambda b, h, i, j: (b, h, 0, i)),
    "sinks": pl.BlockSpec(memory_space=pltpu.SMEM),
  }
  if "rows" in p.arrays:
    n, R, _ = p.arrays["rows"].shape
    specs["rows"] = block((None, R, t.q), lambda b, h, i, j: (one(n, b), 0, i))
  if "columns" in p.arrays:
    m, C, _, lanes = p.arrays["columns"].shape
    specs["columns"] = block(
      (None, C, t.kv, lanes), lambda b, h, i, j: (one(m, b), 0, j, 0)
    )
  if "bias" in p.arrays:
    B, N, _, lanes = p.arrays["bias"].shape
    k, q = p.bias
    specs["bias"] = block(
      (None, None, t.kv if k else 1, t.q if q else lanes),
      lambda b, h, i, j: (one(B, b), one(N, h), j if k else 0, i if q else 0),
    )
  return {name: specs[name] for name in p.arrays if name != "seed"}


def query_place(p: Problem) -> Place:
  """Maps a grid (B, N, query tiles, width of the table along keys)."""
  wide, lines, rows = p.width(2), p.tiles[0], p.classes.shape[0]

  def place(b, h, i, w, table, *_):
    line = i if rows == 1 else b * lines + i
    entry = table[line * wide + w]
    return b, h, i, entry >> 2, entry & 3

  return place


def key_place(p: Problem) -> Place:
  """Maps a grid (B, K, key tiles, G, width of the table along queries)."""
  wide, lines, rows = p.width(1), p.tiles[1], p.classes.shape[0]

  def place(b, k, j, g, w, table, *_):
    line = j if rows == 1 else b * lines + j
    entry = table[line * wide + w]
    return b, k * p.group + g, entry >> 2, j, entry & 3

  return place


def varying(x: jax.Array, shape: tuple[int, ...], dtype: Any):
  """Returns the type of an output that varies over the mesh as `x` does."""
  return jax.eval_shape(lambda x: jnp.zeros_like(x, dtype, shape=shape), x)


def lanes(tile: Tile) -> int:
  """Returns the lanes over which a value per key is repeated."""
  return LANES if tile.q_part % LANES == 0 else tile.q_part


def _mask_arrays(found, tile: Tile) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the mask's rows [B or 1, T] and columns [B or 1, S, lanes]."""
  rows, columns = intervals.tile_arrays(found)
  # Padding: no interval contains coordinate -1, or anything before 0.
  rows = {
    k: pad(jnp.asarray(v), 1, tile.q, -1 if k == "segment" else 0)
    for k, v in rows.items()
  }
  columns = {
    k: _over_lanes(pad(v, 1, tile.kv, -2 if k == "segment" else -1), tile)
    for k, v in columns.items()
  }
  return rows, columns


def _bias(bias, T: int, S: int, tile: Tile):
  """Returns the bias [b, n, s, t], padded, and which of (s, t) vary."""
  if bias is None:
    return None, (False, False)
  bias = jnp.swapaxes(bias, 2, 3)
  along_k, along_q = bias.shape[2] > 1, bias.shape[3] > 1
  bias = pad(bias, 2, tile.kv) if along_k else bias
  if along_k and not along_q:
    return _over_lanes(bias[..., 0], tile), (True, False)
  if not along_q:
    bias = jnp.broadcast_to(bias, (*bias.shape[:3], T))
  return pad(bias, 3, tile.q), (along_k, True)


def _over_lanes(x: jax.Array, tile: Tile) -> jax.Array:
  return jnp.broadcast_to(x[..., None], (*x.shape, lanes(tile)))


def _stack(named: dict[str, Any], axis: int):
  """Stacks the arrays on one axis, or returns None if there are none."""
  if not named:
    return None
  return jnp.stack(jnp.broadcast_arrays(*named.values()), axis).astype(
    jnp.int32
  )
