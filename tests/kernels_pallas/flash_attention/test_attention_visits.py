"""Which tiles the attention kernels visit, counted inside them.

If the mask depends on indices, or on documents numbered in rising or falling
order, exactly the tiles with a visible pair are visited, once in each kernel.
Other segments are bounded: a tile is visited if indices allow a pair and the
ranges of segments of its queries and of its keys, without padding, overlap.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention import dropout
from kernels_pallas.flash_attention.gpu.mosaic_gpu import mosaic_gpu_attention
from kernels_pallas.flash_attention.gpu.tile_sizes import (
  GpuTile,
  GpuTiles,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.tpu.mosaic_tpu import mosaic_tpu_attention
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask
from tests.support_gpu import needs_tcgen05

# Interpreted kernels are large programs over tiny arrays.
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)
N = 30  # tokens on a TPU; no multiple of a tile

# Parts differ in shape, so that a count identifies its kernel.
TPU = {
  "split": Tiles(
    Tile(4, 8, 4, 8), Tile(8, 4, 8, 4), Tile(16, 8, 8, 8), "split"
  ),
  "fused": Tiles(Tile(8, 16, 4, 16), Tile(4, 8, 4, 8), Tile(), "fused"),
}
GPU = {
  "wgmma": GpuTiles(
    GpuTile(2, 64), GpuTile(1, 128), GpuTile(1, 128), operand="shared"
  ),
  "mma": GpuTiles(
    GpuTile(1, 64, (1, 1)),
    GpuTile(1, 32, (1, 1)),
    GpuTile(1, 32, (1, 1)),
    operand="shared",
    cores="mma",
  ),
  "tcgen05": GpuTiles(
    GpuTile(2, 64, height=128),
    GpuTile(1, 64, height=128),
    GpuTile(1, 128, height=128),
    cores="tcgen05",
  ),
}


def draw(*shape, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def documents(*lengths):
  """Segments 0, 1, ... of one row, of the given lengths."""
  return np.repeat(np.arange(len(lengths)), lengths)


def tiles_of(config):
  """Returns the tile of each kernel, in queries and keys, and its parts."""
  if isinstance(config, GpuTiles):
    stay = [(t.rows, t.height, t.streamed) for t in vars(config).values()
            if isinstance(t, GpuTile)]  # fmt: skip
    forward, dkv, dq = stay
    return [
      Tile(forward[0], forward[2], *forward[1:]),
      Tile(dkv[2], dkv[0], *dkv[:0:-1]),
      Tile(dq[0], dq[2], *dq[1:]),
    ]
  fused = config.backward == "fused"
  return [config.forward, config.dkv, *(() if fused else (config.dq,))]


def counted(config, x):
  """Returns a function of the mask that counts visits of each part of a tile.

  The kernels call dropout for each visit: (row, first query, queries, first
  key, keys).
  """
  seen = collections.Counter()
  gpu = isinstance(config, GpuTiles)
  attend = mosaic_gpu_attention if gpu else mosaic_tpu_attention
  interpret = plgpu.InterpretGPUParams() if gpu else True

  def count(b, i, j):
    ranges = ((int(x.min()), int(x.max()) - int(x.min()) + 1) for x in (i, j))
    seen.update([(int(b), *(n for pair in ranges for n in pair))])

  def keep(seed, rate, b, h, i, j):
    jax.debug.callback(count, b, i, j)
    return dropout.keep(seed, rate, b, h, i, j)

  spec = Spec(scale=0.5, dropout_rate=0.1, keep=keep, blocks=config)

  @quick
  def gradient(mask):
    def total(q, k, v):
      y = Operands(q, k, v, mask, seed=jnp.uint32(0))
      return attend(spec, interpret, y)[0].astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))(*x)

  def run(mask):
    seen.clear()
    jax.block_until_ready(gradient(mask))
    jax.effects_barrier()
    return collections.Counter(seen)

  return run


def in_tiles(pairs, tile):
  """Whether any of [rows, T, S] is true, for each tile."""
  rows, t, s = pairs.shape
  pairs = np.pad(pairs, ((0, 0), (0, -t % tile.q), (0, -s % tile.kv)))
  return pairs.reshape(
    rows, -(-t // tile.q), tile.q, -(-s // tile.kv), tile.kv
  ).any((2, 4))


def once_each(config, visited):
  """The expected `counted` if each kernel visits the tiles `visited(tile)`."""
  expected = collections.Counter()
  found = [(tile, visited(tile)) for tile in tiles_of(config)]
  assert not all(some.all() for _, some in found)  # else any count would do
  for tile, some in found:
    for b, i, j in np.argwhere(some).tolist():
      for q in range(i * tile.q, (i + 1) * tile.q, tile.q_part):
        for k in range(j * tile.kv, (j + 1) * tile.kv, tile.kv_part):
          expected[b, q, tile.q_part, k, tile.kv_part] += 1
  return expected


def with_a_pair(mask, n):
  """Returns a function of tile sizes: which tiles hold a visible pair."""
  return functools.partial(in_tiles, np.asarray(mask.visible(n, n)))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mask", "backward"),
  [
    pytest.param(Mask.causal(), "split", marks=pytest.mark.slow),
    pytest.param(Mask.causal(), "fused", marks=pytest.mark.slow),
    (Mask.causal((5, None)), "fused"),
    (Mask.block_causal(5, (6, 2)), "split"),
    (Mask.where(lambda q, k: (q - k) % 20 < 2), "split"),
    (Mask.block_diffusion(N // 2, 4), "split"),
    (Mask.block_diffusion(N // 2, 4), "fused"),
  ],
  ids=lambda x: x if isinstance(x, str) else x.kind,
)
@pytest.mark.sample(5)
def test_a_tpu_visits_no_tile_without_a_visible_pair(mask, backward):
  config = TPU[backward]
  run = counted(config, [draw(1, N, 1, 4, seed=s) for s in range(3)])
  assert run(mask) == once_each(config, with_a_pair(mask, N))


@pytest.mark.slow
def test_a_tpu_visits_the_tiles_that_segments_allow():
  config = TPU["fused"]
  run = counted(config, [draw(2, N, 1, 4, seed=s) for s in range(3)])
  # If numbers fall, keys before a query have the greater ones.
  packed = np.stack([documents(11, 13, 6), 1 - documents(17, 13)])
  mask = Mask.causal(segments=jnp.asarray(packed, jnp.int32))
  assert run(mask) == once_each(config, with_a_pair(mask, N))

  mixed = np.random.default_rng(0).integers(-1, 4, (2, N))
  mask = Mask.causal(segments=jnp.asarray(mixed, jnp.int32))

  def enclosed(tile):
    """Where some integer lies between segments of either side."""
    found = in_tiles(np.tril(np.ones((2, N, N), bool)), tile)
    for b, i, j in np.argwhere(found):
      both = (
        row[row >= 0]
        for row in (
          mixed[b, i * tile.q : (i + 1) * tile.q],
          mixed[b, j * tile.kv : (j + 1) * tile.kv],
        )
      )
      ours, theirs = (set(range(min(x, default=0), max(x, default=-1) + 1))
                      for x in both)  # fmt: skip
      found[b, i, j] = bool(ours & theirs)
    return found

  expected = once_each(config, enclosed)
  assert run(mask) == expected
  # More than necessary, and never fewer.
  assert once_each(config, with_a_pair(mask, N)) < expected


@pytest.mark.slow
@pytest.mark.parametrize(
  "cores",
  [pytest.param(x, marks=needs_tcgen05 if x == "tcgen05" else ()) for x in GPU],
)
@pytest.mark.sample(4)
def test_a_gpu_visits_no_tile_without_a_visible_pair(cores):
  n, config = 200, GPU[cores]
  mask = {
    "wgmma": Mask.block_diffusion(n // 2, 16),
    "mma": Mask.causal(segments=jnp.asarray(documents(90, 80, 30)[None])),
    "tcgen05": Mask.causal((70, None)),
  }[cores]
  x = [draw(1, n, 1, 64, seed=s, dtype=jnp.float16) for s in range(3)]
  assert counted(config, x)(mask) == once_each(config, with_a_pair(mask, n))
