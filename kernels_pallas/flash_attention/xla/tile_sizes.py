"""Sizes of the blockwise backend's tiles, from what a CPU's caches hold.

A tile is scored for all heads of all rows at once, so the more heads there
are, the fewer tokens it has. `SCORES` was measured on two cores with 1 MiB of
cache each, 1 to 36 heads of 64, 256 to 8,192 tokens: half as many cost more
calls of small matmuls, twice as many leave the cache.
"""

from kernels_pallas.flash_attention.spec import Blocks, Operands

SCORES = 5 * 2**18
"""Of a tile, all heads and rows together; 5 MiB in float32."""

LEAST, MOST = 128, 512
"""Queries a tile. Matmuls are slow below, and a causal mask wastes above."""

NARROW, SHORT = 64, 512
"""Queries a tile, and the most of all, where blocks skip keys and are many.

Measured with a causal mask, forward and backward: 256 tokens of 48 heads in all
take half the time of loops over tiles, 512 of 24 or 72 take 0.8 and 0.9.
"""

FEWEST, SPARE = 256, 8
"""Keys a tile, at least, and the share of all keys above which a tile has half
as many where a mask skips some: a tile on the edge computes some in vain.

Measured at 2,048 tokens, causal, forward and backward: of 4 heads 512 x 256 is
1.09 and 1.13 times as fast as 512 x 512, of 9 256 x 256 1.2 times 256 x 512.
"""

UNROLLED = 1024
"""Most queries that are unrolled: compilation grows with their blocks."""


def fitted(x: Operands) -> Blocks:
  """The tiles of a call whose config says nothing.

  Few tokens are unrolled, a block of queries against all its keys; where a
  mask lets blocks skip keys, the blocks are small.
  """
  (B, T, N, H), (S, K) = x.q.shape, x.k.shape[1:3]
  room = max(1, SCORES // (B * N))
  # So few queries have no more scores than there are keys.
  few = T * N <= K * H and T <= LEAST
  whole = x.mask.key_range(0, min(T, LEAST), T, S) == (0, S)
  if few or (T <= UNROLLED and min(T, LEAST) * S <= room):
    q = min(MOST, _power(room // S)) if whole else LEAST
    return Blocks(max(q, LEAST), MOST, unroll=max(T, S))
  if not whole and T <= SHORT and 3 * room >= NARROW * S:
    return Blocks(NARROW, MOST, unroll=max(T, S))
  q = min(max(_power(room // MOST), LEAST), MOST)
  rows = min(T, q)
  k = min(max(_power(room // rows), FEWEST), 2 * MOST * MOST // rows)
  if not whole and k > max(S // SPARE, FEWEST):
    k //= 2
  return Blocks(q, k, unroll=0)


def _power(n: int) -> int:
  """The largest power of two that is at most `n`, or 1."""
  return 2 ** max(n.bit_length() - 1, 0) if n > 0 else 1
