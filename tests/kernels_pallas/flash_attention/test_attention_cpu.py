"""The C++ attention kernel on every instruction set, forward and backward.

The expected results are the reference's in float64. A sum of n products in
float32 is off by n/2 of its units at most, and typically by about the root of
n; cancellation is bounded by the sum of magnitudes.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import by_platform, cpu_library
from kernels_pallas.flash_attention import cpu, dispatch
from kernels_pallas.flash_attention.api import choose, flash_attention
from kernels_pallas.flash_attention.cpu import CpuTiles
from kernels_pallas.masks import Mask
from research.nn import flops
from tests.support_cpu import supported
from tests.support_pairwise import pairwise

B, N, T, S = 2, 4, 150, 170
UNIT = 2.0**-24


@pytest.fixture(autouse=True)
def compiled(cxx):
  """Skips where there is no compiler."""
  assert cpu.available(), cxx


def draw(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).standard_normal(shape)


def positions(length, behind):
  """Positions of two rows, the second shorter and offset."""
  one, two = np.arange(length), np.arange(length) + 7
  two[-behind:] = -1
  return jnp.asarray(np.stack([one, two]), jnp.int32)


def documents(length):
  """Segments of two rows; the last tokens of the first are padding."""
  one = np.repeat([4, 0, 9, -1], [40, 33, 50, length - 123])
  return jnp.asarray(np.stack([one, np.arange(length) // 60]), jnp.int32)


def bounds(R):
  """R intervals a query; those of one row are empty for 40 queries."""
  found = np.sort(np.random.default_rng(5).integers(0, S, (B, 2 * R, T)), 1)
  found[1, :, 50:90] = 0
  return jnp.asarray(found, jnp.int32)


MASKS = {
  "full": lambda: Mask.full(),
  "causal": lambda: Mask.causal(),
  "window": lambda: Mask.causal((20, 0)),
  "both sides": lambda: Mask.full((9, 5), offset=0),
  "prefix": lambda: Mask.prefix_lm(jnp.asarray([40, 0])),
  "blocks": lambda: Mask.block_causal(16),
  "documents": lambda: Mask.causal(segments=(documents(T), documents(S))),
  "one of documents": lambda: Mask.causal(
    segments=(documents(T)[:1], documents(S)[:1])
  ),
  "positions": lambda: Mask.causal(
    q_positions=positions(T, 20), kv_positions=positions(S, 31)
  ),
  "of no key": lambda: Mask.causal(offset=-60),
  "function": lambda: Mask.where(stripes),
  "intervals": lambda: Mask.intervals(bounds(3), (90, None)),
}


def stripes(q, k):
  return (q - k) % 50 < 20


SIZES = {"H": (8, 24, 37), "Hv": (8, 40), "K": (4, 2, 1), "sinks": (0, 1)}
KINDS = tuple(name for name in MASKS if name != "intervals")
CASES = pairwise({**SIZES, "mask": KINDS, "isa": cpu.ISAS[1:]})
CASES += [
  {"H": 37, "Hv": 40, "K": 2, "sinks": 1, "mask": "intervals", "isa": isa}
  for isa in cpu.ISAS[1:]
]


def operands(H, Hv, K, sinks):
  x = {"q": draw(B, T, N, H), "k": draw(B, S, K, H, seed=1)}
  x["v"] = draw(B, S, K, Hv, seed=2)
  if sinks:
    x["sinks"] = draw(N)
    x["sinks"][1] = -np.inf
  return x, (draw(B, T, N, Hv, seed=3), draw(B, N, T, seed=4))


def results(x, cotangents, mask, dtype, **options):
  """Output, log-sum-exp where finite, and the gradients, as float64."""
  x, (do, dl) = jax.tree.map(lambda y: jnp.asarray(y, dtype), (x, cotangents))

  def run(x):
    return flash_attention(**x, mask=mask, return_lse=True, **options)

  @jax.jit
  def all_of(x, do, dl):
    (o, lse), back = jax.vjp(run, x)
    seen = jnp.isfinite(lse)
    (dx,) = back((do, jnp.where(seen, dl, 0)))
    return o, jnp.where(seen, lse, 0), seen, dx

  return jax.tree.map(lambda y: np.asarray(y, float), all_of(x, do, dl))


@functools.cache
def expected(H, Hv, K, sinks, mask):
  with jax.enable_x64(True):
    return results(
      *operands(H, Hv, K, sinks), MASKS[mask](), float, backend="reference"
    )


@pytest.mark.parametrize(
  "case", CASES, ids=lambda c: "-".join(map(str, c.values()))
)
@pytest.mark.sample(4, 2)
def test_agrees_with_the_reference(case):
  isa, mask = case.pop("isa"), case.pop("mask")
  supported(isa)
  config = CpuTiles(chunk=64, isa=isa)
  got = results(
    *operands(**case), MASKS[mask](), np.float32, backend="cpu", config=config
  )
  want = expected(**case, mask=mask)
  # Sums of S, of T and of T times the heads that share a key, of magnitudes
  # of about the root of H times a cotangent's.
  bound = UNIT * np.sqrt(T * N * S)
  for name, ours, theirs in zip(("o", "lse", "seen"), got, want, strict=False):
    chex.assert_trees_all_close(
      ours, theirs, rtol=bound, atol=bound, custom_message=name
    )
  chex.assert_trees_all_close(got[3], want[3], rtol=bound, atol=3 * bound)


@pytest.mark.parametrize("isa", cpu.ISAS[1:])
@pytest.mark.parametrize("sinks", [0, 1])
def test_padding_may_contain_nan(isa, sinks):
  supported(isa)
  mask = MASKS["positions"]()
  x, cotangents = operands(24, 24, 2, sinks)
  config = CpuTiles(chunk=64, isa=isa)
  options = dict(dtype=np.float32, backend="cpu", config=config)
  clean = results(x, cotangents, mask, **options)
  for name, places in (("q", mask.q_positions), ("k", mask.kv_positions)):
    for one in (name, "v")[: 1 + (name == "k")]:
      x[one] = np.where(places[:, :, None, None] < 0, np.nan, x[one])
  do = np.where(mask.q_positions[:, :, None, None] < 0, np.nan, cotangents[0])
  dirty = results(x, (do, cotangents[1]), mask, **options)
  chex.assert_trees_all_equal(clean, dirty)
  dq = clean[3]["q"][1, -20:]
  dk = clean[3]["k"][1, -31:]
  assert not dq.any() and not dk.any() and not clean[0][1, -20:].any()


@pytest.mark.parametrize("isa", cpu.ISAS[1:])
def test_visible_nan_propagates(isa):
  supported(isa)
  x, _ = operands(8, 8, 4, 0)
  x["k"][0, 100] = np.nan
  o = flash_attention(
    **jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), x),
    mask=Mask.causal(offset=0),
    backend="cpu",
    config=CpuTiles(isa=isa),
  )
  assert np.isnan(o[0, 100:]).all() and np.isfinite(o[0, :100]).all()
  assert np.isfinite(o[1]).all()


def test_large_logits_do_not_overflow():
  x, _ = operands(8, 8, 4, 0)
  x["q"] = 1e4 * x["q"]
  f = functools.partial(flash_attention, mask=Mask.causal())
  ours = f(
    **jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), x), backend="cpu"
  )
  # The largest logit dominates, whatever the others are.
  with jax.enable_x64(True):
    theirs = f(**jax.tree.map(jnp.asarray, x), backend="reference")
  share = np.abs(np.asarray(ours) - np.asarray(theirs)) > 1e-2
  assert np.isfinite(ours).all() and share.mean() < 0.01


def test_every_chunk_has_keys():
  for rows in (1, 3, 16, 40):
    for keys in (1, 5, 384, 769, 1000, 4096):
      for chunk in (1, 64, 384):
        chunks = CpuTiles(chunk=chunk).chunks(rows, keys)
        each = -(-keys // chunks)
        assert (chunks - 1) * each < keys and chunks <= 4
        assert chunks == 1 or each >= min(chunk, keys)


def test_chunks_agree():
  x, cotangents = operands(24, 24, 2, 0)
  found = [
    results(
      x,
      cotangents,
      Mask.causal(),
      np.float32,
      backend="cpu",
      config=CpuTiles(chunk=chunk, tasks=99),
    )
    for chunk in (1000, 60, 7)
  ]
  bound = UNIT * np.sqrt(T * N * S)
  for other in found[1:]:
    chex.assert_trees_all_close(found[0], other, rtol=bound, atol=bound)


REFUSED = {
  "bias": (dict(bias=jnp.zeros((T, S))), "bias: found one"),
  "softcap": (dict(softcap=5.0), "softcap, dropout_rate"),
  "dropout": (dict(dropout_rate=0.5, dropout_seed=0), "softcap, dropout_rate"),
  "precision": (dict(precision="BF16_BF16_F32"), "precision"),
  "mask": (
    dict(mask=Mask.where(lambda q, k: (q - k) % 2 == 0)),
    "more than 8 intervals",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.sample(3)
def test_unsupported_calls_raise_and_auto_takes_another_backend(name):
  options, message = REFUSED[name]
  x = jax.tree.map(
    lambda y: jnp.asarray(y, jnp.float32), operands(8, 8, 2, 0)[0]
  )
  with pytest.raises(ValueError, match=message):
    flash_attention(**x, backend="cpu", **options)
  ours, theirs = (
    flash_attention(**x, backend=backend, **options)
    for backend in ("auto", "xla_blockwise")
  )
  chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_computed_in_32(dtype):
  """Only inputs and outputs are rounded."""
  x, (do, _) = operands(8, 8, 2, 1)
  narrow = jax.tree.map(lambda y: jnp.asarray(y, dtype), x)
  wide = jax.tree.map(lambda y: y.astype(jnp.float32), narrow)

  def attend(x):
    return flash_attention(**x, causal=True, return_lse=True, backend="cpu")

  (o, lse), back = jax.vjp(attend, narrow)
  (want, exact), forth = jax.vjp(attend, wide)
  chex.assert_trees_all_equal((o, lse), (want.astype(dtype), exact))
  do = jnp.asarray(do, dtype)
  found = back((do, jnp.zeros_like(lse)))[0]
  theirs = forth((do.astype(jnp.float32), jnp.zeros_like(lse)))[0]
  # `o` in the gradient was rounded: one rounding of `do . o`.
  for name, y in found.items():
    assert y.dtype == dtype, name
    scale = float(jnp.abs(theirs[name]).max())
    chex.assert_trees_all_close(
      y.astype(jnp.float32),
      theirs[name],
      atol=4 * float(jnp.finfo(dtype).eps) * scale,
      custom_message=name,
    )


def test_auto_takes_the_cpu_kernel_for_supported_calls():
  def taken(*shape, dtype=jnp.float32):
    with jax.enable_x64(dtype == jnp.float64):
      return choose(jnp.zeros(shape, dtype))[0]

  assert taken(1, 32, 2, 8) == "cpu"
  assert taken(1, 31, 2, 8) == "xla_blockwise"
  assert taken(1, 32, 2, 8, dtype=jnp.bfloat16) == "cpu"
  assert taken(1, 32, 2, 8, dtype=jnp.float64) == "xla_blockwise"


@pytest.mark.slow
def test_without_a_compiler_xla_attends(monkeypatch, tmp_path):
  x = jax.tree.map(
    lambda y: jnp.asarray(y, jnp.float32), operands(8, 8, 2, 0)[0]
  )
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("CXX", "no-such-compiler")
  cpu_library.available.cache_clear()
  try:
    with pytest.warns(RuntimeWarning, match="looked for no-such-compiler"):
      ours = flash_attention(**x, causal=True)
    with pytest.raises(ValueError, match="needs a C"):
      flash_attention(**x, causal=True, backend="cpu")
  finally:
    cpu_library.available.cache_clear()
  theirs = flash_attention(**x, causal=True, backend="xla_blockwise")
  chex.assert_trees_all_equal(ours, theirs)


@pytest.mark.parametrize("wrong", [dict(chunk=0), dict(tasks=0), dict(isa="x")])
def test_an_invalid_config_raises(wrong):
  with pytest.raises(ValueError, match="config: found CpuTiles"):
    CpuTiles(**wrong)


def test_every_backend_has_its_kernel_by_platform():
  assert set(dispatch.KERNELS.values()) < set(dispatch.BACKENDS)
  assert set(dispatch.KERNELS) == set(by_platform.PLATFORMS)


@pytest.mark.parametrize("batched", ["all", "q", "keys", "mask", "sinks"])
@pytest.mark.sample(2)
def test_a_vmap_is_one_call_of_more_rows(batched):
  """Whichever arrays are mapped: results are those of single calls."""
  size = 3
  x, (do, _) = operands(24, 24, 2, 1)
  x = {n: jnp.asarray(y, jnp.float32) for n, y in x.items()}
  segments = documents(T), documents(S)
  mapped = {
    "all": ("q", "k", "v", "sinks", "segments"),
    "q": ("q",),
    "keys": ("k", "v"),
    "mask": ("segments",),
    "sinks": ("sinks",),
  }[batched]
  moves = jnp.arange(size, dtype=jnp.float32)

  def one(move):
    def shifted(name, y):
      return y + move.astype(y.dtype) if name in mapped else y

    y = {name: shifted(name, z) for name, z in x.items()}
    mask = Mask.causal(segments=tuple(shifted("segments", z) for z in segments))

    def run(y):
      return flash_attention(**y, mask=mask, backend="cpu")

    o, back = jax.vjp(run, y)
    return o, back(jnp.asarray(do, jnp.float32))[0]

  together = jax.jit(jax.vmap(one))
  text = str(jax.make_jaxpr(together)(moves))
  assert text.count("ffi_call[") == 2 and "scan" not in text
  alone = jax.jit(one)
  rows = [alone(move) for move in moves]
  chex.assert_trees_all_close(
    together(moves),
    jax.tree.map(lambda *y: jnp.stack(y), *rows),
    rtol=1e-6,
    atol=1e-6,
  )


def test_very_negative_logits_are_unaffected_by_padding():
  """A chunk is padded with zeros, whose exponentials are infinite."""
  S, H = 771, 8
  x = {
    "q": np.full((1, 40, 1, H), 8.0),
    "k": np.full((1, S, 1, H), -8.0) + 0.01 * draw(1, S, 1, H),
    "v": draw(1, S, 1, H),
  }
  cotangents = draw(1, 40, 1, H, seed=3), draw(1, 1, 40, seed=4)
  for mask in (Mask.full(), Mask.causal()):
    ours = results(
      x,
      cotangents,
      mask,
      np.float32,
      backend="cpu",
      config=CpuTiles(tasks=2),
    )
    assert ours[1].max() < -88
    with jax.enable_x64(True):
      theirs = results(x, cotangents, mask, float, backend="reference")
    # Logits of 181 are off by some of their units.
    chex.assert_trees_all_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_errors_do_not_grow_with_all_keys():
  S = 1 << 16
  q, k = np.zeros((1, 32, 1, 8)), np.zeros((1, S, 1, 8))
  v = 1 + 0.1 * draw(1, S, 1, 8)
  q, k, narrow = (jnp.asarray(y, jnp.float32) for y in (q, k, v))
  o, lse = flash_attention(q, k, narrow, backend="cpu", return_lse=True)
  # Of a tile's 128 keys, and then of 512 tiles.
  bound = UNIT * (128 + 512)
  want = np.asarray(narrow, float).mean(1)
  chex.assert_trees_all_close(o[0, 0, 0], want[0, 0], rtol=bound / 8)
  chex.assert_trees_all_close(lse[0, 0, 0], np.log(S), rtol=bound / 8)


def mesh_of(size):
  return jax.make_mesh(
    (size,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)
  )


def test_inside_a_shard_map_operands_may_be_shared():
  """Rows are sharded, keys and segments are replicated."""
  r = np.random.default_rng(0)
  q = jnp.asarray(r.standard_normal((8, 40, 2, 8), np.float32))
  k, v = (
    jnp.asarray(r.standard_normal((1, 40, 2, 8), np.float32)) for _ in "kv"
  )
  segments = jnp.asarray(np.arange(40)[None] // 15)

  def attend(q, k, v, segments):
    k, v = (jnp.broadcast_to(y, (len(q), *y.shape[1:])) for y in (k, v))
    return flash_attention(q, k, v, segment_ids=segments, causal=True)

  whole = attend(q, k, v, segments)
  rows, none = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
  with jax.set_mesh(mesh_of(8)):
    run = jax.shard_map(
      attend, in_specs=(rows, none, none, none), out_specs=rows
    )
    text = str(jax.make_jaxpr(run)(q, k, v, segments))
    cut = jax.jit(run)(q, k, v, segments)
  assert "ffi_call" not in text and "by_platform" in text
  chex.assert_trees_all_close(cut, whole, rtol=1e-6, atol=1e-6)


def test_sharded_arrays_are_not_gathered():
  q = jnp.zeros((8, 40, 2, 8))
  for size, backend in ((1, "cpu"), (8, "xla_blockwise")):
    with jax.set_mesh(mesh_of(size)):
      assert choose(q)[0] == backend


def test_a_mesh_of_one_device_transforms_as_without_a_mesh():
  """The C++ kernel has no tangents; the blockwise ones are used instead."""
  x = jax.tree.map(
    lambda y: jnp.asarray(y, jnp.float32), operands(8, 8, 2, 0)[0]
  )

  def loss(x):
    return jnp.sum(jnp.sin(flash_attention(**x, causal=True)))

  def twice(x):
    return jax.jvp(jax.grad(loss), (x,), (x,))

  with jax.set_mesh(mesh_of(1)):
    ours = jax.jit(twice)(x)
    assert flops.count_flops(jax.grad(loss), x) > 0
  chex.assert_trees_all_close(ours, jax.jit(twice)(x), rtol=1e-6, atol=1e-6)


def test_programs_for_other_platforms_load_no_library(monkeypatch):
  monkeypatch.setattr(cpu, "available", lambda: pytest.fail("was asked"))
  x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
  f = jax.jit(functools.partial(flash_attention, causal=True))
  f.trace(x, x, x).lower(lowering_platforms=("tpu",))
