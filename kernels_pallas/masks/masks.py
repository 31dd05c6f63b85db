"""What may see what: one value for the model, the kernels and the cache.

A `Mask` says which keys each query sees without a `[T, S]` array. Key j is
visible to query i iff all of these hold:

* the kind's rule on positions: `full` always; `causal` k <= q; `prefix`
  k <= q or k < prefix; `block_causal` k // block <= q // block;
  `block_diffusion` see `Mask.block_diffusion`; `function` what a function of
  both positions says;
* the window on positions, inclusive on both sides: q - left <= k <= q + right
  (None is unbounded; a sliding window of W tokens is left = W - 1);
* the segments are equal and not negative, if there are segments;
* the positions that were given are not negative (negative means padding).

A position that is not given is an index: key j is at j and query i at
i + offset. The default offset S - T aligns the ends (bottom right), 0 aligns
the starts. Only such index rules bound the keys of a tile of queries before
the program runs (`key_range`, `is_full_tile`); what data decides is decided by
`visible`, a tile at a time. A query that sees no key gets output 0.
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
"""The start (perhaps traced) and the static size of a range of indices."""

Segments = Int[Array, "#b t"] | tuple[Int[Array, "#b t"], Int[Array, "#b s"]]
"""One array for queries and keys, or one for each."""

_DATA = ("q_positions", "kv_positions", "q_segments", "kv_segments", "prefix")
_META = ("kind", "window", "block", "length", "offset", "function", "extent")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=_DATA, meta_fields=_META
)
@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys a query sees; see the module docstring for the rules.

  Leaves are arrays (or whatever JAX puts in a tree's leaves) or None. Their
  batch axis may be 1.

  Attributes:
    kind: One of `mask_rules.KINDS`.
    window: (left, right), inclusive, in positions.
    block: Block length in tokens of the two block kinds.
    length: Half length L of a block diffusion mask.
    offset: Index of the key that is level with query 0; None is S - T.
    function: (q, k) -> bool, of positions that broadcast.
    extent: Positions from here on see nothing and are not seen, where a
      function is asked about positions that were given.
    q_positions: Int [B, T].
    kv_positions: Int [B, S].
    q_segments: Int [B, T].
    kv_segments: Int [B, S].
    prefix: Int [B], prefix lengths in positions.
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
    """Keys at or before the query."""
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
    """Causal, but the first `prefix` positions are visible to everybody."""
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
    """Keys in the query's block of positions and in earlier blocks."""
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
    """Training mask of block diffusion over `[x_t, x_0]`, 2 L tokens.

    A noisy token (first half) sees its own noisy block and the clean blocks
    before it; a clean token sees the clean blocks up to its own (Arriola et
    al. 2025, "Block Diffusion", section 4).

    Args:
      length: L, so T = S = 2 L.
      block: Tokens a block.
      segments: Int [B, 2 L], the documents of both halves.
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
    """Keys of which a function of both positions says so.

    It is asked about all pairs before the program runs (`mask_functions`). A
    program is compiled for each function, so define it once, not in each call.

    Args:
      function: (q, k) -> bool in NumPy's and JAX's common operators and
        functions, of positions that broadcast: `lambda q, k: q % 9 == k % 9`.
        It may close over JAX arrays whose values are known by then (over
        NumPy's it cannot: it is asked with JAX's indices, too).
      window: As of the others.
      segments: As of the others.
      q_positions: As of the others.
      kv_positions: As of the others.
      offset: As of the others.
      extent: Needed where positions are given, also later (by a cache, by a
        mesh that cuts positions): all are below it.
    """
    mask = _build(
      cls, "function", window, segments, q_positions, kv_positions, offset
    )
    return dataclasses.replace(mask, function=function, extent=extent)

  def check(self, B: int, T: int, S: int) -> None:
    """Raises ValueError unless the mask fits `[B, T]` queries, `[B, S]` keys.

    Args:
      B: Batch.
      T: Queries a row.
      S: Keys a row.
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
    if (self.q_segments is None) != (self.kv_segments is None):
      raise ValueError("mask: segments of queries and keys come together")
    given = self.q_positions is not None or self.kv_positions is not None
    if self.kind == "function" and given and self.extent < 1:
      raise ValueError(
        "mask function: found positions, expected an extent with them, above "
        "the greatest: the function is asked about all before the program runs"
      )
    if self.kind == "block_diffusion" and not T == S == 2 * self.length:
      raise ValueError(
        f"mask: block diffusion of length {self.length} needs "
        f"{2 * self.length} queries and keys, found {T} and {S}"
      )

  def level(self, T: int, S: int) -> int:
    """Index of the key that is level with query 0, of T queries and S keys."""
    return S - T if self.offset is None else self.offset

  def visible(
    self,
    T: int,
    S: int,
    q_tile: Tile | None = None,
    k_tile: Tile | None = None,
  ) -> Bool[Array, "b tq tk"]:
    """Which keys of a tile its queries see; indices past S see nothing.

    Args:
      T: Queries a row, for the alignment.
      S: Keys a row.
      q_tile: (start, size) of the queries; default all.
      k_tile: (start, size) of the keys; default all.

    Returns:
      Bool [B or 1, tq, tk].
    """
    q_tile = (0, T) if q_tile is None else q_tile
    k_tile = (0, S) if k_tile is None else k_tile
    i = (q_tile[0] + jnp.arange(q_tile[1]))[None, :, None]
    j = (k_tile[0] + jnp.arange(k_tile[1]))[None, None, :]
    level = self.level(T, S)
    q, k = i + level, j
    if self.kind == "block_diffusion":
      q, k = i % self.length, j % self.length
    seen = j < S
    if self.q_positions is not None:
      q = cut(self.q_positions, 1, *q_tile)[:, :, None]
      seen &= q >= 0
    if self.kv_positions is not None:
      k = cut(self.kv_positions, 1, *k_tile)[:, None, :]
      seen &= k >= 0
    if self.q_segments is not None:
      ours = cut(self.q_segments, 1, *q_tile)[:, :, None]
      theirs = cut(self.kv_segments, 1, *k_tile)[:, None, :]
      seen &= (ours == theirs) & (ours >= 0)
    left, right = self.window
    if left is not None:
      seen &= k >= q - left
    if right is not None:
      seen &= k <= q + right
    seen &= rules.holds(self, i, j, q, k)
    return jnp.broadcast_to(seen, (seen.shape[0], q_tile[1], k_tile[1]))

  def live_queries(self) -> Bool[Array, "#b t"] | None:
    """Queries that are not padding; None if none are marked as padding."""
    return _live(self.q_positions, self.q_segments)

  def live_keys(self) -> Bool[Array, "#b s"] | None:
    """Keys that are not padding; None if none are marked as padding."""
    return _live(self.kv_positions, self.kv_segments)

  def padded(self, t: int, s: int) -> "Mask":
    """The mask with `t` and `s` more queries and keys, all of them padding.

    The caller goes on passing the old T and S to the other methods, so the
    alignment stays.
    """

    def grow(leaf, amount):
      if leaf is None:
        return None
      return jnp.pad(leaf, ((0, 0), (0, amount)), constant_values=-1)

    return dataclasses.replace(
      self,
      q_positions=grow(self.q_positions, t),
      kv_positions=grow(self.kv_positions, s),
      q_segments=grow(self.q_segments, t),
      kv_segments=grow(self.kv_segments, s),
    )

  def key_range(
    self, q_start: int, q_stop: int, T: int, S: int
  ) -> tuple[int, int]:
    """Bounds [lo, hi) on the keys that queries [q_start, q_stop) can see."""
    lo, hi = 0, S
    if self.q_positions is None and self.kv_positions is None:
      level = self.level(T, S)
      first, last = q_start + level, q_stop - 1 + level
      if self.kind == "causal":
        hi = last + 1
      elif self.kind == "block_causal":
        hi = (last // self.block + 1) * self.block
      elif self.kind == "block_diffusion":
        return rules.diffusion_range(self.length, self.block, q_start, q_stop)
      elif self.kind == "function":
        seen = function_masks.runs(self.function, self.window, level, T, S)
        lo, hi = seen.hull(q_start, q_stop)
      left, right = self.window
      lo = lo if left is None else max(lo, first - left)
      hi = hi if right is None else min(hi, last + right + 1)
    lo = min(max(lo, 0), S)
    return lo, min(max(hi, lo), S)

  def is_full_tile(
    self, q_start: int, q_stop: int, k_start: int, k_stop: int, T: int, S: int
  ) -> bool:
    """Whether every query of the tile surely sees every key of it."""
    data = (self.q_positions, self.kv_positions, self.q_segments)
    unknown = ("block_diffusion", "function")
    if any(x is not None for x in data) or self.kind in unknown:
      return False
    level = self.level(T, S)
    first, last = q_start + level, q_stop - 1 + level
    left, right = self.window
    inside = k_stop <= S
    inside &= left is None or k_start >= last - left
    inside &= right is None or k_stop - 1 <= first + right
    if self.kind in ("causal", "prefix"):
      inside &= k_stop - 1 <= first
    elif self.kind == "block_causal":
      inside &= (k_stop - 1) // self.block <= first // self.block
    return inside


def cut(x: Array, axis: int, start: Any, size: int) -> Array:
  """`size` entries of `x` along `axis` from `start`, traced or not."""
  if isinstance(start, int):
    return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _build(cls, kind, window, segments, q_positions, kv_positions, offset):
  """A mask with the fields that all kinds share."""
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


def _live(positions: Array | None, segments: Array | None) -> Array | None:
  marks = [x >= 0 for x in (positions, segments) if x is not None]
  return functools.reduce(jnp.logical_and, marks) if marks else None
