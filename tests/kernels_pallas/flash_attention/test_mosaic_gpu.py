"""The GPU kernels, interpreted on the CPU with race detection, or on a GPU.

The interpreter runs the variant whose left operands come from shared memory;
barriers, copies, masks and loops are the same in the other variant, which runs
on a GPU (marker `gpu`).
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.api import (
  flash_attention,
  prepare,
)
from kernels_pallas.flash_attention.cotangents import query_cotangents
from kernels_pallas.flash_attention.gpu import (
  persistent,
  tile_stream,
)
from kernels_pallas.flash_attention.gpu.support import cores
from kernels_pallas.flash_attention.gpu.tile_sizes import (
  GpuTile,
  GpuTiles,
)
from kernels_pallas.flash_attention.spec import Blocks, Operands
from kernels_pallas.masks import Mask
from tests.support_chip import MODES, runner
from tests.support_gpu import needs_kernels, needs_tcgen05
from tests.support_rounding import assert_no_rougher, in_low_precision

pytestmark = needs_kernels

# Neither length is a multiple of any tile.
B, T, S = 2, 100, 150
SMALL = GpuTile(2, 64)
ONE, NARROW = GpuTile(1, 64, (1, 1)), GpuTile(1, 32, (1, 1))
# Fewer blocks of threads than lines, so that each takes several (`watched`).
TILES = {
  "two_groups": GpuTiles(SMALL, SMALL, SMALL, operand="shared", programs=1),
  "one_group": GpuTiles(
    GpuTile(1, 64, (3, 1)),
    GpuTile(1, 64, (1, 2), "one"),
    GpuTile(1, 64, (1, 2), "one"),
    (("dk",), ("dv",)),
    "shared",
    programs=2,
  ),
  "one_product": GpuTiles(
    SMALL, GpuTile(2, 64, products="one"), SMALL, operand="shared", programs=1
  ),
  "ampere": GpuTiles(ONE, ONE, ONE, operand="shared", cores="mma"),
  "ampere_narrow": GpuTiles(
    ONE, NARROW, NARROW, (("dk",), ("dv",)), "shared", "mma"
  ),
}
TALL, PAIR = (GpuTile(n, 64, height=128) for n in (1, 2))
FEW = GpuTile(1, 64, (2, 1), height=128)
LONG = GpuTile(2, 128, (1, 1), height=128)
blackwell = functools.partial(GpuTiles, cores="tcgen05", programs=1)
TILES |= {
  "blackwell": blackwell(PAIR, TALL, PAIR),
  "blackwell_apart": blackwell(FEW, FEW, FEW, (("dk",), ("dv",))),
  # Tensor memory has no room for operands of dkv; at 128, of forward and dq.
  "blackwell_pairs": blackwell(PAIR, PAIR, PAIR),
  "blackwell_long": blackwell(LONG, TALL, PAIR),
}
TILES["one_block"] = dataclasses.replace(TILES["one_group"], programs=1)


@pytest.fixture(name="gpu", params=MODES)
def _gpu(request):
  yield from runner(request.param)


def ours(gpu, config):
  """Options of a call of the kernels with such tiles."""
  tiles = TILES[config]
  if gpu.interpret is None:
    gpu.needs(cores(gpu.kind), tiles.cores)
    tiles = dataclasses.replace(tiles, operand="registers")
  return {"backend": "mosaic_gpu", "config": tiles, "interpret": gpu.interpret}


def draw(*shape, seed=0, dtype=jnp.float16):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def ids(*shape, high=3):
  rng = np.random.default_rng([1, *shape])
  return jnp.asarray(rng.integers(-1, high, shape), jnp.int32)


def bounds():
  """Two intervals a query; the first of a tile, the second across tiles."""
  rng = np.random.default_rng(3)
  found = np.sort(rng.integers(30, S, (1, 4, T)), axis=1)
  found[:, :2] = np.array([[0], [64]])
  return jnp.asarray(found, jnp.int32)


def qkv(H=64, Hv=64, T=T, S=S, B=B, dtype=jnp.float16):
  draw_ = functools.partial(draw, dtype=dtype)
  return draw_(B, T, 2, H), draw_(B, S, 1, H), draw_(B, S, 1, Hv, seed=1)


def step(lse_too=1.0, **options):
  """Output, log-sum-exp (0 where there is none) and gradients of sines."""

  def f(x):
    o, lse = flash_attention(
      x["q"], x["k"], x["v"], sinks=x.get("sinks"), return_lse=True, **options
    )
    lse = jnp.where(jnp.isneginf(lse), 0, lse)
    total = jnp.sum(jnp.sin(3 * o.astype(jnp.float32)))
    total += lse_too * jnp.sum(jnp.cos(lse))
    return total, (o, lse)

  def both(q, k, v, sinks=None):
    x = {"q": q, "k": k, "v": v}
    x |= {} if sinks is None else {"sinks": sinks}
    (_, out), gradients = jax.value_and_grad(f, has_aux=True)(x)
    return out, gradients

  return both


# Interpreting costs time per block of threads: one row where rows are alike.
CASES = {
  "prefix": (
    {"mask": lambda: Mask.prefix_lm(jnp.array([70]), (40, None))},
    {"B": 1},
  ),
  "blocks_empty_rows": (
    {"mask": lambda: Mask.block_causal(24, offset=-30)},
    {"B": 1},
  ),
  "function": (
    {"mask": lambda: Mask.where(lambda q, k: (q - k) % 60 < 25)},
    {"B": 1},
  ),
  "intervals": (
    {"mask": lambda: Mask.intervals(bounds(), (90, None))},
    {"B": 1},
  ),
  "diffusion_bfloat16": (
    {"mask": lambda: Mask.block_diffusion(50, 20)},
    {"B": 1, "S": T, "dtype": jnp.bfloat16, "tiles": "one_block"},
  ),
  "window_segments_sinks": (
    {
      "mask": lambda: Mask.causal((20, None), (ids(B, T), ids(B, S))),
      "sinks": lambda: jnp.array([0.3, -0.2]),
    },
    {"tiles": "one_group"},
  ),
  "positions_softcap": (
    {
      "mask": lambda: Mask.full(
        (9, 9), None, ids(B, T, high=S), ids(1, S, high=S)
      ),
      "softcap": 2.0,
    },
    {},
  ),
  "ragged": ({"kv_lens": lambda: jnp.array([150, 70]), "causal": True}, {}),
  "dropout_other_width": (
    {"causal": True, "dropout_rate": 0.3, "dropout_seed": 5},
    {"Hv": 80, "B": 1},
  ),
  "wide_bfloat16": (
    {"mask": lambda: Mask.block_diffusion(70, 20)},
    {"H": 128, "Hv": 128, "B": 1, "T": 140, "S": 140, "dtype": jnp.bfloat16},
  ),
  # A weight has the soft cap's slope, and the sign of what dropout keeps.
  "dropout_softcap": (
    {"causal": True, "dropout_rate": 0.3, "dropout_seed": 5, "softcap": 2.0},
    {"B": 1},
  ),
}


RUNS = {
  name: (name, shape.get("tiles", "two_groups"))
  for name, (_, shape) in CASES.items()
} | {
  f"{name}_{tiles}": (name, tiles)
  for name, tiles in (
    ("blocks_empty_rows", "ampere"),
    ("window_segments_sinks", "ampere"),
    ("positions_softcap", "ampere_narrow"),
    ("dropout_other_width", "ampere_narrow"),
    ("dropout_softcap", "ampere"),
    ("dropout_softcap", "ampere_narrow"),
    ("dropout_softcap", "one_group"),
    ("dropout_softcap", "one_product"),
    *((name, "blackwell") for name in CASES if name != "diffusion_bfloat16"),
    ("ragged", "blackwell_pairs"),
    ("window_segments_sinks", "blackwell_pairs"),
    ("wide_bfloat16", "blackwell_long"),
    ("dropout_other_width", "blackwell_apart"),
    ("positions_softcap", "blackwell_apart"),
  )
}
# Each case on some generation, each layout of tiles with some case.
OFTEN = (
  *("prefix", "window_segments_sinks", "ragged", "dropout_other_width"),
  *("diffusion_bfloat16", "dropout_softcap_one_group"),
  *("blocks_empty_rows_ampere", "dropout_softcap_ampere_narrow"),
  *("function_blackwell", "wide_bfloat16_blackwell_long"),
  *("ragged_blackwell_pairs", "positions_softcap_blackwell_apart"),
  *("window_segments_sinks_blackwell", "dropout_softcap_one_product"),
)


def marks(name, tiles):
  needed = [needs_tcgen05] if "blackwell" in tiles else []
  return needed if name in OFTEN else [*needed, pytest.mark.slow]


RUNS = {
  name: pytest.param(*run, marks=marks(name, run[1]))
  for name, run in RUNS.items()
}


@functools.cache
def expected(name):
  """Operands and options of a case, exact results, and those in 16 bits."""
  options, shape = CASES[name]
  options = {k: v() if callable(v) else v for k, v in options.items()}
  x = (
    *qkv(**{k: y for k, y in shape.items() if k != "tiles"}),
    options.pop("sinks", None),
  )
  plain = step(backend="reference", **options)
  exact = jax.jit(plain)(*(np.asarray(y, np.float32) for y in x[:3]), x[3])
  assert np.abs(exact[1]["q"]).max() > 1e-2
  return x, options, exact, in_low_precision(plain, *x)


@pytest.fixture(name="watched")
def _watched(monkeypatch):
  """Every block of threads of a persistent kernel takes more than one line."""
  plain = persistent.num_blocks

  def programs(p):
    found = plain(p)
    assert found < p.dims[0] * p.heads * p.lines
    return found

  monkeypatch.setattr(persistent, "num_blocks", programs)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
  ("case", "config"), RUNS.values(), ids=list(RUNS)
)  # fmt: skip
@pytest.mark.sample(2, 2, 2)
def test_agrees_with_the_reference_without_a_race(gpu, case, config):
  how = ours(gpu, config)
  x, options, exact, rough = expected(case)
  found = gpu.run(step(**options, **how), *x, jit=jax.jit)
  # The log-sum-exp is float32's: products of 16 bits are exact.
  chex.assert_trees_all_close(found[0][1], exact[0][1], rtol=2e-5, atol=2e-5)
  found, rough, exact = (((o,), g) for (o, _), g in (found, rough, exact))
  assert_no_rougher(found, rough, exact, x[0].dtype)


def hopper_and_blackwell(hopper):
  """Parametrizes a test by the name of its tiles."""
  return pytest.mark.parametrize(
    "config", [hopper, pytest.param("blackwell", marks=needs_tcgen05)]
  )


@pytest.mark.slow
@hopper_and_blackwell("one_block")
@pytest.mark.usefixtures("watched")
@pytest.mark.sample(2)
def test_results_may_reuse_stationary_operands_memory(gpu, monkeypatch, config):
  """As if shared memory had no room for both."""
  how = ours(gpu, config)

  def results():
    run, x = step(causal=True, **how), qkv(B=1, S=T + 50)
    return gpu.run(run, *x, jit=jax.jit)

  apart = results()
  monkeypatch.setattr(tile_stream, "fits_shared", lambda *_: False)
  chex.assert_trees_all_equal(results(), apart)


@hopper_and_blackwell("two_groups")
@pytest.mark.sample(2)
def test_padding_may_contain_nan(gpu, config):
  """NaN in padding, or where no tile is visited, reaches no result."""
  i, j = np.arange(T)[None], np.arange(S)[None]
  # Queries from 70 on see keys up to 29, except padding: by its segment
  # (queries from 95, keys from 20 to 24), or position (10 to 14).
  queries = np.where(i >= 95, -1, 0).astype(np.int32)
  keys = np.where((j >= 20) & (j < 25), -1, 0).astype(np.int32)
  places = np.where((j >= 10) & (j < 15), -1, j).astype(np.int32)
  mask = Mask.causal(
    None,
    (jnp.asarray(queries), jnp.asarray(keys)),
    kv_positions=jnp.asarray(places),
    offset=-70,
  )
  # The first tile of queries sees nothing, and no query sees the last of keys.
  dead_q = ((queries < 0) | (i < 64))[:, :, None, None]
  dead_k = ((keys < 0) | (places < 0) | (j >= 128))[:, :, None, None]
  how = ours(gpu, config)
  call = functools.partial(gpu.run, step(mask=mask, **how), jit=jax.jit)
  x = qkv(B=1)
  found = call(*(np.where(d, np.float16(np.nan), y) for d, y in zip(
    (dead_q, dead_k, dead_k), x, strict=True)))  # fmt: skip
  chex.assert_trees_all_equal(found, call(*x))
  (o, _), gradients = jax.tree.map(np.asarray, found)
  chex.assert_tree_all_finite((o, gradients))
  assert np.any(o[:, 70:95]) and not np.any(o[:, :70]) and not np.any(o[:, 95:])
  for name, dead in (("q", dead_q), ("k", dead_k), ("v", dead_k)):
    assert not np.any(np.where(dead, gradients[name], 0))


@pytest.mark.slow
def test_large_logits_only_shift_the_log_sum_exp(gpu):
  """Adds a constant to all logits whose exponential is inf or 0."""
  q, k, v = qkv(T=64, S=64, B=1)
  own = {"wgmma": "two_groups", "tcgen05": "blackwell"}
  how = ours(gpu, own.get(cores(gpu.kind or ""), "ampere"))
  call = functools.partial(
    gpu.run, step(0.0, causal=True, **how), jit=jax.jit
  )  # fmt: skip

  def results(call, one=0, other=0):
    x, y = np.array(q), np.array(k)
    x[..., 0], y[..., 0] = one, other
    (o, lse), gradients = jax.tree.map(np.asarray, call(x, y, v))
    # The column of the constant has gradients of its size times rounding.
    rest = {n: y[..., n != "v" :] for n, y in gradients.items()}
    return lse - one * other / 8, (o, rest)

  def widened(q, k, v):
    return plain(*(x.astype(jnp.float32) for x in (q, k, v)))

  plain = step(0.0, causal=True, backend="reference")
  lse, exact = results(jax.jit(widened))
  _, rough = results(functools.partial(in_low_precision, plain))
  for sign in (1, -1):
    found = results(call, 100, 100 * sign)
    # Float32 of 1250 in base 2 is accurate to 1.2e-4.
    chex.assert_trees_all_close(found[0], lse, rtol=1e-3, atol=1e-3)
    assert_no_rougher(found[1], rough, exact, jnp.float16)


@pytest.mark.slow
@hopper_and_blackwell("two_groups")
@pytest.mark.sample(2)
def test_partial_results_are_not_rounded(gpu, config):
  """Inputs of a ring's sums: outputs and gradients in float32."""
  x = Operands(*qkv(T=64, S=64, B=1), mask=Mask.causal())
  backend, spec = prepare(x, **ours(gpu, config))
  wide = dataclasses.replace(spec, output=jnp.float32)

  def both(x):
    o, lse = backend.attend(wide, x)
    rows = query_cotangents(x, o, lse, jnp.cos(o), jnp.zeros_like(lse))
    return o, backend.gradients(spec, x, rows)

  o, found = gpu.run(both, x, jit=jax.jit)

  def plain(*x):
    y, vjp = jax.vjp(
      lambda *x: flash_attention(*x, causal=True, backend="reference"), *x
    )
    return y, *vjp(jnp.cos(o).astype(y.dtype))

  exact = jax.jit(plain)(*(np.asarray(y, np.float32) for y in x[:3]))
  rough = in_low_precision(plain, *x[:3])
  for have in map(np.asarray, (o, *found[:3])):
    assert have.dtype == np.float32
    assert np.any(have != have.astype(np.float16).astype(np.float32))
  assert_no_rougher((o, *found[:3]), rough, exact, jnp.float16)


def test_unsupported_calls_raise():
  q, k, v = qkv()
  call = functools.partial(flash_attention, backend="mosaic_gpu")
  with pytest.raises(ValueError, match="dtype: found q float32.*xla_blockwise"):
    call(*(x.astype(jnp.float32) for x in (q, k, v)))
  with pytest.raises(ValueError, match="bias.*xla_blockwise"):
    call(q, k, v, bias=jnp.zeros((1, 1, T, S)))
  with pytest.raises(ValueError, match="precision.*xla_blockwise"):
    call(q, k, v, precision=jax.lax.Precision.HIGHEST)
  with pytest.raises(ValueError, match="operand='shared'"):
    call(q, k, v, interpret=plgpu.InterpretGPUParams())
  with pytest.raises(ValueError, match="expected GpuTiles"):
    call(q, k, v, config=Blocks())
