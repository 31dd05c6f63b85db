"""Decode attention: one new token per row attends to the key/value cache.

This is the attention of every autoregressive decoding step. On devices for
which `kernels_pallas.decode_attention` has a kernel, each row reads only its
own valid keys. Elsewhere a step is ordinary attention with a single query.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention import sharded
from kernels_pallas.decode_attention.api import choose, decode_attention
from kernels_pallas.decode_attention.work import Cache
from kernels_pallas.masks import Mask
from research import sharding
from research.typing import Array, Float, Int


def has_kernel(
  q: Float[Array, "B 1 N H"], k: Float[Array, "B S K H"], mask: Mask
) -> bool:
  """Returns whether a decode kernel supports this step and mask.

  Args:
    q: queries.
    k: keys of the whole cache; values must have the same dtype and head dim.
    mask: the attention mask, by positions.
  """
  left, right = mask.window
  # A ring buffer is as long as its window: every key in it is visible.
  sees_all = left is None or left + 1 >= k.shape[1]
  plain = mask.kind == "causal" and right is None and mask.q_segments is None
  if not (plain and sees_all):
    return False
  B, S, K, H = k.shape
  line = jax.ShapeDtypeStruct((B, K, S, H), k.dtype)
  if choose(q.dtype, S, Cache(line, line))[0] == "xla":
    return False
  sizes, cut = jax.sharding.get_abstract_mesh().shape, _cut(q.shape)
  parts = 1
  for axis in cut.heads:
    parts *= sizes[axis]
  return K % parts == 0


def attend_one(
  q: Float[Array, "B 1 N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  positions: Int[Array, "B 1"],
  **options: Any,
) -> Float[Array, "B 1 N H"]:
  """Returns the attention output of one new token per row.

  The token attends to the row's cache, which already includes the token itself.
  Under a mesh, each device computes its own rows and heads. The slots hold
  positions from 0 on or, in a full ring buffer, the last ones in any order.

  Args:
    q: queries.
    k: keys of the whole cache, position `p` in slot `p` modulo `S`.
    v: values.
    positions: position of each query, the last one in the cache; -1 for
      padding, which attends to nothing.
    **options: see `decode_attention`.
  """
  lengths = jnp.clip(positions[:, 0] + 1, 0, k.shape[1])
  if not sharding.is_cut():
    y = decode_attention(q[:, 0], k, v, lengths, **options)
  else:
    y = sharded.sharded_decode_attention(
      q[:, 0], k, v, lengths, sharding=_cut(q.shape), **options
    )
  return y[:, None]


def _cut(shape: tuple[int, ...]) -> sharded.DecodeSharding:
  if not sharding.is_cut():
    return sharded.DecodeSharding()
  rows, _, heads, _ = sharding.activation_axes(
    shape, "batch", "length", "heads", None
  )
  return sharded.DecodeSharding(rows, heads)
