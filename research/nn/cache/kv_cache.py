"""The key/value cache: preallocated, and a ring buffer for windowed layers.

A slot is found by position, so rows of a batch may differ in length: position
`p` lives in slot `p` (or `p mod S` in a ring of `S` slots), and which slots
are alive follows from the row's length alone. Pure functions; a cache is
passed in and returned.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.nn import decode_attention
from research.nn.attention_context import AttentionContext, at, attend
from research.typing import Array, Float, Int


class Slots:
  """What a layer's caches share whose tokens lie in slots of their row.

  They say what new tokens look at (`extend`, as `LayerCache` has it); a layer
  asks them to `attend`, and so it may ask a cache of any other kind.

  Attributes:
    in_order: whether position `p` is in slot `p` modulo the slots, which the
      kernel for single tokens counts on.
    some_queries: whether some of the new tokens may look and others not.
  """

  in_order: ClassVar[bool] = False
  some_queries: ClassVar[bool] = True

  def attend(
    self,
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    call: AttentionContext,
  ) -> tuple[Any, Float[Array, "B Q N H"]]:
    """Returns the cache with new tokens in it, and what queries see.

    Args:
      q: of the new tokens, or of some of them.
      k, v: of the new tokens.
      call: what else there is to know.
    """
    cache, keys, values, held = self.extend(
      k,
      v,
      call.positions,
      call.length,
      fresh=call.fresh,
      window=call.window,
      bias=call.bias,
    )
    mask = call.mask if held is None else at(call.mask, call.queries, held)
    one = self.in_order and not call.fresh and k.shape[1] == 1
    if one and decode_attention.has_kernel(q, keys, mask):
      y = decode_attention.attend_one(
        q, keys, values, call.positions, **call.options
      )
    else:
      y = attend(q, keys, values, mask=mask, **call.options)
    return cache, y


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(Slots):
  """Keys and values of one layer, or of a run of them behind a leading axis.

  Heads come before slots: a head's keys lie together, as attention reads them.

  Attributes:
    k, v: `[..., B, K, S, H]`.
  """

  in_order: ClassVar[bool] = True
  k: Any
  v: Any

  @property
  def slots(self) -> int:
    """How many positions it holds."""
    return self.k.shape[-2]

  def read(self, dtype: Any) -> tuple[Array, Array]:
    """Returns keys and values as attention takes them, `[B, S, K, H]`."""
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
    """Returns the cache with new tokens in it, and what they may look at.

    That is keys and values `[B, S, K, H]` and their positions `[B, S]`, -1
    where there are none; None in place of them for the new tokens alone.

    Args:
      k, v: of the new tokens.
      positions: of the new tokens, negative for padding.
      length: tokens of each row, the new ones included.
      fresh: whether the cache was empty.
      window: how many positions the layer looks back on, or None.
      bias: of keys, which a cache may want to know; not this one.
    """
    del bias
    written = write(self, k, v, positions, length)
    if fresh:
      return written, k, v, None
    if k.shape[1] == 1 or window is None:
      # Nothing that this call still needs was overwritten.
      held = slot_positions(length, self.slots)
      return written, *written.read(k.dtype), held
    # A ring may have lost keys that the first new queries see: look at the
    # ring as it was, and at the new keys.
    before = length - jnp.sum(positions >= 0, axis=-1)
    held = slot_positions(before, self.slots)
    held = jnp.concatenate([held, positions], axis=1)
    keys, values = (
      jnp.concatenate([old, new], axis=1)
      for old, new in zip(self.read(k.dtype), (k, v), strict=True)
    )
    return written, keys, values, held


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What a model remembers of the tokens it has read.

  Attributes:
    length: `[B]`, tokens read by each row.
    layers: run name -> layer name -> `LayerCache` stacked over the run, or
      another class with its `slots` and `attend`.
    fresh: whether nothing has been written; a prefill then attends to its own
      keys only, with tiles that are known to be empty skipped.
  """

  length: Any
  layers: Any
  fresh: bool = dataclasses.field(default=True, metadata=dict(static=True))

  @property
  def capacity(self) -> int:
    """Positions that every layer can hold or has a window for."""
    layers = jax.tree.leaves(self.layers, is_leaf=lambda x: hasattr(x, "slots"))
    return max(layer.slots for layer in layers)


def slot_positions(length: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
  """Returns which position each slot holds, -1 where none."""
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
  """Returns the cache with new keys and values at their positions' slots.

  Args:
    cache: of one layer, `[B, K, S, H]`.
    k, v: of the new tokens.
    positions: of the new tokens; negative ones (padding) are not written.
    length: tokens of each row, the new ones included; positions that a ring
      has no room for any more are not written.
  """
  slots = cache.slots
  alive = (positions >= 0) & (positions >= length[:, None] - slots)
  slot = jnp.mod(positions, slots)

  def put(old, new):
    at = jnp.where(alive, slot, slots)  # outside: dropped
    row = jnp.arange(new.shape[0])[:, None]
    return old.at[row, :, at].set(new.astype(old.dtype), mode="drop")

  # Without the barrier XLA writes once for each reader, each into a copy of
  # the whole cache.
  written = jax.lax.optimization_barrier((put(cache.k, k), put(cache.v, v)))
  return LayerCache(*written)
