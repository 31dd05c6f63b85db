"""Sinks and biases of -inf: a disabled sink, an invisible key.

A head whose sink is -inf has no sink, and a pair whose bias is -inf is masked.
So the expected results are the reference's without either, which are finite.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention.api import decode_attention
from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.gpu.support import cores
from kernels_pallas.flash_attention.gpu.tile_sizes import (
  GpuTile,
  GpuTiles,
)
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask
from tests import support_sequence
from tests.support_chip import MODES, runner
from tests.support_decode import quick
from tests.support_gpu import needs_kernels, needs_tcgen05
from tests.support_rounding import assert_no_rougher, in_low_precision

T, SINK = 24, 0.3
LOWEST = float(np.finfo(np.float32).min)
HEADS = {"bias": 1, "lse": 1, "sinks": 0}
"""Which axis of an array has the heads; 2 for all others."""


def tiles(backward):
  return Tiles(*[Tile(8, 8, 8, 8)] * 3, backward)


TPU = {"backend": "mosaic_tpu", "interpret": True}
BACKENDS = {
  "reference": {"backend": "reference"},
  "unrolled": {"backend": "xla_blockwise", "config": Blocks(8, 8)},
  "looped": {"backend": "xla_blockwise", "config": Blocks(8, 8, unroll=0)},
  "mosaic_tpu_fused": TPU | {"config": tiles("fused")},
  "mosaic_tpu_split": TPU | {"config": tiles("split")},
}
each = functools.partial(pytest.mark.parametrize, "name")


def draw(*shape, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def qkv(T=T, H=8, dtype=jnp.float32):
  """Two heads with their own keys, which share nothing."""
  return {n: draw(1, T, 2, H, seed=i, dtype=dtype) for i, n in enumerate("qkv")}


def window(T=T, queries=(), keys=()):
  """Two documents and padding: in the first tile of keys that a tile of queries
  visits, some of the queries see nothing. `queries` and `keys` are additional
  padding."""
  at = np.arange(T)[None]
  ids = np.where(at < T // 3, 0, np.where(at < 5 * T // 6, 1, -1))
  hidden = [np.where(np.isin(at, list(x)), -1, ids) for x in (queries, keys)]
  return Mask.causal((T // 4, None), tuple(map(jnp.int32, hidden)))


def step(x, mask, **options):
  """Output, log-sum-exp and gradients of sines."""

  def loss(x):
    o, lse = flash_attention(**x, mask=mask, **options, return_lse=True)
    total = jnp.sum(jnp.sin(3 * o.astype(jnp.float32)))
    total += jnp.sum(jnp.where(jnp.isneginf(lse), 0, jnp.cos(lse)))
    return total, {"o": o, "lse": lse}

  (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(x)
  return out | gradients


def one_sink(x, mask, **options):
  """Head 0 without a sink and head 1 with `SINK`, each by the definition."""

  def head(h):
    return {
      n: jax.lax.slice_in_dim(y, h, h + 1, axis=HEADS.get(n, 2))
      for n, y in x.items()
    }

  run = functools.partial(step, mask=mask, backend="reference", **options)
  sink = {"sinks": jnp.full(1, SINK, jnp.float32)}
  first, second = run(head(0)) | {"sinks": jnp.zeros(1)}, run(head(1) | sink)
  return {
    n: jnp.concatenate([first[n], y], HEADS.get(n, 2))
    for n, y in second.items()
  }


def sunk(x):
  return x | {"sinks": jnp.array([-jnp.inf, SINK])}


def assert_close(found, expected):
  # Float32 sums of some ten products near 1, in another order.
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)


@functools.cache
def finite():
  """The expected results of a sink of -inf in head 0."""
  found = quick(one_sink)(qkv(), window())
  assert np.isneginf(found["lse"]).any() and np.abs(found["sinks"][1]) > 1e-2
  return found


@each(["mosaic_tpu_split", "reference", "looped", "unrolled"])
@pytest.mark.sample(2)
def test_a_sink_of_minus_infinity_is_no_sink(name):
  run = quick(functools.partial(step, **BACKENDS[name]))
  assert_close(run(sunk(qkv()), window()), finite())


@pytest.mark.usefixtures("cxx")
def test_a_sink_of_minus_infinity_is_no_sink_on_cpus():
  run = quick(functools.partial(step, backend="cpu"))
  assert_close(run(sunk(qkv()), window()), finite())


@pytest.mark.slow
@each(["unrolled", "mosaic_tpu_fused"])
def test_the_lowest_finite_sink_has_no_effect_on_visible_keys(name):
  """It times log2(e) is -inf."""
  mask = Mask.causal((T // 4, None))
  plain = functools.partial(step, mask=mask, backend="reference")
  run = quick(functools.partial(step, mask=mask, **BACKENDS[name]))
  found = run(qkv() | {"sinks": jnp.full(2, LOWEST)})
  assert not np.any(found.pop("sinks"))
  assert_close(found, quick(plain)(qkv()))


@each(["looped", "reference", "mosaic_tpu_split"])
@pytest.mark.sample(3)
def test_a_bias_of_minus_infinity_is_a_mask(name):
  """Of keys, of all keys of a query, and where nothing is visible anyway."""
  queries, keys = (3, 17), (1, 9, 10, 20)
  hidden = np.isin(np.arange(T), keys)[None, :]
  hidden = hidden | np.isin(np.arange(T), queries)[:, None]
  bias = draw(1, 2, T, T, seed=9)
  run = quick(functools.partial(step, **BACKENDS[name]))
  found = run(
    sunk(qkv()) | {"bias": jnp.where(hidden, -jnp.inf, bias)}, window()
  )
  expected = quick(one_sink)(qkv() | {"bias": bias}, window(T, queries, keys))
  assert_close(found, expected)


@each(["mosaic_tpu_split", "reference", "unrolled"])
@pytest.mark.sample(3)
def test_a_bias_of_minus_infinity_inside_the_soft_cap_is_minus_the_cap(name):
  bias = draw(1, 2, T, T, seed=9)
  bias = jnp.where(draw(1, 2, T, T, seed=8) > 1, -jnp.inf, bias)
  options = {"softcap": 1.5, "bias_before_softcap": True}
  run = quick(functools.partial(step, **BACKENDS[name], **options))
  found = run(sunk(qkv()) | {"bias": bias}, window())
  # 1000 is far beyond where tanh is 1.
  bias = jnp.maximum(bias, -1000)
  plain = quick(functools.partial(one_sink, **options))
  assert_close(found, plain(qkv() | {"bias": bias}, window()))


@each(["unrolled", "reference", "mosaic_tpu_split"])
@pytest.mark.sample(3)
def test_a_bias_of_nan_inside_the_soft_cap_is_masked(name):
  """Where nothing is visible, a bias reaches no gradient."""
  bias, seen = draw(1, 2, T, T, seed=9), window().visible(T, T)[:, None]
  options = {"softcap": 1.5, "bias_before_softcap": True}
  run = quick(functools.partial(step, **BACKENDS[name], **options))
  found = run(sunk(qkv()) | {"bias": jnp.where(seen, bias, jnp.nan)}, window())
  plain = quick(functools.partial(one_sink, **options))
  assert_close(found, plain(qkv() | {"bias": bias}, window()))


ONE = GpuTile(1, 64, (1, 1))
TALL = GpuTile(1, 64, height=128)
GPUS = {
  "hopper": GpuTiles(*[GpuTile(1, 64)] * 3, operand="shared", programs=1),
  "ampere": GpuTiles(ONE, ONE, ONE, operand="shared", cores="mma"),
  "blackwell": GpuTiles(TALL, TALL, TALL, cores="tcgen05", programs=1),
}


@pytest.fixture(name="gpu", params=MODES)
def _gpu(request):
  yield from runner(request.param)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
  "config",
  ["hopper", "ampere", pytest.param("blackwell", marks=needs_tcgen05)],
)
@pytest.mark.sample(6)
def test_a_sink_of_minus_infinity_is_no_sink_on_gpus(gpu, config):
  gpu.needs(cores(gpu.kind or ""), GPUS[config].cores)
  long = 128
  x, mask = qkv(long, 64, jnp.float16), window(long)
  how = {"backend": "mosaic_gpu", "config": GPUS[config]}

  def ours(x, mask):
    # Gradients use only the log-sum-exp, which includes the sinks.
    return dict(zip(("o", "lse"), flash_attention(
      **x, mask=mask, return_lse=True, interpret=gpu.interpret, **how
    ), strict=True))  # fmt: skip

  found = gpu.run(ours, sunk(x), mask)
  exact = quick(one_sink)({n: np.float32(y) for n, y in x.items()}, mask)
  rough = in_low_precision(one_sink, x, mask)
  assert_close(found["lse"], exact["lse"])
  assert_no_rougher(found["o"], rough["o"], exact["o"], jnp.float16)


WAYS = {
  "ring": (support_sequence.RING, 4),
  "exchanged": (support_sequence.ULYSSES, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.sample(2)
def test_a_sink_of_minus_infinity_is_no_sink_across_devices(way):
  cut, shards = WAYS[way]
  x = support_sequence.operands((4, 4, 4, 4), jnp.float32)
  mask = support_sequence.MASKS["segments"]()
  sinks = jnp.full(4, -jnp.inf)
  found = support_sequence.shared(
    mask, x | {"sinks": sinks}, support_sequence.ROWS, cut, shards
  )
  assert not np.any(found.pop("dsinks"))
  del x["sinks"]
  assert_close(found, support_sequence.alone(mask, x))


DECODING = {
  "reference": {"backend": "reference"},
  "xla": {"backend": "xla"},
  "mosaic_tpu": TPU,
  "cpu": {"backend": "cpu"},
}


@pytest.mark.slow
@pytest.mark.usefixtures("cxx")
def test_decoding_has_no_sink_where_it_is_minus_infinity():
  """Also for rows without a token, and in all splits of the keys."""
  q, k, v = (
    draw(3, 2, 16),
    draw(3, 24, 2, 16, seed=1),
    draw(3, 24, 2, 16, seed=2),
  )
  lengths = jnp.array([24, 0, 5], jnp.int32)

  @quick
  def run(sinks):
    found = {
      n: decode_attention(q, k, v, lengths, sinks=sinks, return_lse=True,
                          window=9, **options)
      for n, options in DECODING.items()
    }  # fmt: skip
    return found

  found, plain = run(jnp.array([-jnp.inf, SINK])), run(None)["reference"]
  for o, lse in found.values():
    assert_close((o[:, 0], lse[:, 0]), (plain[0][:, 0], plain[1][:, 0]))
    total = jnp.logaddexp(plain[1][:, 1], SINK)
    share = jnp.exp(plain[1][:, 1] - total)[:, None]
    assert_close((o[:, 1], lse[:, 1]), (plain[0][:, 1] * share, total))
