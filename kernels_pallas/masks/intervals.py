"""Masks compiled for kernels: intervals of visible keys, and classes of tiles.

For every rule of a `Mask`, the keys that a query sees have coordinates in one
or two intervals [lo, hi), or up to eight for a function, or for intervals that
are data. Kernels therefore do
not distinguish kinds of masks: they compare coordinates with bounds. A key's
coordinate is its index, or its position if positions are given. In a block
diffusion mask the clean half starts at coordinate `shift`, past all positions
of the noisy half.

The intervals determine each tile's class: kernels skip `EMPTY` tiles, and
`FULL` tiles need no mask arithmetic. Classes that depend on indices alone are
exact and known before the program runs. Classes that depend on data (positions,
segments, prefixes) are bounded at run time by the minimum and maximum of each
block.
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
"""Past every coordinate: the end of an unbounded interval."""

TOO_MANY_INTERVALS = (
  f"a query's keys lie in more than {function_masks.MAX_INTERVALS} intervals, "
  "which kernels do not support"
)

_DATA_SHIFT = 2**29


@dataclasses.dataclass(frozen=True)
class MaskIntervals:
  """A mask as intervals and segments, for T queries and S keys.

  Attributes:
    bounds: int32 [B or 1, R, T], lo and hi of each interval in turn. A NumPy
      array if it depends on indices alone, else a JAX array.
    keys: int32 [B or 1, S], the keys' coordinates; None if these are indices.
    segments: (int32 [B or 1, T], int32 [B or 1, S]), with padding set so that
      it matches nothing; or None.
    inexact_mask: The mask itself, if `bounds` only enclose the visible keys
      because its function needs too many intervals; else None.
  """

  bounds: Any
  keys: Any
  segments: Any
  inexact_mask: Mask | None = None

  def check_exact(self) -> None:
    """Raises ValueError if `bounds` are not exactly the visible keys."""
    if self.inexact_mask is not None:
      raise ValueError(
        f"mask function: {TOO_MANY_INTERVALS}; xla_blockwise can"
      )


def mask_intervals(mask: Mask, T: int, S: int) -> MaskIntervals:
  """Returns the mask as intervals and segments.

  Args:
    mask: Any mask.
    T: Queries per batch row.
    S: Keys per batch row.

  Raises:
    ValueError: The mask is a block diffusion mask with a window.
  """
  data = (mask.q_positions, mask.kv_positions, mask.prefix, mask.bounds)
  xp = np if all(x is None for x in data) else jnp
  inexact_mask = None
  if mask.kind == "function":
    bounds, exact = _function_bounds(mask, T, S, xp)
    inexact_mask = None if exact else mask
  else:
    bounds = _bounds(mask, T, S, xp)
  # Without positions, coordinates are indices, which end at S.
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
  return MaskIntervals(
    bounds=xp.stack(flat, axis=1).astype(np.int32),
    keys=_coordinates(mask, S),
    segments=segments,
    inexact_mask=inexact_mask,
  )


def tile_arrays(found: MaskIntervals) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what a kernel compares inside a tile, as named arrays.

  Args:
    found: Result of `mask_intervals`.

  Returns:
    For queries, `lo` and `hi` of each interval and `segment`, [B or 1, T]; for
    keys, `key` and `segment`, [B or 1, S]. A `lo` of zeros is left out.

  Raises:
    ValueError: The mask's function needs more intervals than kernels support.
  """
  found.check_exact()
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


def tile_classes(found: MaskIntervals, T: int, S: int, bq: int, bk: int) -> Any:
  """Returns the class of every tile, int32 [B or 1, tiles of T, tiles of S].

  A NumPy array, and exact, if classes depend on indices alone. Otherwise a JAX
  array in which a tile marked PARTIAL may be empty or full.

  Args:
    found: Result of `mask_intervals`.
    T: Queries per batch row.
    S: Keys per batch row.
    bq: Queries per tile.
    bk: Keys per tile.
  """
  static = isinstance(found.bounds, np.ndarray) and found.keys is None
  if static:
    tiles = _exact(found, T, S, bq, bk)[None]
  else:
    tiles = _hull(found, T, S, bq, bk)
    if found.inexact_mask is not None:
      tiles = jnp.minimum(tiles, PARTIAL)
  if found.segments is None:
    return tiles
  return jnp.minimum(tiles, _by_segments(found.segments, bq, bk))


