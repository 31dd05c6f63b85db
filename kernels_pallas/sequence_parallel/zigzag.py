"""Zig-zag token order, which gives every shard the same causal work.

In text order the last of n shards of queries sees all keys and the first one
almost none. In zig-zag order the text is split into 2 n chunks, and shard r
holds chunks r and 2 n - 1 - r, so that each shard sees half of all pairs (as in
Llama 3's context parallelism, arXiv:2407.21783, section 3.3.2). Masks use
positions, which are permuted with the tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kernels_pallas.flash_attention.tpu.tile_sizes import Tiles, fit

MeshAxes = tuple[str, ...]
"""Mesh axes, treated as one; the last is the fastest."""


def zigzag(length: int, shards: int) -> Int[np.ndarray, " T"]:
  """Returns the zig-zag permutation: `x[:, zigzag(T, n)]` reorders a batch.

  `np.argsort` of it is the inverse permutation.

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


def to_zigzag(x: Any, axis: MeshAxes) -> Any:
  """Permutes shards from text order to zig-zag order, under `jax.shard_map`.

  Communicates by two permutations of half a shard each.

  Args:
    x: Arrays [B, T / n, ...], T / n even.
    axis: Mesh axes that shard T.
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


def from_zigzag(x: Any, axis: MeshAxes) -> Any:
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
  """Concatenates the halves, the lower chunk first; swapped on odd shards."""
  swap = jax.lax.axis_index(axis) % 2 == 1
  first, second = jnp.where(swap, odd, even), jnp.where(swap, even, odd)
  return jnp.concatenate([first, second], axis=1)


def fit_half_shards(blocks: Any, T: int, S: int) -> Any:
  """Fits TPU tiles to half a shard, so that none spans both of its chunks.

  A tile across both would hold early and late tokens, and be visited for
  either.

  Args:
    blocks: A backend's tile sizes; types other than `Tiles` are unchanged.
    T: Queries per shard.
    S: Keys per shard.
  """
  if not isinstance(blocks, Tiles):
    return blocks
  half = (-(-T // 2), -(-S // 2))
  names = ("forward", "dkv", "dq")
  fitted = {name: fit(getattr(blocks, name), *half) for name in names}
  return dataclasses.replace(blocks, **fitted)
