"""A layer's keys and values in few bits: packed tokens, and recent ones whole.

Of `N` tokens, those of a grid with groups of tokens are packed `R` at a time:
the first `floor(N / R) R` are, and the rest waits in a ring of `R` slots. A
grid of single tokens packs each when it comes and the ring holds the last `R`.
A token is met as the cache was before it: what is packed by it, later ones
read. The first few tokens of a row (attention's sinks) may stay whole for good.

Shapes never change, so one compiled step serves every length.
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
"""What keys at given positions have in common, and is not packed."""


@dataclasses.dataclass(frozen=True)
class Tokens:
  """New tokens of a call, counted from the first one that is packed.

  Attributes:
    index: `[B, T]`, negative where there is nothing to pack.
    before, after: `[B]`, tokens before the call and after it.
    first: position of index 0.
  """

  index: Any
  before: Any
  after: Any
  first: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
  """Keys or values of a layer, or of a run of them behind a leading axis.

  Attributes:
    packed: of the slots, `[..., B, K, P, H]` in the form of `grid`.
    recent: a ring `[..., B, K, R, H]` in full precision, or None.
    grid: how numbers are packed.
  """

  packed: Packed
  recent: Any = None
  grid: Grid = dataclasses.field(default=Grid(), metadata=dict(static=True))

  @property
  def slots(self) -> int:
    """Returns P."""
    return self.grid.tokens(self.packed)

  @property
  def ring(self) -> int:
    """Returns R."""
    return 0 if self.recent is None else self.recent.shape[-2]

  def read(
    self, tokens: Tokens, dtype: Any, shift: Shift | None
  ) -> Float[Array, "B K P H"]:
    """Returns the numbers of all slots, before a call's tokens are written."""
    x = self.grid.decode(self.packed)
    held = slot_positions(tokens.before, self.slots)
    if shift is not None:
      x = x + shift(held + tokens.first).swapaxes(1, 2)
    x = x.astype(dtype)
    if self.recent is None:
      return x
    if self.grid.by_blocks:
      start = tokens.before // self.ring * self.ring
    else:
      start = jnp.maximum(tokens.before - self.ring, 0)
    # A choice for each slot, which fuses with decoding; rings divide slots.
    *lead, _, dim = x.shape
    shape = *lead, self.slots // self.ring, self.ring, dim
    ring = jnp.broadcast_to(self.recent[:, :, None], shape).reshape(x.shape)
    recent = held >= start[:, None]
    return jnp.where(recent[:, None, :, None], ring.astype(dtype), x)

  def write(
    self,
    x: Float[Array, "B T K H"],
    tokens: Tokens,
    shift: Shift | None,
  ) -> "Side":
    """Returns the side with a call's tokens in it."""
    if self.grid.by_blocks:
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
    """Writes a token a row; packs the rings that it completes."""
    recent = _put(self.recent, x, tokens.index, tokens.index >= 0)
    whole = tokens.after % self.ring == 0
    whole &= tokens.after > tokens.before
    start = (tokens.after // self.ring - 1) * self.ring

    def packed(recent):
      return self._encode(recent, start, tokens.first, shift)

    def nothing(recent):
      shapes = jax.eval_shape(packed, recent)
      return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

    # Only the block is computed on condition: a whole cache that passes through
    # would be copied.
    new = jax.lax.cond(jnp.any(whole), packed, nothing, recent)
    return self._stored(recent, new, start[:, None], whole[:, None])

  def _write_blocks(self, x, tokens, shift):
    """Writes many tokens; packs every block that is complete with them."""
    ring, time = self.ring, x.shape[1]
    count = -(-(ring - 1 + time) // ring)
    first = tokens.before // ring
    pad = [(0, 0), (0, 0), (0, (count - 1) * ring), (0, 0)]
    staged = jnp.pad(self.recent, pad)
    at = tokens.index - first[:, None] * ring
    staged = _put(staged, x, at, tokens.index >= 0)
    block = first[:, None] + jnp.arange(count)
    done = tokens.after // ring
    # Of more blocks than there is room for, the last ones stay.
    whole = (block < done[:, None]) & (
      block >= done[:, None] - self.slots // ring
    )
    new = self._encode(staged, first * ring, tokens.first, shift)
    kept = tokens.index >= done[:, None] * ring
    recent = _put(self.recent, x, tokens.index, kept)
    return self._stored(recent, new, block * ring, whole)

  def _encode(self, x, start, first, shift):
    """Returns `[B, K, S, H]` packed, the first of them at index `start`."""
    if shift is not None:
      index = start[:, None] + jnp.arange(x.shape[2])
      x = x - shift(index + first).swapaxes(1, 2)
    return self.grid.encode(x)

  def _stored(self, recent, new, start, whole):
    """Returns the side with blocks that start at `[B, X]` in their slots."""
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
  """What `LayerCache` is, in few bits.

  Attributes:
    k, v: keys and values.
    sinks: the first keys and values, `[..., B, K, n, H]` each, or None.
    shifted: whether the bias of keys is subtracted before they are packed.
  """

  k: Side
  v: Side
  sinks: Any = None
  shifted: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @property
  def first(self) -> int:
    """How many tokens of a row are sinks."""
    return 0 if self.sinks is None else self.sinks[0].shape[-2]

  @property
  def slots(self) -> int:
    """How many positions it holds."""
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
    """Returns what `LayerCache.extend` does.

    Args:
      k, v, positions, length, fresh, window: as there.
      bias: the keys' bias at positions, asked for if `shifted`.
    """
    shift = bias if self.shifted else None
    tokens = self._tokens(positions, length)
    if fresh:
      written = self._write(k, v, positions, tokens, shift)
      return written, k, v, None
    keys = self.k.read(tokens, k.dtype, shift)
    values = self.v.read(tokens, v.dtype, None)
    held = slot_positions(tokens.before, self.k.slots)
    # What is written must not wait in a copy for what is still to be read.
    keys, values, old = jax.lax.optimization_barrier((keys, values, self))
    written = old._write(k, v, positions, tokens, shift)
    one = k.shape[1] == 1
    if one:  # in the place of one that no window reaches any more
      index = jnp.where(tokens.index < 0, -1, tokens.index % self.k.slots)
      here = jnp.arange(self.k.slots) == index
      here = here[:, None, :, None]
      keys = jnp.where(here, k.swapaxes(1, 2), keys)
      values = jnp.where(here, v.swapaxes(1, 2), values)
      held = slot_positions(tokens.after, self.k.slots)
    held = jnp.where(held >= 0, held + self.first, -1)
    parts = [(keys.swapaxes(1, 2), values.swapaxes(1, 2), held)]
    if self.sinks is not None:
      # A sink that is new in this call is in both, unless the call is of one.
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
    return Tokens(index, before, after, self.first)

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
  """Returns `old` `[B, K, S, ...]` with `new` `[B, T, K, ...]` in it.

  Args:
    old: slots.
    new: what to write.
    index: of each; its slot is `index mod S`.
    alive: which to write, no two of them in one slot.
  """
  slots = old.shape[2]
  at = jnp.where(alive, jnp.mod(index, slots), slots)  # outside: dropped
  row = jnp.arange(new.shape[0])[:, None]
  return old.at[row, :, at].set(new.astype(old.dtype), mode="drop")
