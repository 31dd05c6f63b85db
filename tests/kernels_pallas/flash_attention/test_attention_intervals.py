"""Intervals that are data, on every backend, forward and backward.

Each backend's sweep of features has the kind of mask as well, with --slow.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention import cpu
from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.cpu import CpuTiles
from kernels_pallas.flash_attention.gpu.tile_sizes import GpuTile, GpuTiles
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask
from tests.support_chip import MODES, quick, runner
from tests.support_gpu import needs_kernels
from tests.support_rounding import assert_no_rougher, in_low_precision

# Neither length is a multiple of any tile.
B, T, S = 2, 13, 19
BACKENDS = {
  "unrolled": {"backend": "xla_blockwise", "config": Blocks(q=5)},
  "looped": {
    "backend": "xla_blockwise", "config": Blocks(q=5, k=8, unroll=0)},
  "cpu": {"backend": "cpu", "config": CpuTiles(chunk=8)},
  "mosaic_tpu": {
    "backend": "mosaic_tpu", "config": Tiles(*[Tile(8, 8, 4, 8)] * 3),
    "interpret": True},
}  # fmt: skip


def draw(*shape, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def mask_of(rows, queries, keys):
  """Three intervals a query, of which some overlap, touch or are empty.

  Two queries see nothing, and two documents are packed.
  """
  rng = np.random.default_rng(1)
  bounds = rng.integers(-2, keys + 3, (rows, 6, queries))
  bounds[:, :2] = np.sort(bounds[:, :2], axis=1)
  bounds[:, 2] = bounds[:, 1]
  bounds[0, :, 3:5] = 0
  segments = (np.arange(queries) // 9)[None], (np.arange(keys) // 11)[None]
  return Mask.intervals(
    jnp.asarray(bounds, jnp.int32),
    (keys - 4, 9),
    tuple(jnp.asarray(x, jnp.int32) for x in segments),
  )


def step(mask, **options):
  """Output, log-sum-exp (0 where there is none) and gradients of sines."""

  def f(x):
    o, lse = flash_attention(*x, mask=mask, return_lse=True, **options)
    lse = jnp.where(jnp.isneginf(lse), 0, lse)
    total = jnp.sum(jnp.sin(3 * o.astype(jnp.float32))) + jnp.sum(jnp.cos(lse))
    return total, (o, lse)

  return lambda *x: jax.value_and_grad(f, has_aux=True)(x)


@functools.cache
def expected():
  x = draw(B, T, 4, 8), draw(B, S, 2, 8), draw(B, S, 2, 8, seed=1)
  (_, out), gradients = quick(step(mask_of(B, T, S), backend="reference"))(*x)
  assert not np.any(out[0][0, 3:5]) and np.abs(out[0][0, 5]).max() > 0.1
  assert min(np.abs(g).max() for g in gradients) > 0.1
  return x, (out, gradients)


@pytest.mark.parametrize("name", BACKENDS)
def test_agrees_with_the_reference(name, request):
  if name == "cpu":
    assert cpu.available(), request.getfixturevalue("cxx")
  x, want = expected()

  @quick
  def run(mask, *x):
    return step(mask, **BACKENDS[name])(*x)

  (_, out), gradients = run(mask_of(B, T, S), *x)
  # Float32 sums of some hundred terms near 1, in another order.
  chex.assert_trees_all_close((out, gradients), want, rtol=2e-5, atol=2e-5)


@pytest.fixture(name="gpu", params=MODES)
def _gpu(request):
  yield from runner(request.param)


@pytest.mark.slow
@needs_kernels
def test_gpu_kernels_agree_with_the_reference(gpu):
  tile = GpuTile(1, 64, (1, 1))
  tiles = GpuTiles(tile, tile, tile, operand="shared", cores="mma")
  tiles = tiles if gpu.interpret else None  # a chip's own
  draw_ = functools.partial(draw, dtype=jnp.float16)
  x = draw_(1, 70, 1, 64), draw_(1, 90, 1, 64), draw_(1, 90, 1, 64, seed=1)
  mask = mask_of(1, 70, 90)
  plain = step(mask, backend="reference")
  exact = jax.jit(plain)(*(np.asarray(y, np.float32) for y in x))
  rough = in_low_precision(plain, *x)
  how = {"backend": "mosaic_gpu", "config": tiles, "interpret": gpu.interpret}
  found = gpu.run(step(mask, **how), *x, jit=jax.jit)
  found, rough, exact = ((o, *g) for ((_, (o, _)), g) in (found, rough, exact))
  assert_no_rougher(found, rough, exact, jnp.float16)
