"""Attention calls of a layer: context, sharding and selection of queries."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention import api, sharded
from kernels_pallas.masks import Mask
from research import sharding, weights
from research.nn import decode_attention
from research.typing import Array, Float, Int, Params, Shaped, UserError


@dataclasses.dataclass(frozen=True)
class AttentionContext:
  """What a layer passes to its cache besides queries, keys and values.

  Attributes:
    positions: `[B, T]`, positions of the new tokens, negative for padding.
    queries: `[B, N]`, positions of the queries, a subset of the new tokens.
    length: `[B]`, number of tokens in each row, including the new ones.
    mask: the attention mask, including the layer's window.
    fresh: whether the cache was empty before this call.
    window: size of the layer's attention window in tokens, or None.
    bias: returns the bias of keys at given positions, for caches that remove it
      before quantization.
    scale, softcap: of the attention logits, see `flash_attention`.
  """

  positions: Any
  queries: Any
  length: Any
  mask: Mask
  fresh: bool
  window: int | None = None
  bias: Callable[..., Any] | None = None
  scale: float | None = None
  softcap: float | None = None

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments for the attention kernels."""
    return {"scale": self.scale, "softcap": self.softcap}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("k", "v", "positions"),
  meta_fields=("in_order",),
)
@dataclasses.dataclass(frozen=True)
class KeysValues:
  """What the queries of a layer, and of those that share it, attend to.

  Attributes:
    k, v: `[B, S, K, H]`.
    positions: `[B, S]`, of the keys, -1 for none; None if they are those of the
      new tokens.
    in_order: whether they are a cache's, see `SlotCache.in_order`.
  """

  k: Any
  v: Any
  positions: Any = None
  in_order: bool = False


def attend_to(
  q: Float[Array, "B Q N H"], found: KeysValues, context: AttentionContext
) -> Float[Array, "B Q N H"]:
  """Returns the attention output of new tokens' queries.

  Args:
    q: of the new tokens, or of a subset.
    found: keys and values, those of the new tokens included.
    context: positions, mask and options of the call.
  """
  mask = context.mask
  if found.positions is not None:
    mask = with_positions(mask, context.queries, found.positions)
  single_token = found.in_order and not context.fresh and q.shape[1] == 1
  single_token = single_token and context.positions.shape[1] == 1
  if single_token and decode_attention.has_kernel(q, found.k, mask):
    return decode_attention.attend_one(
      q, found.k, found.v, context.positions, **context.options
    )
  return attend(q, found.k, found.v, mask=mask, **context.options)


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  mask: Mask,
  **options: Any,
) -> Float[Array, "B T N H"]:
  """Returns `flash_attention`, computed under a mesh on each device's shard.

  Batch rows and heads are never gathered. Communication along the sequence
  depends on the mesh axis: `sequence` all-gathers keys and values, `ring`
  passes them from device to device, `ulysses` exchanges tokens for heads (an
  all-to-all). If a cache provides more keys than queries, every device holds
  all keys.

  Args:
    q, k, v: queries, keys and values.
    mask: the attention mask.
    **options: see `flash_attention`.

  Raises:
    UserError: `ulysses` does not divide the heads of a device.
  """
  if not sharding.is_cut():
    return api.flash_attention(q, k, v, mask=mask, **options)
  cut = _cut(q.shape, k.shape)
  return sharded.sharded_attention(q, k, v, mask=mask, sharding=cut, **options)


def _cut(
  queries: tuple[int, ...], keys: tuple[int, ...]
) -> sharded.AttentionSharding:
  names = ("batch", "length", "heads", None)
  batch, tokens, heads, _ = sharding.activation_axes(queries, *names)
  sizes = jax.sharding.get_abstract_mesh().shape
  apart = math.prod(sizes[a] for a in heads)
  exchanged = queries[1] == keys[1] and "ulysses" in tokens
  if exchanged and queries[2] // apart % sizes["ulysses"]:
    raise UserError(
      f"Layout.ulysses: found {sizes['ulysses']} for {queries[2]} heads over"
      f" {apart} devices, expected a divisor of the heads of each.\nLayout.ring"
      " and Layout.sequence need none."
    )
  ways = {"length": "sequence", "ring": "ring", "ulysses": "ulysses"}
  return sharded.AttentionSharding(
    batch,
    heads=heads,
    **{
      way: tuple(a for a in tokens if a == axis) for way, axis in ways.items()
    },
  )


def take_tokens(
  x: Shaped[Array, "B T ..."], keep: Int[Array, "B N"] | None
) -> Shaped[Array, "B N ..."]:
  """Selects tokens of each row by index; None selects all."""
  if keep is None:
    return x
  index = keep.reshape(*keep.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def select_queries(mask: Mask, keep: Int[Array, "B N"], length: int) -> Mask:
  """Returns `mask` restricted to selected queries.

  Args:
    mask: of `length` queries and keys, by index or by position; not a block
      diffusion mask, which is defined by indices only.
    keep: indices of the selected queries.
    length: number of tokens in a row.
  """
  mask = sharded.with_positions(mask, length, length)

  def cut(x):
    if x is None:
      return None
    return take_tokens(jnp.broadcast_to(x, (keep.shape[0], length)), keep)

  bounds = mask.bounds
  if bounds is not None:
    bounds = jnp.take_along_axis(bounds, keep[:, None], axis=2)
  return dataclasses.replace(
    mask,
    q_positions=cut(mask.q_positions),
    q_segments=cut(mask.q_segments),
    bounds=bounds,
  )


def can_select_tokens(
  keep: Int[Array, "B N"] | None,
  mask: Mask,
  layers: Any,
  shape: Sequence[int],
  params: Params,
) -> bool:
  """Whether the last layer can compute selected tokens only.

  Not if all tokens are selected, the mesh shards the tokens of a row, the mask
  is a block diffusion mask, a cache requires a query for every new key, or a
  weight rounds with a scale that all tokens share (`weights.row_wise`).

  Args:
    keep: indices of the selected tokens; None for all.
    mask: the attention mask.
    layers: the layers' caches, or None.
    shape: of the layer's input, `[B, T, D]`.
    params: the layer's parameters.
  """
  if keep is None or keep.shape[1] >= shape[1]:
    return False
  if mask.kind == "block_diffusion" or not weights.row_wise(params):
    return False
  if (
    sharding.is_cut()
    and sharding.activation_axes(shape[:2], "batch", "length")[1]
  ):
    return False
  kinds = jax.tree.leaves(layers, is_leaf=lambda x: hasattr(x, "some_queries"))
  return all(layer.some_queries for layer in kinds)


def with_positions(
  mask: Mask, queries: Int[Array, "B T"], keys: Int[Array, "B S"]
) -> Mask:
  """Returns `mask` for tokens at the given positions; -1 marks padding."""
  return dataclasses.replace(mask, q_positions=queries, kv_positions=keys)
