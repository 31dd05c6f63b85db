"""Counter-based dropout: any tile regenerates its mask, on any backend.

Whether a probability is kept depends on (seed, batch row, query head, query
index, key index) alone, so results do not depend on block sizes, and the
backward pass needs no stored mask. The bits are murmur3's 32-bit finalizer
(Appleby, public domain) of the indices, a few integer operations per score.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, Integer, UInt32


def keep(
  seed: Integer[ArrayLike, ""],
  rate: float,
  b: Int[Array, "..."],
  h: Int[Array, "..."],
  i: Int[Array, "..."],
  j: Int[Array, "..."],
) -> Bool[Array, "..."]:
  """Returns whether each probability is kept.

  Args:
    seed: A 32-bit integer.
    rate: Fraction of probabilities to drop, in [0, 1).
    b: Batch rows; all four index arrays broadcast against each other.
    h: Query heads.
    i: Query indices.
    j: Key indices.

  Returns:
    Bool, of the broadcast shape, true with probability 1 - rate.
  """
  row = jnp.asarray(seed).astype(jnp.uint32)
  for index in (b, h, i):
    row = _mix(row ^ _mix(index.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
  bits = _mix(row ^ _mix(j.astype(jnp.uint32) + jnp.uint32(0x7F4A7C15)))
  return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
