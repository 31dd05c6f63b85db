"""Tile sizes of the blockwise backend, chosen for a CPU's caches.

A tile is scored for all batch rows and heads at once, so the more heads there
are, the fewer tokens it has. `SCORES_PER_TILE` was measured on two cores with 1
MiB of cache each, 1 to 36 heads of dim 64, 256 to 8,192 tokens: half as many
scores cost more calls of small matmuls, twice as many leave the cache.
"""

from kernels_pallas.flash_attention.spec import Blocks, Operands

SCORES_PER_TILE = 5 * 2**18
"""Scores per tile, over all rows and heads; 5 MiB in float32."""

MIN_QUERIES, MAX_QUERIES = 128, 512
"""Queries per tile. Fewer make matmuls slow, more waste work if causal."""

UNROLLED_CAUSAL_QUERIES, MAX_UNROLLED_CAUSAL = 64, 512
"""Queries per tile, and the largest T, where blocks skip keys and are many.

Measured with a causal mask, forward and backward, against loops over tiles: 256
tokens with 48 heads in all take half the time; 512 tokens with 24 or 72 heads
take 0.8 and 0.9 times as long.
"""

MIN_KEYS, MIN_KEY_TILES = 256, 8
"""Minimum keys per tile, and a fraction of S: where a mask skips some keys,
tiles larger than S / SPARE are halved, since tiles on the mask's edge waste
work.

Measured at 2,048 tokens, causal, forward and backward: with 4 heads 512 x 256
is 1.09 and 1.13 times as fast as 512 x 512, with 9 heads 256 x 256 is 1.2 times
as fast as 256 x 512.
"""

MAX_UNROLLED = 1024
"""Most queries to unroll: compile time grows with the number of blocks."""


def default_blocks(x: Operands) -> Blocks:
  """Returns the default tile sizes of a call.

  Few tokens are unrolled, with each block of queries against all its keys; if a
  mask lets blocks skip keys, the blocks are small.
  """
  (B, T, N, H), (S, K) = x.q.shape, x.k.shape[1:3]
  room = max(1, SCORES_PER_TILE // (B * N))
  # So few queries have no more scores than K has elements.
  few = T * N <= K * H and T <= MIN_QUERIES
  whole = x.mask.key_range(0, min(T, MIN_QUERIES), T, S) == (0, S)
  if few or (T <= MAX_UNROLLED and min(T, MIN_QUERIES) * S <= room):
    q = min(MAX_QUERIES, _power(room // S)) if whole else MIN_QUERIES
    return Blocks(max(q, MIN_QUERIES), MAX_QUERIES, unroll=max(T, S))
  if (
    not whole
    and T <= MAX_UNROLLED_CAUSAL
    and 3 * room >= UNROLLED_CAUSAL_QUERIES * S
  ):
    return Blocks(UNROLLED_CAUSAL_QUERIES, MAX_QUERIES, unroll=max(T, S))
  q = min(max(_power(room // MAX_QUERIES), MIN_QUERIES), MAX_QUERIES)
  rows = min(T, q)
  k = min(
    max(_power(room // rows), MIN_KEYS), 2 * MAX_QUERIES * MAX_QUERIES // rows
  )
  if not whole and k > max(S // MIN_KEY_TILES, MIN_KEYS):
    k //= 2
  return Blocks(q, k, unroll=0)


def _power(n: int) -> int:
  """Returns the largest power of two that is at most `n`, or 1."""
  return 2 ** max(n.bit_length() - 1, 0) if n > 0 else 1
