"""A single new token a row against the cache, by a kernel made for it.

What generation repeats. A row reads the keys that it has and no more, on
devices that `decode_attention` has a kernel for; elsewhere the step is
attention with one query.
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
  """Returns whether a kernel computes this step under this mask.

  Args:
    q: queries.
    k: keys of the whole cache; values are taken to be of their dtype and dim.
    mask: what may see what, by positions.
  """
  left, right = mask.window
  # A ring is as long as its window: it holds no key that is out of sight.
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
  """Returns what each row's token sees of the row's cache, itself included.

  On each device's rows and heads under a mesh. Slots hold the positions from 0
  on, or, in a ring that is full, the last ones in any order.

  Args:
    q: queries.
    k: keys of the whole cache, position `p` in slot `p` modulo `S`.
    v: values.
    positions: of the queries, the last that the cache holds; -1 for padding,
      which sees nothing.
    **options: see `decode_attention`.
  """
  lengths = jnp.clip(positions[:, 0] + 1, 0, k.shape[1])
  if not sharding.is_cut():
    y = decode_attention(q[:, 0], k, v, lengths, **options)
  else:
    y = sharded.sharded_decode_attention(
      q[:, 0], k, v, lengths, cut=_cut(q.shape), **options
    )
  return y[:, None]


def _cut(shape: tuple[int, ...]) -> sharded.Cut:
  if not sharding.is_cut():
    return sharded.Cut()
  rows, _, heads, _ = sharding.cuts(shape, "batch", "length", "heads", None)
  return sharded.Cut(rows, heads)
