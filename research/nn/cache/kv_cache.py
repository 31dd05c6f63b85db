"""The key/value cache: preallocated; a ring buffer for windowed layers.

Rows of a batch may differ in length: position `p` is stored in slot `p` (or
`p mod S` in a ring of `S` slots), and the row's length determines which slots
are valid. All functions are pure: they take a cache and return a new one.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.nn.attention_context import (
  AttentionContext,
  KeysValues,
  attend_to,
)
from research.typing import Array, Float, Int


class SlotCache:
  """Base class of caches that store each row's tokens in slots of its own.

  Subclasses implement `extend` (see `LayerCache`), which returns the keys and
  values that new tokens attend to. An attention layer only calls `attend`, so
  other kinds of cache need to provide only that method and `slots`.

  Attributes:
    in_order: whether position `p` is stored in slot `p` modulo the number of
      slots, as the decode kernel requires.
    some_queries: whether the queries may be a subset of the new tokens.
  """

  in_order: ClassVar[bool] = False
  some_queries: ClassVar[bool] = True

  def attend(
    self,
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    context: AttentionContext,
  ) -> tuple[Any, Float[Array, "B Q N H"]]:
    """Appends new tokens and returns the cache and the attention output.

    Args:
      q: queries of the new tokens, or of a subset.
      k, v: keys and values of the new tokens.
      context: positions, mask and options of the call.
    """
    cache, keys_values = self.store(k, v, context)
    return cache, attend_to(q, keys_values, context)

  def store(
    self,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    context: AttentionContext,
  ) -> tuple[Any, KeysValues]:
    """Appends new tokens and returns the cache and what they attend to.

    Args:
      k, v, context: as for `attend`.
    """
    cache, keys, values, key_positions = self.extend(
      k,
      v,
      context.positions,
      context.length,
      fresh=context.fresh,
      window=context.window,
      bias=context.bias,
    )
    return cache, KeysValues(keys, values, key_positions, self.in_order)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(SlotCache):
  """Keys and values of one layer, or of a run of layers on a leading axis.

  Heads come before slots, so the keys of a head are contiguous in memory, as
  attention reads them.

  Attributes:
    k, v: `[..., B, K, S, H]`.
    ring: whether a windowed layer has slots for its window alone; else there is
      one for each position, which may be written again.
  """

  in_order: ClassVar[bool] = True
  k: Any
  v: Any
  ring: bool = dataclasses.field(default=True, metadata=dict(static=True))

  @property
  def slots(self) -> int:
    """The number of positions it can store."""
    return self.k.shape[-2]

  def read(self, dtype: Any) -> tuple[Array, Array]:
    """Returns keys and values in attention's layout, `[B, S, K, H]`."""
    return tuple(x.swapaxes(1, 2).astype(dtype) for x in (self.k, self.v))

  def extend(
    self,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    fresh: bool,
    window: int | None = None,
    bias: Any = None,
  ) -> tuple["LayerCache", Array, Array, Array | None]:
    """Appends new tokens and returns what they attend to.

    Args:
      k, v: keys and values of the new tokens.
      positions: positions of the new tokens, negative for padding.
      length: number of tokens in each row, including the new ones.
      fresh: whether the cache was empty.
      window: size of the layer's attention window in tokens, or None.
      bias: unused here; the bias of keys by position, for caches that need it.

    Returns:
      `(cache, keys, values, positions)`: keys and values `[B, S, K, H]` and
      their positions `[B, S]`, -1 for empty slots. `positions` is None if they
      are just the new tokens.
    """
    del bias
    written = write(self, k, v, positions, length)
    if fresh:
      return written, k, v, None
    if k.shape[1] == 1 or window is None or not self.ring:
      # This write has overwritten no key that the new queries attend to.
      key_positions = slot_positions(length, self.slots)
      return written, *written.read(k.dtype), key_positions
    # The write may have overwritten ring slots that the first new queries
    # attend to: use the ring as it was before, and the new keys.
    before = length - jnp.sum(positions >= 0, axis=-1)
    key_positions = slot_positions(before, self.slots)
    key_positions = jnp.concatenate([key_positions, positions], axis=1)
    keys, values = (
      jnp.concatenate([old, new], axis=1)
      for old, new in zip(self.read(k.dtype), (k, v), strict=True)
    )
    return written, keys, values, key_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The key/value caches of all layers of a model.

  Attributes:
    length: `[B]`, number of tokens read by each row.
    layers: run name -> layer name -> `LayerCache` stacked over the run, or
      another class with `slots` and `attend`.
    fresh: whether the cache is empty. A prefill then attends to its own keys
      only and skips tiles that are known to be masked.
  """

  length: Any
  layers: Any
  fresh: bool = dataclasses.field(default=True, metadata=dict(static=True))

  @property
  def capacity(self) -> int:
    """The largest number of positions that any layer can store."""
    layers = jax.tree.leaves(self.layers, is_leaf=lambda x: hasattr(x, "slots"))
    return max(layer.slots for layer in layers)


def take_rows(cache: Cache, rows: Int[Array, " N"]) -> Cache:
  """Returns the cache of N rows, each a copy of a row of `cache`.

  Args:
    cache: with rows of their own; pages are shared by a table instead
      (`research.generation.page_allocator`).
    rows: the row of each.
  """
  # Every array of every kind of layer has run, row, head first.
  layers = jax.tree.map(lambda x: jnp.take(x, rows, axis=1), cache.layers)
  return Cache(cache.length[rows], layers, cache.fresh)


def put_rows(cache: Cache, new: Cache, rows: Int[Array, " N"]) -> Cache:
  """Returns the cache with N of its rows replaced; inverts `take_rows`.

  Args:
    cache: any, of the capacity of `new`.
    new: N rows.
    rows: where each goes; one past the last row, or more: nowhere.
  """

  def put(old, x):
    return old.at[:, rows].set(x, mode="drop")

  layers = jax.tree.map(put, cache.layers, new.layers)
  length = cache.length.at[rows].set(new.length, mode="drop")
  return Cache(length, layers, cache.fresh)


def slot_positions(length: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
  """Returns the position stored in each slot, -1 for empty slots."""
  slot = jnp.arange(slots)
  last = length[:, None] - 1
  position = last - jnp.mod(last - slot, slots)
  return jnp.where(position >= 0, position, -1)


def write(
  cache: LayerCache,
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  positions: Int[Array, "B T"],
  length: Int[Array, "B"],
) -> LayerCache:
  """Writes new keys and values into the slots of their positions.

  Args:
    cache: cache of one layer, `[B, K, S, H]`.
    k, v: keys and values of the new tokens.
    positions: positions of the new tokens; negative ones (padding) are not
      written.
    length: number of tokens in each row, including the new ones; new tokens
      that a ring buffer would already have overwritten are not written.
  """
  slots = cache.slots
  alive = (positions >= 0) & (positions >= length[:, None] - slots)
  slot = jnp.mod(positions, slots)

  def put(old, new):
    at = jnp.where(alive, slot, slots)  # outside: dropped
    row = jnp.arange(new.shape[0])[:, None]
    return old.at[row, :, at].set(new.astype(old.dtype), mode="drop")

  # Without the barrier, XLA repeats the write for each consumer, each time into
  # a copy of the whole cache.
  written = jax.lax.optimization_barrier((put(cache.k, k), put(cache.v, v)))
  return LayerCache(*written, cache.ring)
