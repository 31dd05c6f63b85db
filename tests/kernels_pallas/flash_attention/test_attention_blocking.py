"""Sizes of tiles: what fits, what is skipped, and that memory stays linear."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.spec import Blocks, Operands, Spec
from kernels_pallas.flash_attention.xla import blockwise_loops, tile_sizes
from kernels_pallas.masks import Mask


def operands(B, T, N, S, K=None, mask=None):
  q = jax.ShapeDtypeStruct((B, T, N, 64), jnp.float32)
  k = jax.ShapeDtypeStruct((B, S, K or N, 64), jnp.float32)
  return Operands(q, k, k, mask or Mask.causal())


@pytest.mark.parametrize("heads", [1, 4, 9, 36])
@pytest.mark.parametrize("length", [1, 100, 512, 1024, 2048, 16384, 131072])
def test_scores_of_a_tile_fit(heads, length):
  blocks = tile_sizes.fitted(operands(1, length, heads, length))
  rows = min(blocks.q, length)
  keys = length if blocks.unroll else min(blocks.k, length)
  # Many heads may not fit with the least tile there is.
  least = heads * tile_sizes.LEAST * 256
  assert heads * rows * keys <= max(tile_sizes.SCORES, least)
  assert blocks.unroll in (0, length)


def test_decoding_is_one_block_however_long_the_cache():
  blocks = tile_sizes.fitted(operands(8, 1, 32, 2**17, K=8))
  assert blocks.unroll >= 2**17 and blocks.q >= 1


def test_masks_that_skip_nothing_get_larger_blocks():
  sizes = [
    tile_sizes.fitted(operands(1, 512, 4, 512, mask=mask)).q
    for mask in (Mask.causal(), Mask.full())
  ]
  assert sizes == [128, 512]


@pytest.mark.parametrize(
  "mask, share",
  [
    (Mask.full(), 1),
    (Mask.causal(), 36 / 64),
    (Mask.causal((255, None)), 15 / 64),
    (Mask.block_diffusion(1024, 256), (4 + 6 + 10) / 64),
  ],
)
def test_only_tiles_with_a_visible_pair_are_visited(mask, share):
  x = operands(1, 2048, 1, 2048, mask=mask)
  grouped = x._replace(
    q=jax.ShapeDtypeStruct((1, 1, 1, 2048, 64), jnp.float32),
    k=jax.ShapeDtypeStruct((1, 1, 2048, 64), jnp.float32),
  )
  table = blockwise_loops._table(Spec(1.0, blocks=Blocks(256, 256)), grouped)
  assert table.counts.sum() == share * 64


def test_segments_skip_tiles_while_the_program_runs():
  ids = jnp.repeat(jnp.arange(8), 32)[None]
  x = operands(1, 256, 1, 256, mask=Mask.causal(segments=ids))
  grouped = x._replace(
    q=jnp.zeros((1, 1, 1, 256, 64)), k=jnp.zeros((1, 1, 256, 64))
  )
  counts = jax.jit(
    lambda: (
      blockwise_loops._table(Spec(1.0, blocks=Blocks(64, 64)), grouped).counts
    )
  )()
  assert counts.tolist() == [1, 1, 1, 1]


def test_default_memory_is_linear_in_length():
  """Bytes of temporaries, forward and backward, by the compiler."""

  def temporaries(length):
    q = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)

    def f(q, k, v):
      return jnp.sum(flash_attention(q, k, v, causal=True) ** 2)

    run = jax.jit(jax.grad(f, (0, 1, 2))).lower(q, q, q).compile()
    return run.memory_analysis().temp_size_in_bytes

  found = [temporaries(n) for n in (8192, 16384, 32768)]
  # A tile's scores are a constant; the rest are rows of [length, 4, 64].
  slopes = [(b - a) / n for a, b, n in zip(
    found, found[1:], (8192, 16384), strict=False)]  # fmt: skip
  assert slopes[1] == pytest.approx(slopes[0], rel=0.1)
  assert found[2] < 4 * 32768**2 * 4 / 50  # of the scores alone
