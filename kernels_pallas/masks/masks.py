"""`Mask`: which keys each query may attend to, for models, kernels and caches.

A `Mask` describes visibility without a `[T, S]` array. Key j is visible to
query i iff all of these hold:

* the kind's rule on positions q and k: `full` always; `causal` k <= q; `prefix`
  k <= q or k < prefix; `block_causal` k // block <= q // block;
  `block_diffusion` see `Mask.block_diffusion`; `function` a function of (q, k)
  returns True; `intervals` lo <= k < hi for one of R intervals that the caller
  gives for each query;
* the window on positions, inclusive on both sides: q - left <= k <= q + right
  (None is unbounded; a sliding window of W tokens is left = W - 1);
* the segments, if given, are equal and not negative;
* the positions, if given, are not negative (negative means padding).

Without given positions, key j is at position j and query i at i + offset. The
default offset S - T aligns the ends (bottom right), 0 aligns the starts. Only
such index rules bound the keys of a tile of queries before the program runs
(`key_range`, `is_full_tile`); masks that depend on data are evaluated tile by
tile at run time (`visible`). A query that sees no key gets output 0.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels_pallas.masks import function_masks, rules
from kernels_pallas.masks.function_masks import Window

Tile = tuple[Any, int]
"""The start (traced or not) and the static size of a range of indices."""

Segments = Int[Array, "#b t"] | tuple[Int[Array, "#b t"], Int[Array, "#b s"]]
"""One array for queries and keys, or one for each."""

_DATA = (
  *("q_positions", "kv_positions", "q_segments", "kv_segments", "prefix"),
  "bounds",
)
_META = ("kind", "window", "block", "length", "offset", "function", "extent")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=_DATA, meta_fields=_META
)
@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys each query sees; the module docstring defines the rules.

  Its leaves are arrays (or whatever JAX puts into a tree's leaves) or None. The
  batch axis may be 1.

  Attributes:
    kind: One of `rules.KINDS`.
    window: (left, right), inclusive, in positions.
    block: Tokens per block, for the two block kinds.
    length: Length L of each half of a block diffusion mask.
    offset: Position of query 0, in key indices; None is S - T.
    function: (q, k) -> bool of broadcastable positions.
    extent: Exclusive upper bound on positions, for a function with given
      positions; from there on tokens see nothing and are invisible.
    q_positions: Int [B, T].
    kv_positions: Int [B, S].
    q_segments: Int [B, T].
    kv_segments: Int [B, S].
    prefix: Int [B], prefix lengths in positions.
    bounds: Int [B, 2 R, T], first and one past the last key of each of R
      intervals in turn, in positions of keys.
  """

  kind: str = "full"
  window: Window = (None, None)
  block: int = 0
  length: int = 0
  offset: int | None = None
  function: Callable[[Any, Any], Any] | None = None
  extent: int = 0
  q_positions: Any = None
  kv_positions: Any = None
  q_segments: Any = None
  kv_segments: Any = None
  prefix: Any = None
  bounds: Any = None

  @classmethod
  def full(
    cls,
    window: Window | None = None,
    segments: Segments | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    offset: int | None = None,
  ) -> "Mask":
    """Every key is visible, within the window and the segment."""
    return _build(
      cls, "full", window, segments, q_positions, kv_positions, offset
    )

  @classmethod
  def causal(
    cls,
    window: Window | None = None,
    segments: Segments | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    offset: int | None = None,
  ) -> "Mask":
    """Keys up to and including the query's position are visible."""
    return _build(
      cls, "causal", window, segments, q_positions, kv_positions, offset
    )

  @classmethod
  def prefix_lm(
    cls,
    prefix: Int[Array, " #b"],
    window: Window | None = None,
    segments: Segments | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    offset: int | None = None,
  ) -> "Mask":
    """Causal, except that the first `prefix` positions are visible to all."""
    mask = _build(
      cls, "prefix", window, segments, q_positions, kv_positions, offset
    )
    return dataclasses.replace(mask, prefix=prefix)

  @classmethod
  def block_causal(
    cls,
    block: int,
    window: Window | None = None,
    segments: Segments | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    offset: int | None = None,
  ) -> "Mask":
    """Keys of the query's block of positions and of earlier blocks."""
    mask = _build(
      cls, "block_causal", window, segments, q_positions, kv_positions, offset
    )
    return dataclasses.replace(mask, block=_positive("block", block))

  @classmethod
  def block_diffusion(
    cls,
    length: int,
    block: int,
    segments: Int[Array, "#b t"] | None = None,
    positions: Int[Array, "#b t"] | None = None,
  ) -> "Mask":
    """The training mask of block diffusion over `[x_t, x_0]`, 2 L tokens.

    A noisy token (first half) sees its own noisy block and the clean blocks
    before it; a clean token sees the clean blocks up to its own (Arriola et
    al. 2025, "Block Diffusion", section 4).

    Args:
      length: L, so that T = S = 2 L.
      block: Tokens per block.
      segments: Int [B, 2 L], document ids of both halves.
      positions: Int [B, 2 L]; default is 0..L-1 twice.
    """
    mask = _build(
      cls, "block_diffusion", None, segments, positions, positions, 0
    )
    return dataclasses.replace(
      mask, block=_positive("block", block), length=_positive("length", length)
    )

  @classmethod
  def where(
    cls,
    function: Callable[[Any, Any], Any],
    window: Window | None = None,
    segments: Segments | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    offset: int | None = None,
    extent: int = 0,
  ) -> "Mask":
    """Keys for which a function of both positions returns True.

    The function is evaluated on all pairs before the program runs
    (`function_masks`). Each function object compiles its own program, so define
    it once, not in each call.

    Args:
      function: (q, k) -> bool in operators and functions common to NumPy and
        JAX, of broadcastable positions: `lambda q, k: q % 9 == k % 9`. It may
        close over JAX arrays with known values, but not over NumPy arrays,
        since it is also called with traced positions.
      window: As in the other constructors.
      segments: As in the other constructors.
      q_positions: As in the other constructors.
      kv_positions: As in the other constructors.
      offset: As in the other constructors.
      extent: Exclusive upper bound on positions; required if positions are
        given now or later (by a cache, or by a mesh that shards positions).
    """
    mask = _build(
      cls, "function", window, segments, q_positions, kv_positions, offset
    )
    return dataclasses.replace(mask, function=function, extent=extent)

  @classmethod
  def intervals(
    cls,
    bounds: Int[Array, "#b r2 t"],
    window: Window | None = None,
    segments: Segments | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    offset: int | None = None,
  ) -> "Mask":
    """Keys in any of R intervals that are given for each query.

    The intervals are data: one compiled program serves images, prefixes and
    trees of any shape (`interval_masks` builds them). An interval with hi <= lo
    is empty; intervals of a query may overlap, and their union is visible.

    Args:
      bounds: Int [B, 2 R, T], lo and hi (exclusive) of each interval in turn,
        R at most `function_masks.MAX_INTERVALS`. They are compared with
        `kv_positions` if given, now or later by a cache, else with indices.
      window: As in the other constructors.
      segments: As in the other constructors.
      q_positions: As in the other constructors; a window goes by them.
      kv_positions: As in the other constructors. Given alone, they are mere
        coordinates, and a window raises.
      offset: As in the other constructors.
    """
    mask = _build(
      cls, "intervals", window, segments, q_positions, kv_positions, offset
    )
    return dataclasses.replace(mask, bounds=bounds)

  def check(self, B: int, T: int, S: int) -> None:
    """Raises ValueError unless the mask fits `[B, T]` queries, `[B, S]` keys.

    Args:
      B: Batch size.
      T: Queries per batch row.
      S: Keys per batch row.
    """
    expected = {
      "q_positions": (T,),
      "q_segments": (T,),
      "kv_positions": (S,),
      "kv_segments": (S,),
      "prefix": (),
    }
    for name, tail in expected.items():
      leaf = getattr(self, name)
      if leaf is not None and leaf.shape not in ((B, *tail), (1, *tail)):
        raise ValueError(
          f"mask.{name}: found shape {leaf.shape}, expected {(B, *tail)}"
        )
      # Differences of unsigned integers would never be negative.
      if leaf is not None and not jnp.issubdtype(leaf.dtype, jnp.signedinteger):
        raise ValueError(
          f"mask.{name}: found {leaf.dtype}, expected signed integers"
        )
    self._check_intervals(B, T)
    if (self.q_segments is None) != (self.kv_segments is None):
      raise ValueError("mask: segments of queries and keys come together")
    given = self.q_positions is not None or self.kv_positions is not None
    if self.kind == "function" and given and self.extent < 1:
      raise ValueError(
        "mask function: found positions, expected an extent with them, above "
        "the greatest: the function is evaluated on all before the program runs"
      )
    if self.kind == "block_diffusion" and not T == S == 2 * self.length:
      raise ValueError(
        f"mask: block diffusion of length {self.length} needs "
        f"{2 * self.length} queries and keys, found {T} and {S}"
      )

  def _check_intervals(self, B: int, T: int) -> None:
    """Raises ValueError unless `bounds` fit the queries and the kind."""
    if (self.kind == "intervals") != (self.bounds is not None):
      raise ValueError(
        f"mask.bounds: found {'none' if self.bounds is None else 'some'} with "
        f"kind {self.kind!r}, expected them with kind 'intervals' alone"
      )
    if self.bounds is None:
      return
    shape, dtype = self.bounds.shape, self.bounds.dtype
    most = function_masks.MAX_INTERVALS
    fits = len(shape) == 3 and shape[0] in (1, B) and shape[2] == T
    if not fits or shape[1] not in range(2, 2 * most + 1, 2):
      raise ValueError(
        f"mask.bounds: found shape {shape}, expected [{B}, 2 R, {T}] for R "
        f"intervals, from 1 to {most}"
      )
    if not jnp.issubdtype(dtype, jnp.integer):
      raise ValueError(f"mask.bounds: found {dtype}, expected integers")
    keys_alone = self.q_positions is None and self.kv_positions is not None
    if keys_alone and self.window != (None, None):
      raise ValueError(
        f"mask of intervals: found window {self.window} with kv_positions "
        "alone, expected q_positions too: a window compares the two"
      )

  def resolve_offset(self, T: int, S: int) -> int:
    """Returns the position of query 0, in key indices."""
    return S - T if self.offset is None else self.offset

  def visible(
    self,
    T: int,
    S: int,
    q_tile: Tile | None = None,
    k_tile: Tile | None = None,
  ) -> Bool[Array, "b tq tk"]:
    """Returns which keys of a tile its queries see; keys past S are invisible.

    Args:
      T: Queries per batch row, for the default offset.
      S: Keys per batch row.
      q_tile: (start, size) of the queries; default all.
      k_tile: (start, size) of the keys; default all.

    Returns:
      Bool [B or 1, tq, tk].
    """
    q_tile = (0, T) if q_tile is None else q_tile
    k_tile = (0, S) if k_tile is None else k_tile
    i = (q_tile[0] + jnp.arange(q_tile[1]))[None, :, None]
    j = (k_tile[0] + jnp.arange(k_tile[1]))[None, None, :]
    offset = self.resolve_offset(T, S)
    q, k = i + offset, j
    if self.kind == "block_diffusion":
      q, k = i % self.length, j % self.length
    seen = j < S
    if self.q_positions is not None:
      q = slice_axis(self.q_positions, 1, *q_tile)[:, :, None]
      seen &= q >= 0
    if self.kv_positions is not None:
      k = slice_axis(self.kv_positions, 1, *k_tile)[:, None, :]
      seen &= k >= 0
    if self.q_segments is not None:
      ours = slice_axis(self.q_segments, 1, *q_tile)[:, :, None]
      theirs = slice_axis(self.kv_segments, 1, *k_tile)[:, None, :]
      seen &= (ours == theirs) & (ours >= 0)
    left, right = self.window
    if left is not None:
      seen &= k >= q - left
    if right is not None:
      seen &= k <= q + right
    own = self
    if self.bounds is not None:
      bounds = slice_axis(self.bounds, 2, *q_tile)
      own = dataclasses.replace(self, bounds=bounds)
    seen &= rules.allowed(own, i, j, q, k)
    return jnp.broadcast_to(seen, (seen.shape[0], q_tile[1], k_tile[1]))

  def valid_queries(self) -> Bool[Array, "#b t"] | None:
    """Marks the queries that are not padding; None if no padding is marked."""
    return _valid(self.q_positions, self.q_segments)

  def valid_keys(self) -> Bool[Array, "#b s"] | None:
    """Marks the keys that are not padding; None if no padding is marked."""
    return _valid(self.kv_positions, self.kv_segments)

  def padded(self, t: int, s: int) -> "Mask":
    """Returns the mask with `t` queries and `s` keys of padding appended.

    Keep passing the original T and S to the other methods, so that the offset
    does not change.
    """

    def grow(leaf, amount):
      if leaf is None:
        return None
      return jnp.pad(leaf, ((0, 0), (0, amount)), constant_values=-1)

    bounds = self.bounds
    if bounds is not None:
      bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, t)))  # empty intervals
    return dataclasses.replace(
      self,
      bounds=bounds,
      q_positions=grow(self.q_positions, t),
      kv_positions=grow(self.kv_positions, s),
      q_segments=grow(self.q_segments, t),
      kv_segments=grow(self.kv_segments, s),
    )

  def key_range(
    self, q_start: int, q_stop: int, T: int, S: int
  ) -> tuple[int, int]:
    """Bounds [lo, hi) the keys that queries [q_start, q_stop) see."""
    lo, hi = 0, S
    if self.q_positions is None and self.kv_positions is None:
      offset = self.resolve_offset(T, S)
      first, last = q_start + offset, q_stop - 1 + offset
      if self.kind == "causal":
        hi = last + 1
      elif self.kind == "block_causal":
        hi = (last // self.block + 1) * self.block
      elif self.kind == "block_diffusion":
        return rules.diffusion_range(self.length, self.block, q_start, q_stop)
      elif self.kind == "function":
        seen = function_masks.key_intervals(
          self.function, self.window, offset, T, S
        )
        lo, hi = seen.hull(q_start, q_stop)
      left, right = self.window
      lo = lo if left is None else max(lo, first - left)
      hi = hi if right is None else min(hi, last + right + 1)
    lo = min(max(lo, 0), S)
    return lo, min(max(hi, lo), S)

  def is_full_tile(
    self, q_start: int, q_stop: int, k_start: int, k_stop: int, T: int, S: int
  ) -> bool:
    """Returns whether every query is known to see every key of the tile."""
    data = (self.q_positions, self.kv_positions, self.q_segments)
    if any(x is not None for x in data):
      return False
    offset = self.resolve_offset(T, S)
    first, last = q_start + offset, q_stop - 1 + offset
    left, right = self.window
    inside = k_stop <= S
    inside &= left is None or k_start >= last - left
    inside &= right is None or k_stop - 1 <= first + right
    match self.kind:
      case "full":
        return inside
      case "causal" | "prefix":
        return inside and k_stop - 1 <= first
      case "block_causal":
        return inside and (k_stop - 1) // self.block <= first // self.block
    return False  # of other rules it is not known


def slice_axis(x: Array, axis: int, start: Any, size: int) -> Array:
  """Slices `size` entries along `axis` from `start`, traced or not."""
  if isinstance(start, int):
    return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _build(cls, kind, window, segments, q_positions, kv_positions, offset):
  """Builds a mask from the fields that all kinds share."""
  window = (None, None) if window is None else window
  if not isinstance(window, tuple) or len(window) != 2:
    raise ValueError(
      f"mask window: found {window!r}, expected (left, right); "
      "W tokens up to the query are (W - 1, 0)"
    )
  if any(side is not None and side < 0 for side in window):
    raise ValueError(f"mask window: found {window}, expected no negative side")
  ours, theirs = segments if isinstance(segments, tuple) else (segments,) * 2
  return cls(
    kind=kind,
    window=window,
    offset=offset,
    q_positions=q_positions,
    kv_positions=kv_positions,
    q_segments=ours,
    kv_segments=theirs,
  )


def _positive(name: str, value: int) -> int:
  if value < 1:
    raise ValueError(f"mask {name}: found {value}, expected at least 1")
  return value


def _valid(positions: Array | None, segments: Array | None) -> Array | None:
  marks = [x >= 0 for x in (positions, segments) if x is not None]
  return functools.reduce(jnp.logical_and, marks) if marks else None