def max_visited(
  found: MaskIntervals, T: int, S: int, bq: int, bk: int, axis: int
) -> int:
  """Returns the most tiles along `axis` (1: queries, 2: keys) visited per line.

  Ignores segments, which only remove tiles.
  """
  if not (isinstance(found.bounds, np.ndarray) and found.keys is None):
    return -(-T // bq) if axis == 1 else -(-S // bk)
  tiles = _exact(found, T, S, bq, bk)
  return max(1, int((tiles != EMPTY).sum(axis - 1).max()))


def visit_table(tiles: Any, wide: int) -> Any:
  """Returns the tiles that each line visits, int32 [B or 1, lines, wide].

  An entry is 4 times the tile's index plus its class. Unused entries repeat
  the last tile with class EMPTY, so that a pipeline fetches nothing for them.

  Args:
    tiles: Result of `tile_classes`; its second axis are the lines.
    wide: At least the largest number of non-empty tiles of a line.
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
  """Returns intervals of coordinates, each a pair of arrays [B or 1, T]."""
  i = xp.arange(T)[None]
  if mask.kind == "block_diffusion":
    return _diffusion_bounds(mask, i, xp)
  offset = mask.resolve_offset(T, S)
  q = i + offset if mask.q_positions is None else mask.q_positions
  lo, hi = xp.zeros_like(q), xp.full_like(q, END)
  if mask.kind == "intervals":
    given = mask.bounds
    return [
      _in_window(mask, q, given[:, n], given[:, n + 1], xp)
      for n in range(0, given.shape[1], 2)
    ]
  match mask.kind:
    case "causal":
      hi = q + 1
    case "prefix":
      hi = xp.maximum(q + 1, mask.prefix[:, None])
    case "block_causal":
      hi = (q // mask.block + 1) * mask.block
    case "full":
      pass
    case _:
      raise ValueError(f"mask kind {mask.kind!r}: has no intervals here")
  return [_in_window(mask, q, lo, hi, xp)]


def _in_window(mask: Mask, q, lo, hi, xp) -> tuple[Any, Any]:
  """Narrows an interval to the window; padded queries get an empty one."""
  left, right = mask.window
  lo = lo if left is None else xp.maximum(lo, q - left)
  hi = hi if right is None else xp.minimum(hi, q + right + 1)
  if mask.q_positions is not None:
    hi = xp.where(q < 0, 0, hi)
  return lo, hi


def _function_bounds(
  mask: Mask, T: int, S: int, xp
) -> tuple[list[tuple[Any, Any]], bool]:
  """Returns intervals as in `_bounds`, and whether they are exact."""
  offset = mask.resolve_offset(T, S)
  keys = S if mask.kv_positions is None else mask.extent
  intervals_of = functools.partial(
    function_masks.key_intervals, mask.function, mask.window
  )
  if mask.q_positions is None:
    found = intervals_of(offset, T, keys)
    pairs = [(lo[None], hi[None]) for lo, hi in found.bounds()]
    return pairs, found.exact
  found, q = intervals_of(0, mask.extent, keys), mask.q_positions
  at, known = xp.clip(q, 0, mask.extent - 1), (q >= 0) & (q < mask.extent)
  pairs = [
    (xp.asarray(lo)[at], xp.where(known, xp.asarray(hi)[at], 0))
    for lo, hi in found.bounds()
  ]
  return pairs, found.exact


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


def _exact(
  found: MaskIntervals, T: int, S: int, bq: int, bk: int
) -> np.ndarray:
  """Returns classes [tiles of T, tiles of S] by counting visible pairs."""
  if found.inexact_mask is None:
    count = _count_pairs(found.bounds[0], T, S, bq, bk)
  else:
    mask = found.inexact_mask
    offset = mask.resolve_offset(T, S)
    count = function_masks.count_visible_pairs(
      mask.function, mask.window, offset, (T, S), (bq, bk)
    )
  sizes = np.minimum(np.arange(0, T, bq) + bq, T) - np.arange(0, T, bq)
  full = count == sizes[:, None] * bk
  return np.where(count == 0, EMPTY, np.where(full, FULL, PARTIAL))


def _count_pairs(
  bounds: np.ndarray, T: int, S: int, bq: int, bk: int
) -> np.ndarray:
  """Counts the visible pairs of every tile from exact intervals."""
  starts = np.arange(0, S, bk)
  stops = np.minimum(starts + bk, S)
  count = np.zeros((T, len(starts)), np.int64)
  for lo, hi in zip(bounds[0::2], bounds[1::2], strict=True):
    overlap = np.minimum(hi[:, None], stops) - np.maximum(lo[:, None], starts)
    count += np.maximum(overlap, 0)
  return np.add.reduceat(count, np.arange(0, T, bq), axis=0)


def _hull(found: MaskIntervals, T: int, S: int, bq: int, bk: int) -> jax.Array:
  """Returns classes bounded by each block's extreme intervals and keys."""
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
  """Returns upper bounds on the classes; padding has negative segments."""
  ours, theirs = segments

  def span(x, block):
    live = x >= 0
    return (
      _reduce(jnp.minimum, jnp.where(live, x, END), block, END),
      _reduce(jnp.maximum, jnp.where(live, x, -1), block, -1),
      _reduce(jnp.minimum, x, block, END),
    )

  first, last, least = (x[..., None] for x in span(ours, bq))
  # Indices past S are PARTIAL by their bounds, whatever segment they get.
  first_k, last_k, least_k = (x[:, None, :] for x in span(theirs, bk))
  meet = (first <= last_k) & (first_k <= last)
  same = (least == last) & (least_k == last_k) & (last == last_k) & (least >= 0)
  return jnp.where(same, FULL, jnp.where(meet, PARTIAL, EMPTY))


def _reduce(op, x, block: int, fill) -> jax.Array:
  """Reduces blocks of the last axis with `op`, padding it with `fill`."""
  x = jnp.asarray(x)
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)
  x = x.reshape(x.shape[0], -1, block)
  ufunc = {jnp.minimum: jnp.min, jnp.maximum: jnp.max}.get(op, jnp.all)
  return ufunc(x, axis=-1)
