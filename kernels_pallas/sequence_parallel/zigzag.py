"""Tokens in an order that gives every shard the same causal work.

In the order of the text the last of n shards of queries sees all keys and the
first one almost none. In zig-zag order the text is cut into 2 n chunks and
shard r holds chunks r and 2 n - 1 - r: each then sees half of all pairs (as in
Llama 3's context parallelism, arXiv:2407.21783, section 3.3.2). Masks go by
positions, which travel with the tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kernels_pallas.flash_attention.tpu.tpu_tile_sizes import Tiles, fit

Names = tuple[str, ...]
"""Axes of a mesh, as one: the last of them is the fastest."""


def zigzag(length: int, shards: int) -> Int[np.ndarray, " T"]:
  """Which token stands where: `x[:, zigzag(T, n)]` reorders a batch.

  `np.argsort` of it leads back.

  Args:
    length: Tokens, T.
    shards: n.

  Raises:
    ValueError: 2 n does not divide T.
  """
  chunks = 2 * shards
  if length % chunks:
    raise ValueError(
      f"zig-zag order: found {length} tokens over {shards} shards, expected a "
      f"multiple of {chunks}"
    )
  of_shard = [(r, chunks - 1 - r) for r in range(shards)]
  return np.arange(length).reshape(chunks, -1)[np.ravel(of_shard)].reshape(-1)


def to_zigzag(x: Any, axis: Names) -> Any:
  """Shards in the order of the text to shards in zig-zag order.

  Two permutations of half a shard each; under `jax.shard_map`.

  Args:
    x: Arrays [B, T / n, ...], T / n even.
    axis: Axes that cut T.
  """
  n = jax.lax.axis_size(axis)
  # Shard r holds chunks 2 r and 2 r + 1. Chunk c belongs to shard c or
  # 2 n - 1 - c: every shard gets one even chunk and one odd one.
  homes = [
    [(r, min(2 * r + odd, 2 * n - 1 - 2 * r - odd)) for r in range(n)]
    for odd in (0, 1)
  ]

  def one(x):
    even, odd = (
      jax.lax.ppermute(half, axis, home)
      for half, home in zip(jnp.split(x, 2, axis=1), homes, strict=True)
    )
    return _in_turn(even, odd, axis)

  return jax.tree.map(one, x)


def from_zigzag(x: Any, axis: Names) -> Any:
  """The inverse of `to_zigzag`."""
  n = jax.lax.axis_size(axis)
  homes = [
    [(min(c, 2 * n - 1 - c), c // 2) for c in range(odd, 2 * n, 2)]
    for odd in (0, 1)
  ]

  def one(x):
    halves = jnp.split(_in_turn(*jnp.split(x, 2, axis=1), axis), 2, axis=1)
    halves = [
      jax.lax.ppermute(half, axis, home)
      for half, home in zip(halves, homes, strict=True)
    ]
    return jnp.concatenate(halves, axis=1)

  return jax.tree.map(one, x)


def _in_turn(even, odd, axis):
  """Both halves: the lower chunk r first; the other way on odd shards r."""
  swap = jax.lax.axis_index(axis) % 2 == 1
  first, second = jnp.where(swap, odd, even), jnp.where(swap, even, odd)
  return jnp.concatenate([first, second], axis=1)


def halves(blocks: Any, T: int, S: int) -> Any:
  """Tiles of which none spans both chunks of a shard.

  One that did would hold early and late tokens, and be visited for either.

  Args:
    blocks: Sizes of a backend; others than `Tiles` stay.
    T: Queries of a shard.
    S: Keys of a shard.
  """
  if not isinstance(blocks, Tiles):
    return blocks
  half = (-(-T // 2), -(-S // 2))
  names = ("forward", "dkv", "dq")
  fitted = {name: fit(getattr(blocks, name), *half) for name in names}
  return dataclasses.replace(blocks, **fitted)
