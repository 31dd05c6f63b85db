"""Masks compiled for kernels: intervals a query, and which tiles hold a pair.

Every rule of a `Mask` says that a query sees the keys whose coordinate lies in
one or two intervals [lo, hi), a function's in up to eight. A kernel therefore
needs to know no kind of mask: it compares coordinates with bounds. A key's
coordinate is its index, or its position where positions are given; in a block
diffusion mask the clean half starts at `shift`, past all positions of the noisy
half.

From the intervals follows each tile's class: `EMPTY` is never visited, `FULL`
needs no mask arithmetic. What indices decide is exact and known before the
program runs; what data decides (positions, segments, prefixes) is bounded by
the least and the greatest of each block while it runs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask, function_masks

EMPTY, PARTIAL, FULL = 0, 1, 2

END = 2**30
"""Past every coordinate: the end of an interval that nothing bounds."""

TOO_MANY = (
  f"a query's keys lie in more than {function_masks.MOST} intervals, which "
  "kernels do not compare with"
)

_DATA_SHIFT = 2**29


@dataclasses.dataclass(frozen=True)
class Rows:
  """What a mask says of each query and key, for T queries and S keys.

  Attributes:
    bounds: int32 [B or 1, R, T]: lo and hi of each interval. NumPy where
      indices decide, else a JAX array.
    keys: int32 [B or 1, S], the keys' coordinates, or None: their indices.
    segments: (int32 [B or 1, T], int32 [B or 1, S]), which never agree where
      either is padding, or None.
    unlisted: The mask, where bounds only enclose what it lets a query see:
      a function's that takes too many intervals. Else None.
  """

  bounds: Any
  keys: Any
  segments: Any
  unlisted: Mask | None = None

  def check_listed(self) -> None:
    """Raises ValueError if bounds are not all that kernels need to know."""
    if self.unlisted is not None:
      raise ValueError(f"mask function: {TOO_MANY}; xla_blockwise can")


def rows(mask: Mask, T: int, S: int) -> Rows:
  """The mask as intervals and segments.

  Args:
    mask: Any mask.
    T: Queries a row.
    S: Keys a row.

  Raises:
    ValueError: A block diffusion mask with a window.
  """
  data = (mask.q_positions, mask.kv_positions, mask.prefix)
  xp = np if all(x is None for x in data) else jnp
  unlisted = None
  if mask.kind == "function":
    bounds, listed = _function_bounds(mask, T, S, xp)
    unlisted = None if listed else mask
  else:
    bounds = _bounds(mask, T, S, xp)
  # Without positions the keys are indices, and end at S.
  if mask.kv_positions is None:
    bounds = [(lo, xp.minimum(hi, S)) for lo, hi in bounds]
  # Padding has coordinate -1.
  bounds = [(xp.maximum(lo, 0), hi) for lo, hi in bounds]
  flat = xp.broadcast_arrays(*(x for pair in bounds for x in pair))
  segments = None
  if mask.q_segments is not None:
    ours, theirs = mask.q_segments, mask.kv_segments
    segments = (
      jnp.where(ours < 0, -1, ours).astype(jnp.int32),
      jnp.where(theirs < 0, -2, theirs).astype(jnp.int32),
    )
  return Rows(
    bounds=xp.stack(flat, axis=1).astype(np.int32),
    keys=_coordinates(mask, S),
    segments=segments,
    unlisted=unlisted,
  )


def arrays(found: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
  """What decides inside a tile: arrays of rows and of columns, by name.

  Args:
    found: What `rows` returned.

  Returns:
    `lo` and `hi` of each interval and `segment`, [B or 1, T]; `key` and
    `segment`, [B or 1, S]. A bound that is 0 throughout is left out.

  Raises:
    ValueError: Of a function's mask a query sees more intervals than kernels
      compare with.
  """
  found.check_listed()
  rows, columns = {}, {}
  for n in range(0, found.bounds.shape[1], 2):
    lo, hi = found.bounds[:, n], found.bounds[:, n + 1]
    if not (isinstance(lo, np.ndarray) and np.all(lo == 0)):
      rows[f"lo{n // 2}"] = lo
    rows[f"hi{n // 2}"] = hi
  if found.keys is not None:
    columns["key"] = found.keys
  if found.segments is not None:
    rows["segment"], columns["segment"] = found.segments
  return rows, columns


def classes(found: Rows, T: int, S: int, bq: int, bk: int) -> Any:
  """The class of every tile, int32 [B or 1, tiles of T, tiles of S].

  NumPy, and exact, where indices decide; else a JAX array that may call a tile
  partial that is empty or full.

  Args:
    found: What `rows` returned.
    T: Queries a row.
    S: Keys a row.
    bq: Queries a tile.
    bk: Keys a tile.
  """
  static = isinstance(found.bounds, np.ndarray) and found.keys is None
  if static:
    tiles = _exact(found, T, S, bq, bk)[None]
  else:
    tiles = _hull(found, T, S, bq, bk)
    if found.unlisted is not None:
      tiles = jnp.minimum(tiles, PARTIAL)
  if found.segments is None:
    return tiles
  return jnp.minimum(tiles, _by_segments(found.segments, bq, bk))


def width(found: Rows, T: int, S: int, bq: int, bk: int, axis: int) -> int:
  """The most tiles along `axis` (1: queries, 2: keys) that one line visits.

  Segments only ever take tiles away, so they are not asked.
  """
  if not (isinstance(found.bounds, np.ndarray) and found.keys is None):
    return -(-T // bq) if axis == 1 else -(-S // bk)
  tiles = _exact(found, T, S, bq, bk)
  return max(1, int((tiles != EMPTY).sum(axis - 1).max()))


def table(tiles: Any, wide: int) -> Any:
  """The tiles that each line visits, in order, int32 [B or 1, lines, wide].

  An entry is 4 times the tile's index plus its class. Unused entries repeat
  the last tile with class EMPTY, so that a pipeline fetches nothing for them.

  Args:
    tiles: What `classes` returned; lines are its second axis.
    wide: At least the number of tiles that are not empty on any line.
  """
  xp = np if isinstance(tiles, np.ndarray) else jnp
  used = tiles != EMPTY
  order = xp.argsort(~used, axis=-1, **({"kind": "stable"} if xp is np else {}))
  order = order[..., :wide]
  count = used.sum(-1, keepdims=True)
  last = xp.take_along_axis(order, xp.maximum(count - 1, 0), axis=-1)
  live = xp.arange(wide) < count
  kind = xp.where(live, xp.take_along_axis(tiles, order, axis=-1), EMPTY)
  return (xp.where(live, order, last) * 4 + kind).astype(np.int32)


def _bounds(mask: Mask, T: int, S: int, xp) -> list[tuple[Any, Any]]:
  """Intervals of coordinates, each a pair of arrays [B or 1, T]."""
  i = xp.arange(T)[None]
  if mask.kind == "block_diffusion":
    return _diffusion_bounds(mask, i, xp)
  level = mask.level(T, S)
  q = i + level if mask.q_positions is None else mask.q_positions
  lo, hi = xp.zeros_like(q), xp.full_like(q, END)
  match mask.kind:
    case "causal":
      hi = q + 1
    case "prefix":
      hi = xp.maximum(q + 1, mask.prefix[:, None])
    case "block_causal":
      hi = (q // mask.block + 1) * mask.block
  left, right = mask.window
  lo = lo if left is None else xp.maximum(lo, q - left)
  hi = hi if right is None else xp.minimum(hi, q + right + 1)
  if mask.q_positions is not None:
    hi = xp.where(q < 0, 0, hi)
  return [(lo, hi)]


def _function_bounds(
  mask: Mask, T: int, S: int, xp
) -> tuple[list[tuple[Any, Any]], bool]:
  """Intervals as of `_bounds`, and whether they list what is seen."""
  level = mask.level(T, S)
  keys = S if mask.kv_positions is None else mask.extent
  ask = functools.partial(function_masks.runs, mask.function, mask.window)
  if mask.q_positions is None:
    found = ask(level, T, keys)
    pairs = [(lo[None], hi[None]) for lo, hi in found.pairs()]
    return pairs, found.listed
  found, q = ask(0, mask.extent, keys), mask.q_positions
  at, known = xp.clip(q, 0, mask.extent - 1), (q >= 0) & (q < mask.extent)
  pairs = [
    (xp.asarray(lo)[at], xp.where(known, xp.asarray(hi)[at], 0))
    for lo, hi in found.pairs()
  ]
  return pairs, found.listed


def _diffusion_bounds(mask: Mask, i, xp) -> list[tuple[Any, Any]]:
  if mask.window != (None, None):
    raise ValueError(
      f"mask: found window {mask.window} with block diffusion, expected none"
    )
  L, b = mask.length, mask.block
  shift = _shift(mask)
  q = i % L if mask.q_positions is None else mask.q_positions
  start = q // b * b
  noisy, live = i < L, q >= 0
  stop = xp.minimum(start + b, shift)
  clean = shift + xp.where(noisy, start, start + b)
  zero = xp.zeros_like(q)
  own = (zero + start, xp.where(noisy & live, stop, 0))
  return [own, (zero + shift, xp.where(live, clean, 0))]


def _shift(mask: Mask) -> int:
  return mask.length if mask.kv_positions is None else _DATA_SHIFT


def _coordinates(mask: Mask, S: int) -> Any:
  k = mask.kv_positions
  if k is None:
    return None
  if mask.kind == "block_diffusion":
    clean = jnp.arange(S)[None] >= mask.length
    k = jnp.where(clean & (k >= 0), k + _shift(mask), k)
  return k.astype(jnp.int32)


def _exact(found: Rows, T: int, S: int, bq: int, bk: int) -> np.ndarray:
  """Classes [tiles of T, tiles of S] by counting the pairs of every tile."""
  if found.unlisted is None:
    count = _listed_pairs(found.bounds[0], T, S, bq, bk)
  else:
    mask = found.unlisted
    level = mask.level(T, S)
    count = function_masks.tiles(
      mask.function, mask.window, level, (T, S), (bq, bk)
    )
  sizes = np.minimum(np.arange(0, T, bq) + bq, T) - np.arange(0, T, bq)
  full = count == sizes[:, None] * bk
  return np.where(count == 0, EMPTY, np.where(full, FULL, PARTIAL))


def _listed_pairs(
  bounds: np.ndarray, T: int, S: int, bq: int, bk: int
) -> np.ndarray:
  """Visible pairs of every tile, of which the intervals are a list."""
  starts = np.arange(0, S, bk)
  stops = np.minimum(starts + bk, S)
  count = np.zeros((T, len(starts)), np.int64)
  for lo, hi in zip(bounds[0::2], bounds[1::2], strict=True):
    overlap = np.minimum(hi[:, None], stops) - np.maximum(lo[:, None], starts)
    count += np.maximum(overlap, 0)
  return np.add.reduceat(count, np.arange(0, T, bq), axis=0)


def _hull(found: Rows, T: int, S: int, bq: int, bk: int) -> jax.Array:
  """Classes from the hull of each block's intervals and coordinates."""
  keys = found.keys
  if keys is None:
    keys = np.arange(S)[None]
  dead = keys < 0
  first = _reduce(jnp.minimum, jnp.where(dead, END, keys), bk, END)
  last = _reduce(jnp.maximum, keys, bk, -1)
  whole = _reduce(jnp.logical_and, ~dead, bk, False)
  first, last, whole = (x[:, None, :] for x in (first, last, whole))
  some, full = [], []
  bounds = jnp.asarray(found.bounds)
  for n in range(0, bounds.shape[1], 2):
    lo, hi = bounds[:, n], bounds[:, n + 1]
    blank = hi <= lo
    least = _reduce(jnp.minimum, jnp.where(blank, END, lo), bq, END)
    most = _reduce(jnp.maximum, jnp.where(blank, -1, hi), bq, -1)
    some.append((last >= least[..., None]) & (first < most[..., None]))
    most = _reduce(jnp.maximum, lo, bq, -1)
    least = _reduce(jnp.minimum, hi, bq, END)
    inside = (first >= most[..., None]) & (last < least[..., None])
    full.append(whole & inside)
  some, full = (functools.reduce(jnp.logical_or, x) for x in (some, full))
  return jnp.where(full, FULL, jnp.where(some, PARTIAL, EMPTY))


def _by_segments(segments, bq: int, bk: int) -> jax.Array:
  """Upper bounds on the classes; padding has negative segments."""
  ours, theirs = segments

  def span(x, block):
    live = x >= 0
    return (
      _reduce(jnp.minimum, jnp.where(live, x, END), block, END),
      _reduce(jnp.maximum, jnp.where(live, x, -1), block, -1),
      _reduce(jnp.minimum, x, block, END),
    )

  first, last, least = (x[..., None] for x in span(ours, bq))
  # Indices past S are partial by their bounds, whatever segment they get.
  first_k, last_k, least_k = (x[:, None, :] for x in span(theirs, bk))
  meet = (first <= last_k) & (first_k <= last)
  same = (least == last) & (least_k == last_k) & (last == last_k) & (least >= 0)
  return jnp.where(same, FULL, jnp.where(meet, PARTIAL, EMPTY))


def _reduce(op, x, block: int, fill) -> jax.Array:
  """`op` over blocks of the last axis, filled up with `fill`."""
  x = jnp.asarray(x)
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)
  x = x.reshape(x.shape[0], -1, block)
  ufunc = {jnp.minimum: jnp.min, jnp.maximum: jnp.max}.get(op, jnp.all)
  return ufunc(x, axis=-1)
