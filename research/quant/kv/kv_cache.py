"""Quantized KV cache of a layer: packed tokens plus recent ones unquantized.

A grid whose groups span tokens packs `R` tokens at a time: of `N` tokens the
first `floor(N / R) R` are packed, and the rest waits in a ring buffer of `R`
slots. A grid of single tokens packs each token at once, and the ring buffer
holds the last `R`. A call reads the cache as it was before its own tokens. The
first few tokens of a row (attention sinks) may stay unquantized.

Shapes are static, so one compiled step serves every length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.nn.cache import SlotCache, slot_positions
from research.quant.kv.kv_grid import Grid, Packed
from research.typing import Array, Float, Int

Shift = Callable[[Int[Array, "B S"]], Float[Array, "B S K H"]]
"""Positions -> part of the keys that is subtracted before packing."""


@dataclasses.dataclass(frozen=True)
class NewTokens:
  """Indices of a call's new tokens, counted from the first packed token.

  Attributes:
    index: `[B, T]`, negative for tokens that are not packed.
    before, after: `[B]`, number of tokens before and after the call.
    first: position of index 0.
  """

  index: Any
  before: Any
  after: Any
  first: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysOrValues:
  """Keys or values of a layer, or of a run of layers with a leading axis.

  Attributes:
    packed: the slots, `[..., B, K, P, H]` packed by `grid`.
    recent: ring buffer `[..., B, K, R, H]` in full precision, or None.
    grid: quantizes numbers.
  """

  packed: Packed
  recent: Any = None
  grid: Grid = dataclasses.field(default=Grid(), metadata=dict(static=True))

  @property
  def slots(self) -> int:
    return self.grid.tokens(self.packed)

  @property
  def ring(self) -> int:
    return 0 if self.recent is None else self.recent.shape[-2]

  def read(
    self, tokens: NewTokens, dtype: Any, shift: Shift | None
  ) -> Float[Array, "B K P H"]:
    x = self.grid.decode(self.packed)
    held = slot_positions(tokens.before, self.slots)
    if shift is not None:
      x = x + shift(held + tokens.first).swapaxes(1, 2)
    x = x.astype(dtype)
    if self.recent is None:
      return x
    if self.grid.packs_blocks:
      start = tokens.before // self.ring * self.ring
    else:
      start = jnp.maximum(tokens.before - self.ring, 0)
    # `where` per slot fuses with decoding; the ring's size divides the slots.
    *lead, _, dim = x.shape
    shape = *lead, self.slots // self.ring, self.ring, dim
    ring = jnp.broadcast_to(self.recent[:, :, None], shape).reshape(x.shape)
    recent = held >= start[:, None]
    return jnp.where(recent[:, None, :, None], ring.astype(dtype), x)

  def write(
    self,
    x: Float[Array, "B T K H"],
    tokens: NewTokens,
    shift: Shift | None,
  ) -> "KeysOrValues":
    if self.grid.packs_blocks:
      if x.shape[1] == 1:
        return self._write_one(x, tokens, shift)
      return self._write_blocks(x, tokens, shift)
    less = x
    if shift is not None:
      less = x - shift(tokens.index + tokens.first)
    new = self.grid.encode(less)
    last = tokens.after[:, None] - self.slots
    alive = (tokens.index >= 0) & (tokens.index >= last)
    packed = jax.tree.map(
      lambda old, y: _put(old, y, tokens.index, alive), self.packed, new
    )
    recent = self.recent
    if recent is not None:
      last = tokens.after[:, None] - self.ring
      alive = (tokens.index >= 0) & (tokens.index >= last)
      recent = _put(recent, x, tokens.index, alive)
    return dataclasses.replace(self, packed=packed, recent=recent)

  def _write_one(self, x, tokens, shift):
    """Writes one token per row; packs the ring buffers that it fills."""
    recent = _put(self.recent, x, tokens.index, tokens.index >= 0)
    whole = tokens.after % self.ring == 0
    whole &= tokens.after > tokens.before
    start = (tokens.after // self.ring - 1) * self.ring

    def packed(recent):
      return self._encode(recent, start, tokens.first, shift)

    def nothing(recent):
      shapes = jax.eval_shape(packed, recent)
      return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

    # Only the new block passes through `cond`, which would copy a whole cache.
    new = jax.lax.cond(jnp.any(whole), packed, nothing, recent)
    return self._stored(recent, new, start[:, None], whole[:, None])

  def _write_blocks(self, x, tokens, shift):
    """Writes many tokens; packs every block that they complete."""
    ring, time = self.ring, x.shape[1]
    count = -(-(ring - 1 + time) // ring)
    first = tokens.before // ring
    pad = [(0, 0), (0, 0), (0, (count - 1) * ring), (0, 0)]
    staged = jnp.pad(self.recent, pad)
    at = tokens.index - first[:, None] * ring
    staged = _put(staged, x, at, tokens.index >= 0)
    block = first[:, None] + jnp.arange(count)
    done = tokens.after // ring
    # If there are more blocks than slots, keep the last ones.
    whole = (block < done[:, None]) & (
      block >= done[:, None] - self.slots // ring
    )
    new = self._encode(staged, first * ring, tokens.first, shift)
    kept = tokens.index >= done[:, None] * ring
    recent = _put(self.recent, x, tokens.index, kept)
    return self._stored(recent, new, block * ring, whole)

  def _encode(self, x, start, first, shift):
    """Packs `[B, K, S, H]`, whose first token has index `start`."""
    if shift is not None:
      index = start[:, None] + jnp.arange(x.shape[2])
      x = x - shift(index + first).swapaxes(1, 2)
    return self.grid.encode(x)

  def _stored(self, recent, new, start, whole):
    """Returns a copy with blocks that start at `start` `[B, X]` stored."""
    groups = self.ring // self.grid.group
    index = start[..., None] // self.grid.group + jnp.arange(groups)
    index = index.reshape(len(start), -1)
    alive = jnp.repeat(whole, groups, axis=1)
    packed = jax.tree.map(
      lambda old, y: _put(old, y.swapaxes(1, 2), index, alive),
      self.packed,
      new,
    )
    return dataclasses.replace(self, packed=packed, recent=recent)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedLayer(SlotCache):
  """Quantized counterpart of `LayerCache`.

  Attributes:
    sinks: the first keys and values, `[..., B, K, n, H]` each, unquantized; or
      None.
    shifted: whether the keys' bias is subtracted before packing.
  """

  k: KeysOrValues
  v: KeysOrValues
  sinks: Any = None
  shifted: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @property
  def first(self) -> int:
    return 0 if self.sinks is None else self.sinks[0].shape[-2]

  @property
  def slots(self) -> int:
    return self.first + self.k.slots

  def extend(
    self,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    fresh: bool,
    window: int | None = None,
    bias: Shift | None = None,
  ) -> tuple["QuantizedLayer", Array, Array, Array | None]:
    """Writes tokens and returns keys and values, like `LayerCache.extend`.

    Args:
      k, v, positions, length, fresh, window: see `LayerCache.extend`.
      bias: positions -> the keys' bias; used if `shifted`.
    """
    shift = bias if self.shifted else None
    tokens = self._tokens(positions, length)
    if fresh:
      written = self._write(k, v, positions, tokens, shift)
      return written, k, v, None
    keys = self.k.read(tokens, k.dtype, shift)
    values = self.v.read(tokens, v.dtype, None)
    held = slot_positions(tokens.before, self.k.slots)
    # The barrier orders reads before writes, so that the write needs no copy.
    keys, values, old = jax.lax.optimization_barrier((keys, values, self))
    written = old._write(k, v, positions, tokens, shift)
    one = k.shape[1] == 1
    if one:  # overwrites a token that is outside of every window
      index = jnp.where(tokens.index < 0, -1, tokens.index % self.k.slots)
      here = jnp.arange(self.k.slots) == index
      here = here[:, None, :, None]
      keys = jnp.where(here, k.swapaxes(1, 2), keys)
      values = jnp.where(here, v.swapaxes(1, 2), values)
      held = slot_positions(tokens.after, self.k.slots)
    held = jnp.where(held >= 0, held + self.first, -1)
    parts = [(keys.swapaxes(1, 2), values.swapaxes(1, 2), held)]
    if self.sinks is not None:
      # With several tokens, new sinks are already among `k` and `v`: read the
      # old sinks.
      sinks = (written if one else old).sinks
      seen = length if one else length - jnp.sum(positions >= 0, axis=-1)
      place = jnp.arange(self.first)
      place = jnp.where(place < seen[:, None], place, -1)
      sinks = tuple(x.swapaxes(1, 2).astype(k.dtype) for x in sinks)
      parts.insert(0, (*sinks, place))
    if not one:
      parts.append((k, v, positions))
    keys, values, held = (
      x[0] if len(x) == 1 else jnp.concatenate(x, axis=1)
      for x in zip(*parts, strict=True)
    )
    return written, keys, values, held

  def _tokens(self, positions, length):
    before = length - jnp.sum(positions >= 0, axis=-1)
    index = jnp.where(positions >= 0, positions - self.first, -1)
    before, after = (jnp.maximum(n - self.first, 0) for n in (before, length))
    return NewTokens(index, before, after, self.first)

  def _write(self, k, v, positions, tokens, shift):
    sinks = self.sinks
    if sinks is not None:
      alive = (positions >= 0) & (positions < self.first)
      sinks = tuple(
        _put(old, new, positions, alive)
        for old, new in zip(sinks, (k, v), strict=True)
      )
    written = self.k.write(k, tokens, shift), self.v.write(v, tokens, None)
    return QuantizedLayer(*written, sinks, self.shifted)


def _put(
  old: Array, new: Array, index: Int[Array, "B T"], alive: Array
) -> Array:
  """Returns `old` `[B, K, S, ...]` with `new` `[B, T, K, ...]` written.

  Args:
    new: the values to write.
    index: index of each value; its slot is `index mod S`.
    alive: mask of values to write, at most one per slot.
  """
  slots = old.shape[2]
  at = jnp.where(alive, jnp.mod(index, slots), slots)  # outside: dropped
  row = jnp.arange(new.shape[0])[:, None]
  return old.at[row, :, at].set(new.astype(old.dtype), mode="drop")
