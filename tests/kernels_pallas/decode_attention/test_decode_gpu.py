"""The GPU decoding kernel, interpreted with race detection, or on a GPU.

The interpreter has no `mma` and no `cp.async`: there, products of warps and
copies of rows are plain ones. Ranges, masks, softmax, the ring of tiles, parts
and splits are the kernel's. On a GPU (marker `gpu`) all of it runs.
"""

import functools
import types
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import target_platform
from kernels_pallas.decode_attention.api import (
  choose,
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.gpu.support import splits_for
from kernels_pallas.decode_attention.pages import Pages, quantize
from kernels_pallas.decode_attention.spec import Blocks
from tests.support_chip import MODES, runner
from tests.support_decode import draw, quick
from tests.support_gpu import needs_kernels
from tests.support_rounding import assert_no_rougher, in_low_precision

pytestmark = needs_kernels


@pytest.fixture(name="gpu", params=MODES)
def _gpu(request):
  yield from runner(request.param)


def furthest(found, exact):
  return float(np.abs(np.float32(found) - np.asarray(exact)).max())


def rounded(dtype, *shape, seed=0):
  return np.asarray(draw(*shape, seed=seed)).astype(dtype)


LENGTHS = np.array([150, 0, 77], np.int32)
CASES = {
  "heads_alone": {"N": 2, "K": 2},
  "groups_of_three_window": {"N": 6, "K": 2, "window": 70},
  "groups_of_eight_sinks": {"N": 8, "sinks": True, "splits": 4},
  "softcap_wide_values": {"softcap": 2.0, "Hv": 128, "splits": 2},
  "wide": {"H": 256, "Hv": 256, "window": 33},
  "two_parts": {"N": 24, "dtype": jnp.float16},
  "one_part": {"N": 80, "window": 100, "softcap": 3.0},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(14)
def test_a_token_a_row_from_a_cache(gpu, name):
  case = {"N": 4, "K": 1, "H": 64, "Hv": 64, "window": None, "softcap": None,
          "sinks": False, "splits": 1, "dtype": jnp.bfloat16}  # fmt: skip
  case |= CASES[name]
  N, K, H, Hv, dtype = (case[x] for x in ("N", "K", "H", "Hv", "dtype"))
  B, S = len(LENGTHS), 150
  q = rounded(dtype, B, N, H)
  k = rounded(dtype, B, S, K, H, seed=1)
  v = rounded(dtype, B, S, K, Hv, seed=2)
  # Invisible keys: after the end, and before the window.
  key, n = np.arange(S), LENGTHS[:, None]
  dead = (key >= n) | (key < n - (case["window"] or S))
  dead = dead[:, :, None, None]
  sinks = draw(N, seed=3) if case["sinks"] else None
  options = {x: case[x] for x in ("window", "softcap")} | {"sinks": sinks}
  nan = np.asarray(np.nan, dtype)
  x = q, *(np.where(dead, nan, y) for y in (k, v)), LENGTHS
  run = functools.partial(decode_attention, return_lse=True, **options)
  ours = {"backend": "mosaic_gpu", "interpret": gpu.interpret}
  found = gpu.run(
    functools.partial(run, blocks=Blocks(splits=case["splits"]), **ours), *x
  )
  wide = (y.astype(np.float32) for y in (q, k, v))
  plain = functools.partial(run, backend="reference")
  exact = quick(plain)(*wide, LENGTHS)
  rough = in_low_precision(plain, q, k, v, LENGTHS)
  assert found[0].dtype == dtype and np.all(np.asarray(found[0][1]) == 0)
  chex.assert_trees_all_close(found[1], exact[1], rtol=1e-5, atol=1e-5)
  assert_no_rougher(found[0], rough[0], exact[0], dtype)


# (page, H, Hv, tokens per item): pages smaller than a tile, of several tiles,
# and of neither; one token per row, and prompts.
PAGED = {
  "small": (16, 64, 64, 1, None),
  "neither": (96, 64, 128, 1, 60),
  "several_tiles": (128, 64, 64, 8, 100),
  "int8": (32, 64, 64, 1, 60),
  "float8": (96, 64, 64, 1, None),
}
CODES = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}


@functools.partial(jax.jit, static_argnums=0)
def codes(code, k, v):
  """Quantized pages of keys and values, and their scales."""
  k, v = (quantize(x, code) for x in (k, v))
  return jnp.concatenate([k[0], v[0]], -1), jnp.stack([k[1], v[1]], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGED)
@pytest.mark.sample(11)
def test_rows_that_decode_and_rows_that_read_a_prompt(gpu, name):
  size, H, Hv, queries, window = PAGED[name]
  # A prompt of several items; if each is a block of threads, of two.
  prompt = 12 if queries > 1 else 2
  lens = np.array([150, 0, prompt, 200], np.int32)
  starts = np.cumsum([0, 1, 1, prompt, 2], dtype=np.int32)
  new, width, count = np.diff(starts), -(-200 // size), 4 * -(-200 // size)
  order = np.random.default_rng(0).permutation(count)
  alive = np.zeros((count, size), bool)
  table = np.full((4, width), -9, np.int32)
  for row, n in enumerate(lens):
    low = max(0, n - new[row] - window + 1) if window else 0
    for token in range(low, n):
      page = table[row, token // size] = order[row * width + token // size]
      alive[page, token % size] = True
  tokens = starts[-1] + 1  # the last one belongs to no row
  q = rounded(jnp.bfloat16, tokens, 4, H)
  kv = rounded(jnp.bfloat16, count, 2, size, H + Hv, seed=1)
  alive, scale = alive[:, None, :, None], None
  if name in CODES:
    kv, scale = codes(CODES[name], kv[..., :H], kv[..., H:])

  def run(q, kv, scale, **options):
    return paged_attention(
      q, Pages(kv, scale, H), *map(jnp.asarray, (table, lens, starts)),
      window=window, return_lse=True, **options,
    )  # fmt: skip

  plain = functools.partial(run, backend="reference")
  wide = kv if scale is not None else kv.astype(np.float32)
  exact = quick(plain)(q.astype(np.float32), wide, scale)
  # Of absolute values: the sum of roundings of probabilities.
  values = np.where(np.arange(H + Hv) < H, wide, np.abs(np.float32(wide)))
  most, _ = quick(plain)(q.astype(np.float32), values.astype(wide.dtype), scale)
  if scale is None:
    dead = np.where(alive, kv, np.asarray(np.nan, kv.dtype)), None
  else:
    dead = kv, np.where(alive[:, None, :, :, 0], scale, np.nan)
  ours = {"backend": "mosaic_gpu", "interpret": gpu.interpret}
  found = gpu.run(
    functools.partial(run, blocks=Blocks(queries=queries, splits=2), **ours),
    q, *dead,
  )  # fmt: skip
  empty = np.flatnonzero(np.all(np.isneginf(found[1]), axis=1))
  assert empty.tolist() == [1, tokens - 1]
  assert not np.any(np.asarray(found[0])[empty])
  chex.assert_trees_all_close(found[1], exact[1], rtol=1e-5, atol=1e-5)
  # Rounded to 8 bits are a probability, with its value's scale, and the output.
  size = np.asarray(most) + np.abs(exact[0])
  error = np.abs(np.float32(found[0]) - exact[0])
  assert np.all(error <= (2.0**-8 + 2.0**-14) * size)


def test_unsupported_calls_raise():
  q, k = draw(1, 2, 64), draw(1, 16, 1, 64)
  lengths, half = jnp.array([3]), jnp.bfloat16

  def fails(message, q, k, **options):
    with pytest.raises(ValueError, match=message):
      decode_attention(q, k, k, lengths, backend="mosaic_gpu", **options)

  fails("found float32.*backend='xla'", q, k)
  fails("keys of the queries'", q.astype(half), k)
  # Without scales: two of its bytes would be read as a number of 16 bits.
  fails("found float8_e4m3fn", q.astype(half), k.astype(jnp.float8_e4m3fn))
  low = q.astype(half), k.astype(half)
  fails("precision", *low, precision=jax.lax.Precision.HIGHEST)
  fails("head dims of .64, 128, 256.", low[0][..., :40], low[1][..., :40])


def coded(code, size):
  """A row of 40 tokens in quantized pages of 16, with values of that size."""
  k, v = (np.asarray(draw(3, 2, 16, 64, seed=n)) for n in (1, 2))
  pages = Pages(*codes(code, k, np.float32(size) * v), 64)
  return pages, jnp.array([[2, 0, 1]]), jnp.array([40])


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.cover(1)
def test_small_values_are_as_exact_as_large_ones(gpu, code, size):
  """Scales of values are part of 16-bit operands."""
  q, x = rounded(jnp.bfloat16, 1, 4, 64), coded(CODES[code], size)
  ours = {"backend": "mosaic_gpu", "interpret": gpu.interpret}
  found = gpu.run(functools.partial(paged_attention, **ours), q, *x)
  plain = functools.partial(paged_attention, backend="reference")
  exact = quick(plain)(q.astype(np.float32), *x)
  # Probabilities and outputs are rounded to 8 bits.
  assert furthest(found, exact) <= 2.0**-8 * size
  assert np.abs(exact).max() > 0.2 * size


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES)
def test_codes_for_float16_are_read_by_plain_lax(code):
  """Which multiplies in float32: the scales of small values are subnormal."""
  q = jnp.asarray(rounded(jnp.float16, 1, 4, 64))
  x = coded(CODES[code], 1e-3)
  with pytest.raises(ValueError, match="codes for bfloat16.*backend='xla'"):
    paged_attention(q, *x, backend="mosaic_gpu")

  def run(q, x):
    return paged_attention(q, *x)

  device = jax.sharding.AbstractDevice("NVIDIA H100", None, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  wide = q.astype(jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh):
    programs = [str(jax.make_jaxpr(run)(y, x)) for y in (q, wide)]
  assert ["decode_attention_mma" in y for y in programs] == [False, True]
  found = quick(functools.partial(paged_attention, backend="xla"))(q, *x)
  plain = functools.partial(paged_attention, backend="reference")
  exact = quick(plain)(q.astype(np.float32), *x)
  # Half a step of float16's smallest numbers, and of its others.
  np.testing.assert_allclose(found, exact, rtol=2.0**-10, atol=2.0**-24)


def test_auto_takes_the_gpu_kernel_where_supported():
  def chosen(kind, dtype=jnp.bfloat16, H=64):
    device = jax.sharding.AbstractDevice(kind, None, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
      (1,), ("data",), abstract_device=device
    )  # fmt: skip
    x = [jax.ShapeDtypeStruct(s, dtype) for s in ((2, 2, H), (2, 24, 1, H))]
    with jax.sharding.use_abstract_mesh(mesh):
      assert choose(dtype)[0] == ("xla" if "V100" in kind else "mosaic_gpu")
      traced = jax.make_jaxpr(decode_attention)(
        *x, x[1], jax.ShapeDtypeStruct((2,), jnp.int32)
      )
    return "decode_attention_mma" in str(traced)

  for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA H100 80GB HBM3",
               "NVIDIA B200"):  # fmt: skip
    assert chosen(kind)
  assert not chosen("Tesla V100-SXM2-16GB") and not chosen("NVIDIA L4", H=80)


def test_a_program_lowered_for_cuda_has_the_kernel():
  """Without a mesh or a GPU; the CPU's program is plain lax."""
  x = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 2, 64),
       (2, 24, 1, 64))]  # fmt: skip
  traced = jax.jit(decode_attention).trace(
    *x, x[1], jax.ShapeDtypeStruct((2,), jnp.int32)
  )
  found = {
    name: "mosaic_gpu" in traced.lower(lowering_platforms=(name,)).as_text()
    for name in ("cpu", "cuda")
  }
  assert found == {"cpu": False, "cuda": True}


