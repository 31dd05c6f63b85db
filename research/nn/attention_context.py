"""Attention as a layer asks for it: by the kernels, on each device's part."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention import api, sharded
from kernels_pallas.masks import Mask
from research import sharding
from research.typing import Array, Float, Int, Shaped, UserError


@dataclasses.dataclass(frozen=True)
class AttentionContext:
  """What a layer tells its cache beside queries, keys and values.

  Attributes:
    positions: `[B, T]` of the new tokens, negative for padding.
    queries: `[B, N]`, those of the tokens that look, among the new ones.
    length: `[B]`, tokens of each row, the new ones included.
    mask: what may see what, the layer's window included.
    fresh: whether the cache was empty.
    window: how many positions the layer looks back on, or None.
    bias: of keys, by positions; a cache may want to know.
    scale, softcap: of the logits, as of `flash_attention`.
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
    """What kernels take by name."""
    return {"scale": self.scale, "softcap": self.softcap}


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  mask: Mask,
  **options: Any,
) -> Float[Array, "B T N H"]:
  """Returns `flash_attention`, on each device's part under a mesh.

  Rows and heads are never gathered. Tokens cross the devices as their axis of
  the mesh says: along `sequence` keys and values are gathered for this layer,
  along `ring` they pass by all devices, along `ulysses` they are exchanged for
  other heads'. Where a cache gives more keys than queries, every device has all
  of them.

  Args:
    q, k, v: queries, keys and values.
    mask: what may see what.
    **options: see `flash_attention`.

  Raises:
    UserError: `ulysses` does not divide the heads of a device.
  """
  if not sharding.is_cut():
    return api.flash_attention(q, k, v, mask=mask, **options)
  cut = _cut(q.shape, k.shape)
  return sharded.sharded_attention(q, k, v, mask=mask, cut=cut, **options)


def _cut(queries: tuple[int, ...], keys: tuple[int, ...]) -> sharded.Cut:
  names = ("batch", "length", "heads", None)
  batch, tokens, heads, _ = sharding.cuts(queries, *names)
  sizes = jax.sharding.get_abstract_mesh().shape
  apart = math.prod(sizes[a] for a in heads)
  exchanged = queries[1] == keys[1] and "ulysses" in tokens
  if exchanged and queries[2] // apart % sizes["ulysses"]:
    raise UserError(
      f"Layout.ulysses: found {sizes['ulysses']} for {queries[2]} heads over"
      f" {apart} devices, expected to divide them.\nLayout.ring and"
      " Layout.sequence ask nothing of heads."
    )
  ways = {"length": "sequence", "ring": "ring", "ulysses": "ulysses"}
  return sharded.Cut(
    batch,
    heads=heads,
    **{
      way: tuple(a for a in tokens if a == axis) for way, axis in ways.items()
    },
  )


def take(
  x: Shaped[Array, "B T ..."], keep: Int[Array, "B N"] | None
) -> Shaped[Array, "B N ..."]:
  """Returns some tokens of each row, by their index; None for all."""
  if keep is None:
    return x
  index = keep.reshape(*keep.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def of_queries(mask: Mask, keep: Int[Array, "B N"], length: int) -> Mask:
  """Returns `mask` of some queries alone.

  Args:
    mask: of `length` queries and as many keys, by index or by position; not of
      block diffusion, whose rule is of indices alone.
    keep: the queries.
    length: of a row.
  """
  mask = sharded.positioned(mask, length, length)

  def cut(x):
    if x is None:
      return None
    return take(jnp.broadcast_to(x, (keep.shape[0], length)), keep)

  return dataclasses.replace(
    mask, q_positions=cut(mask.q_positions), q_segments=cut(mask.q_segments)
  )


def may_keep(
  keep: Int[Array, "B N"] | None, mask: Mask, layers: Any, shape: Sequence[int]
) -> bool:
  """Whether a last layer can compute some tokens alone.

  Not where they are all, or tokens of a row are on several devices, or who sees
  whom is a rule of all queries, or a cache takes no other queries than keys.

  Args:
    keep: the tokens, by their index; None for all.
    mask: what may see what.
    layers: caches of layers, or None.
    shape: of what goes into the layer, `[B, T, D]`.
  """
  if keep is None or keep.shape[1] >= shape[1]:
    return False
  if mask.kind == "block_diffusion":
    return False
  if sharding.is_cut() and sharding.cuts(shape[:2], "batch", "length")[1]:
    return False
  kinds = jax.tree.leaves(layers, is_leaf=lambda x: hasattr(x, "some_queries"))
  return all(layer.some_queries for layer in kinds)


def at(mask: Mask, queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Mask:
  """Returns `mask` over tokens at the given positions, -1 for none."""
  return dataclasses.replace(mask, q_positions=queries, kv_positions=keys)
