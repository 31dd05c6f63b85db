"""The TPU kernels, interpreted on the CPU, against the reference."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention.api import choose, flash_attention
from kernels_pallas.flash_attention.sharded import (
  AttentionSharding,
  sharded_attention,
)
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles, fit
from kernels_pallas.masks import Mask
from tests.support_hlo import collectives
from tests.support_pairwise import cases
from tests.support_rounding import assert_no_rougher, in_low_precision

# Interpreted kernels are large programs over tiny arrays.
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)
# No length is a multiple of any tile; a block diffusion mask has T = S.
B, T, S, L = 2, 13, 19, 7


def tiles(q, kv, q_part, kv_part, backward="fused"):
  return Tiles(*[Tile(q, kv, q_part, kv_part)] * 3, backward)


TILES = {
  "split": tiles(8, 8, 4, 8, "split"),
  "fused": tiles(4, 16, 4, 8),
  "one_part": tiles(16, 24, 16, 24),
}


def draw(*shape, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def ids(*shape, high=2, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.integers(-1, high, shape), jnp.int32)


def bounds():
  """Two intervals a query, that overlap or are empty here and there."""
  rng = np.random.default_rng(3)
  return jnp.asarray(rng.integers(0, S + 2, (B, 4, T)), jnp.int32)


FACTORS = {
  "mask": {
    "window_segments": lambda: Mask.causal((6, None), (ids(B, T), ids(B, S))),
    "blocks_empty_rows": lambda: Mask.block_causal(3, offset=-5),
    "diffusion": lambda: Mask.block_diffusion(L, 3),
    "prefix": lambda: Mask.prefix_lm(jnp.array([9, 0]), (8, None)),
    "positions": lambda: Mask.full(
      (3, 1), None, ids(B, T, high=9), ids(1, S, high=9)
    ),
    "function": lambda: Mask.where(
      lambda q, k: (k < 2) | ((q - k) % 5 < 2), (14, None)
    ),
    "intervals": lambda: Mask.intervals(bounds(), (14, None)),
  },
  "bias": {
    "none": lambda N, T, S: None,
    "keys": lambda N, T, S: draw(B, 1, 1, S),
    "heads": lambda N, T, S: draw(1, N, T, S),
    "queries": lambda N, T, S: draw(1, N, T, 1),
  },
  "heads": {"grouped": (4, 2, 4, 4), "other_width": (2, 2, 4, 6)},
  "softcap": {"none": {}, "first": {"softcap": 1.5}, "last": {
    "softcap": 1.5, "bias_before_softcap": True}},
  "sinks": {"no": False, "yes": True},
  "dropout": {"no": {}, "yes": {"dropout_rate": 0.3, "dropout_seed": 5}},
  "lse": {"no": 0.0, "yes": 1.0},
  "tiles": {name: TILES[name] for name in ("split", "fused")},
}  # fmt: skip
ROWS = cases(FACTORS)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.sample(2, 1, 2)
def test_agrees_with_the_reference(row):
  choice = {name: FACTORS[name][value] for name, value in row.items()}
  N, K, H, Hv = choice["heads"]
  t, s = (2 * L, 2 * L) if row["mask"] == "diffusion" else (T, S)
  x = {"q": draw(B, t, N, H), "k": draw(B, s, K, H), "v": draw(B, s, K, Hv)}
  bias = choice["bias"](N, t, s)
  x |= {} if bias is None else {"bias": bias}
  x |= {"sinks": draw(N)} if choice["sinks"] else {}
  options = {**choice["softcap"], **choice["dropout"], "return_lse": True}

  def step(x, mask, **backend):
    def loss(x):
      o, lse = flash_attention(**x, mask=mask, **options, **backend)
      lse = jnp.where(jnp.isneginf(lse), 0, lse)
      return jnp.sum(jnp.sin(3 * o)) + choice["lse"] * jnp.sum(jnp.cos(lse)), (
        o,
        lse,
      )

    return jax.value_and_grad(loss, has_aux=True)(x)

  @quick
  def both(x, mask):
    ours = {"backend": "mosaic_tpu", "interpret": True}
    return (
      step(x, mask, backend="reference"),
      step(x, mask, config=choice["tiles"], **ours),
    )

  expected, found = both(x, choice["mask"]())
  assert max(np.abs(g).max() for g in expected[1].values()) > 1e-3
  # Float32 sums of some hundred terms near 1, in another order.
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)


def run(q, k, v, mask=None, config="fused", interpret=True, **options):
  """The output, the log-sum-exp and dq, dk, dv of sums of sines."""

  def f(q, k, v):
    o, lse = flash_attention(
      q,
      k,
      v,
      mask=mask,
      backend="mosaic_tpu",
      config=TILES.get(config, config),
      interpret=interpret,
      return_lse=True,
      **options,
    )
    return jnp.sum(jnp.sin(3 * o.astype(jnp.float32))), (o, lse)

  (_, out), gradients = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)
  return out, gradients


def qkv(dtype=jnp.float32):
  return (
    draw(B, T, 4, 8, dtype=dtype),
    draw(B, S, 2, 8, dtype=dtype),
    draw(B, S, 2, 8, seed=1, dtype=dtype),
  )


@pytest.mark.slow
def test_results_and_dropout_do_not_depend_on_tiles():
  found = [
    quick(
      functools.partial(
        run, mask=Mask.causal(), config=c, dropout_rate=0.4, dropout_seed=3
      )
    )(*qkv())
    for c in TILES
  ]
  for other in found[1:]:
    chex.assert_trees_all_close(other, found[0], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_padding_may_contain_nan():
  """NaN in padding reaches neither outputs nor gradients."""
  queries = np.where(np.arange(T) < 9, 0, -1)[None].repeat(B, 0)
  keys = np.where(np.arange(S) < np.array([[5], [16]]), 0, -1)
  step = quick(
    functools.partial(
      run,
      mask=Mask.full(
        segments=tuple(jnp.asarray(x, jnp.int32) for x in (queries, keys))
      ),
    )
  )
  q, k, v = qkv()
  clean = step(q, k, v)
  dead_q, dead_k = (queries < 0)[:, :, None, None], (keys < 0)[:, :, None, None]
  dirty = step(*(np.where(d, np.float32(np.nan), x) for d, x in (
    (dead_q, q), (dead_k, k), (dead_k, v))))  # fmt: skip
  chex.assert_trees_all_equal(clean, dirty)
  chex.assert_tree_all_finite((clean[0][0], clean[1]))
  assert not np.any(np.asarray(clean[0][0])[:, 9:])


@pytest.mark.slow
def test_rounding_is_at_most_twice_that_of_plain_bfloat16():
  x = qkv(jnp.bfloat16)

  def results(q, k, v, **backend):
    def f(q, k, v):
      o = flash_attention(q, k, v, causal=True, **backend)
      return jnp.sum(jnp.sin(3 * o.astype(jnp.float32))), o

    (_, o), g = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)
    return o, *g

  ours = {"backend": "mosaic_tpu", "interpret": True, "config": TILES["fused"]}
  plain = functools.partial(results, backend="reference")
  found = quick(functools.partial(results, **ours))(*x)
  assert {y.dtype for y in found} == {jnp.dtype(jnp.bfloat16)}
  exact = quick(plain)(*(np.asarray(y, np.float32) for y in x))
  assert_no_rougher(found, in_low_precision(plain, *x), exact, jnp.bfloat16)


def test_large_logits_only_shift_the_log_sum_exp():
  """Adds a constant to all logits whose exponential is inf or 0."""
  step = quick(functools.partial(run, mask=Mask.causal()))
  q, k, v = qkv()

  def at(one, other):
    """Adds 500 * one * other to all logits."""
    level = (500 * 8**0.5) ** 0.5
    x, y = np.array(q), np.array(k)
    x[..., 0], y[..., 0] = one * level, other * level
    (o, lse), (dq, dk, dv) = jax.tree.map(np.asarray, step(x, y, v))
    # The column of the constant has gradients of its size times rounding.
    return o, lse - 500 * one * other, dq[..., 1:], dk[..., 1:], dv

  expected = at(0, 0)
  assert np.abs(expected[2]).max() > 1
  # Float32 of 500 in base 2 is accurate to 3e-5: so are probabilities.
  for sign in (1, -1):
    chex.assert_trees_all_close(at(1, sign), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["split", "fused"])
@pytest.mark.sample(2)
def test_kernels_do_not_race_or_read_uninitialized_memory(
  tpu_interpreter, backward
):
  """With memory full of NaN, and parallel grid steps in random order."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  config = tiles(128, 128, 128, 128, backward)
  q, k, v = (draw(1, 256, n, 8, seed=n) for n in (2, 1, 1))
  mask = Mask.causal((150, None), offset=-40)
  found = jax.block_until_ready(
    quick(
      functools.partial(
        run, mask=mask, config=config, interpret=tpu_interpreter
      )
    )(q, k, v)
  )
  expected = quick(
    functools.partial(run, mask=mask, config=config)
  )(q, k, v)  # fmt: skip
  assert not interpret_pallas_call.races.races_found
  chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_no_feature_races_or_reads_uninitialized_memory(tpu_interpreter):
  """Segments, sinks, soft cap, dropout, and a bias with its own kernel."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  n = 16
  x = {"q": draw(1, n, 2, 8), "k": draw(1, n, 1, 8), "v": draw(1, n, 1, 8)}
  x |= {"bias": draw(1, 1, 1, n), "sinks": draw(2)}
  mask = Mask.causal(segments=jnp.repeat(jnp.array([[1, 0, -1]]), 7, 1)[:, :n])

  def step(x, **backend):
    def loss(x):
      o = flash_attention(**x, mask=mask, softcap=1.5, dropout_rate=0.3,
                          dropout_seed=5, **backend)  # fmt: skip
      return jnp.sum(jnp.sin(3 * o)), o

    return jax.value_and_grad(loss, has_aux=True)(x)

  ours = functools.partial(
    step, backend="mosaic_tpu", config=tiles(8, 8, 8, 8, "split"),
    interpret=tpu_interpreter,
  )  # fmt: skip
  found = jax.block_until_ready(quick(ours)(x))
  assert not interpret_pallas_call.races.races_found
  expected = quick(functools.partial(step, backend="reference"))(x)
  assert min(np.abs(g).max() for g in expected[1].values()) > 1e-2
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("length", [1, 100, 128, 300, 2048, 2304, 5000])
def test_tiles_are_fitted_with_little_padding(length):
  tile = fit(Tile(2048, 1024, 256, 128), length, length)
  for block, part, most in (
    (tile.q, tile.q_part, 2048),
    (tile.kv, tile.kv_part, 1024),
  ):
    count = -(-length // block)
    assert block <= most and block % part == 0 and part % 128 == 0
    assert count * block - length < count * part


def test_calls_unsupported_on_tpus_raise():
  q, k, v = (x.astype(jnp.float16) for x in qkv())
  call = functools.partial(flash_attention, backend="mosaic_tpu")
  with pytest.raises(ValueError, match="expected bfloat16 or float32"):
    call(q, k, v)
  with pytest.raises(ValueError, match="multiples of 128"):
    call(*qkv(), config=TILES["fused"])
  with pytest.raises(ValueError, match="parts that divide"):
    Tile(8, 8, 3, 8)
  with pytest.raises(ValueError, match="auto"):
    Tiles(backward="atomic")


def test_the_backend_is_that_of_the_platform_compiled_for():
  q = jax.ShapeDtypeStruct((1, 256, 2, 8), jnp.bfloat16)

  def chosen(platform, config=None):
    device = jax.sharding.AbstractDevice("TPU v5", None, platform=platform)
    mesh = jax.sharding.AbstractMesh(
      (1,), ("data",), abstract_device=device
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
      return jax.eval_shape(
        lambda q: found.append(choose(q, config)) or q, q
      )  # fmt: skip

  found = []
  chosen("tpu")
  chosen("cpu")
  chosen("tpu", Blocks())
  names = [name for name, _ in found]
  assert names == ["mosaic_tpu", "cpu", "xla_blockwise"]


@pytest.mark.slow
def test_each_device_runs_the_kernel_on_its_own_shard():
  q, k, v = (draw(2, T, n, 8, seed=n) for n in (4, 2, 2))
  options = {
    "backend": "mosaic_tpu",
    "interpret": True,
    "config": TILES["fused"],
    "mask": Mask.causal(),
  }
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(
    jax.sharding.AxisType.Auto,) * 2)  # fmt: skip
  cut = AttentionSharding(batch=("data",), heads=("tensor",))

  def gradients(attend):
    loss = lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v)))  # noqa: E731
    return quick(jax.grad(loss, (0, 1, 2)))

  whole = gradients(lambda *x: flash_attention(*x, **options))(q, k, v)
  place = jax.sharding.NamedSharding(mesh, jax.P("data", None, "tensor"))
  parts = jax.device_put((q, k, v), place)
  with jax.set_mesh(mesh):
    program = gradients(
      lambda *x: sharded_attention(*x, sharding=cut, **options)
    )
    program = program.lower(*parts).compile()
    found = program(*parts)
  # The same operations for each head, without communication of operands.
  chex.assert_trees_all_close(found, whole, rtol=1e-6, atol=1e-6)
  assert not collectives(program.as_text(), mesh)
  assert {x.sharding.spec for x in found} == {place.spec}