@pytest.mark.slow
def test_without_jit_it_runs_where_its_arrays_are(monkeypatch):
  """Even on a host with a GPU, which is not queried then."""
  q, k = (draw(*s).astype(jnp.bfloat16) for s in ((2, 2, 64), (2, 24, 1, 64)))
  lengths = jnp.array([3, 24])
  want = decode_attention(q, k, k, lengths, backend="xla")
  h100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [h100])
  assert (
    target_platform.program_device()
    == target_platform.device_of_arrays([])
    == ("gpu", "NVIDIA H100")
  )
  found = decode_attention(q, k, k, lengths)
  chex.assert_trees_all_equal(found, want)


def test_a_committed_array_determines_the_device():
  """As in JAX, which moves the others there."""

  def placed(platform, committed):
    device = mock.Mock(platform=platform, device_kind="some")
    x = mock.Mock(spec=type(jnp.zeros(0)), committed=committed)
    x.devices.return_value = {device}
    return x

  free, held = placed("gpu", False), placed("cpu", True)
  assert target_platform.device_of_arrays([free, np.zeros(1)]) == (
    "gpu",
    "some",
  )
  assert target_platform.device_of_arrays([free, held]) == ("cpu", "some")


@pytest.mark.parametrize(
  ("pieces", "keys", "expected"),
  [(1, 200, 1), (1, 4096, 16), (64, 32768, 5), (512, 32768, 1)],
)
def test_splits_fill_the_chip_with_whole_tiles(pieces, keys, expected):
  assert splits_for(pieces, keys) == expected
