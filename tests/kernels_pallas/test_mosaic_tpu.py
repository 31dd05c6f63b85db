"""The TPU kernels, interpreted on the CPU, against the reference."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention import dropout
from kernels_pallas.flash_attention.api import choose, flash_attention
from kernels_pallas.flash_attention.mosaic_tpu import mosaic_tpu_attention
from kernels_pallas.flash_attention.sharded import Cut, sharded_attention
from kernels_pallas.flash_attention.spec import Blocks, Operands, Spec
from kernels_pallas.flash_attention.tiling import Tile, Tiles, fit
from kernels_pallas.masks import Mask
from tests.support_pairwise import pairwise

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


FACTORS = {
  "mask": {
    "window_segments": lambda: Mask.causal((6, None), (ids(B, T), ids(B, S))),
    "blocks_empty_rows": lambda: Mask.block_causal(3, offset=-5),
    "diffusion": lambda: Mask.block_diffusion(L, 3),
    "prefix": lambda: Mask.prefix_lm(jnp.array([9, 0]), (8, None)),
    "positions": lambda: Mask.full(
      (3, 1), None, ids(B, T, high=9), ids(1, S, high=9)
    ),
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
ROWS = pairwise(FACTORS)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "-".join(r.values()))
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
  assert max(float(jnp.abs(g).max()) for g in expected[1].values()) > 1e-3
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


def test_tiles_do_not_matter_and_dropout_does_not_see_them():
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


def test_padding_may_hold_anything():
  """NaN in padding reaches neither outputs nor gradients."""
  queries = jnp.where(jnp.arange(T) < 9, 0, -1)[None].repeat(B, 0)
  keys = jnp.where(jnp.arange(S) < jnp.array([[5], [16]]), 0, -1)
  step = quick(functools.partial(run, mask=Mask.full(
    segments=(queries, keys))))  # fmt: skip
  q, k, v = qkv()
  clean = step(q, k, v)
  dead_q, dead_k = (queries < 0)[:, :, None, None], (keys < 0)[:, :, None, None]
  dirty = step(*(jnp.where(d, jnp.nan, x) for d, x in (
    (dead_q, q), (dead_k, k), (dead_k, v))))  # fmt: skip
  chex.assert_trees_all_equal(clean, dirty)
  chex.assert_tree_all_finite((clean[0][0], clean[1]))
  assert not np.any(clean[0][0][:, 9:])


def test_rounding_is_at_most_twice_that_of_plain_bfloat16():
  """The rule of the flash-attention authors; see kernels.md 14.1."""
  x = qkv(jnp.bfloat16)

  def plain(q, k, v, dtype):
    """Attention in `dtype` throughout, differentiated by JAX."""

    def f(q, k, v):
      k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))
      s = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
      seen = Mask.causal().visible(T, S)[:, None]
      p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
      o = jnp.einsum("bnts,bsnh->btnh", p.astype(dtype), v)
      return jnp.sum(jnp.sin(3 * o.astype(jnp.float32))), o

    x = (y.astype(dtype) for y in (q, k, v))
    (_, o), g = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*x)
    return jax.tree.map(lambda y: y.astype(jnp.float32), (o, g))

  truth = quick(functools.partial(plain, dtype=jnp.float32))(*x)
  rough = quick(functools.partial(plain, dtype=jnp.bfloat16))(*x)
  (o, _), g = quick(functools.partial(run, mask=Mask.causal()))(*x)
  for ours, theirs, exact in zip(
    *map(jax.tree.leaves, ((o, g), rough, truth)), strict=True
  ):
    assert ours.dtype == jnp.bfloat16
    error = float(jnp.abs(ours.astype(jnp.float32) - exact).max())
    assert error <= 2 * float(jnp.abs(theirs - exact).max()) + 1e-5


# Tiles whose parts differ, so that a count says which kernel it is of.
COUNTED = {
  "split": Tiles(
    Tile(4, 8, 4, 8), Tile(8, 4, 8, 4), Tile(16, 8, 8, 8), "split"
  ),
  "fused": Tiles(Tile(8, 16, 4, 16), Tile(4, 8, 4, 8), Tile(), "fused"),
}
BY_INDEX = {
  "causal": lambda: Mask.causal(),
  "sliding": lambda: Mask.causal((5, None)),
  "blocks": lambda: Mask.block_causal(5, (6, 2)),
  "diffusion": lambda: Mask.block_diffusion(15, 4),
}
PACKED = jnp.asarray(np.repeat([0, 1, 2, 0, 1], [11, 13, 6, 4, 26]), jnp.int32)


def counted(config, mask, rows=1, n=30):
  """A function of the mask: how often each part of a tile is worked on.

  Counted inside the kernels, which ask for dropout of what they visit: (row,
  queries and keys of a part, where it starts).
  """
  seen = collections.Counter()

  def count(b, i, j):
    at = (b, i.shape[1], j.shape[0], i[0, 0], j[0, 0])
    seen.update([tuple(map(int, at))])

  def keep(seed, rate, b, h, i, j):
    jax.debug.callback(count, b, i, j)
    return dropout.keep(seed, rate, b, h, i, j)

  spec = Spec(scale=0.5, dropout_rate=0.1, keep=keep, blocks=config)
  x = Operands(*(draw(rows, n, 1, 4, seed=s) for s in range(3)), mask,
               seed=jnp.uint32(0))  # fmt: skip

  @quick
  def gradient(mask):
    def total(q, k, v):
      y = x._replace(q=q, k=k, v=v, mask=mask)
      return mosaic_tpu_attention(spec, True, y)[0].sum()

    return jax.grad(total, (0, 1, 2))(x.q, x.k, x.v)

  def run(mask):
    seen.clear()
    jax.block_until_ready(gradient(mask))
    jax.effects_barrier()
    return seen

  return run


def in_tiles(x, tile, reduce=np.any):
  """`reduce` over each tile of [rows, T, S], false beyond its ends."""
  rows, t, s = x.shape
  x = np.pad(x, ((0, 0), (0, -t % tile.q), (0, -s % tile.kv)))
  x = x.reshape(rows, -(-t // tile.q), tile.q, -(-s // tile.kv), tile.kv)
  return reduce(x, (2, 4))


def once_each(config, visited):
  """What `counted` finds where each kernel visits the tiles `visited(tile)`."""
  expected = collections.Counter()
  fused = config.backward == "fused"
  for tile in (config.forward, config.dkv, *(() if fused else (config.dq,))):
    for b, i, j in np.argwhere(visited(tile)).tolist():
      for part_i in range(i * tile.q, (i + 1) * tile.q, tile.q_part):
        for part_j in range(j * tile.kv, (j + 1) * tile.kv, tile.kv_part):
          at = (b, tile.q_part, tile.kv_part, part_i, part_j)
          expected[at] += 1
  return expected


@pytest.mark.parametrize("backward", COUNTED)
@pytest.mark.parametrize("name", BY_INDEX)
def test_no_tile_is_visited_without_a_visible_pair(name, backward):
  """Exactly the tiles with one, once in each kernel, whatever their size."""
  config, mask = COUNTED[backward], BY_INDEX[name]()
  seen = np.asarray(mask.visible(30, 30))
  expected = once_each(config, lambda tile: in_tiles(seen, tile))
  assert counted(config, mask)(mask) == expected
  assert any(not in_tiles(seen, t).all() for t in (config.forward, config.dkv))


def test_tiles_that_segments_allow_are_visited():
  """Exactly those with a visible pair where documents stand one by one.

  Segments in any order are bounded: a tile is visited where the indices allow
  a pair, and the least and greatest segments of its queries and of its keys,
  padding apart, enclose a common one.
  """
  config = COUNTED["fused"]
  packed = Mask.causal(segments=PACKED.reshape(2, 30))
  run = counted(config, packed, rows=2)
  seen = np.asarray(packed.visible(30, 30))
  assert run(packed) == once_each(config, lambda tile: in_tiles(seen, tile))

  mixed = Mask.causal(segments=ids(2, 30, high=4))
  allowed = np.tril(np.ones((2, 30, 30), bool))

  def meet(tile):
    """Whether some integer is between some two of each side's segments."""
    found = in_tiles(allowed, tile)
    for b, i, j in np.argwhere(found):
      sides = (
        x[x >= 0]
        for x in (
          np.asarray(mixed.q_segments[b, i * tile.q : (i + 1) * tile.q]),
          np.asarray(mixed.kv_segments[b, j * tile.kv : (j + 1) * tile.kv]),
        )
      )
      ours, theirs = (set(range(x.min(), x.max() + 1)) if len(x) else set()
                      for x in sides)  # fmt: skip
      found[b, i, j] = bool(ours & theirs)
    return found

  expected = once_each(config, meet)
  assert run(mixed) == expected
  # More than need be, never fewer.
  seen = np.asarray(mixed.visible(30, 30))
  needed = once_each(config, lambda tile: in_tiles(seen, tile))
  assert needed < expected


@pytest.mark.parametrize("backward", ["split", "fused"])
def test_kernels_do_not_race_or_read_what_nobody_wrote(
  tpu_interpreter, backward
):
  """With memory full of NaN, and parallel grid steps in random order."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  config = tiles(128, 128, 128, 128, backward)
  q, k, v = (draw(1, 256, n, 8, seed=n) for n in (2, 1, 1))
  mask = Mask.causal((150, None), offset=-40)
  found = run(q, k, v, mask, config, tpu_interpreter)
  expected = quick(
    functools.partial(run, mask=mask, config=config)
  )(q, k, v)  # fmt: skip
  assert not interpret_pallas_call.races.races_found
  chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


def test_no_feature_races_or_reads_what_nobody_wrote(tpu_interpreter):
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

  found = step(x, backend="mosaic_tpu", config=tiles(8, 8, 8, 8, "split"),
               interpret=tpu_interpreter)  # fmt: skip
  assert not interpret_pallas_call.races.races_found
  expected = quick(functools.partial(step, backend="reference"))(x)
  assert min(float(jnp.abs(g).max()) for g in expected[1].values()) > 1e-2
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


def test_what_no_tpu_takes_is_refused():
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
  assert names == ["mosaic_tpu", "xla_blockwise", "xla_blockwise"]


def test_each_device_runs_the_kernel_on_its_own_part():
  q, k, v = (draw(2, T, n, 8, seed=n) for n in (4, 2, 2))
  options = {
    "backend": "mosaic_tpu",
    "interpret": True,
    "config": TILES["fused"],
    "mask": Mask.causal(),
  }
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(
    jax.sharding.AxisType.Auto,) * 2)  # fmt: skip
  cut = Cut(batch=("data",), heads=("tensor",))

  def gradients(attend):
    loss = lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v)))  # noqa: E731
    return quick(jax.grad(loss, (0, 1, 2)))(q, k, v)

  whole = gradients(lambda *x: flash_attention(*x, **options))
  with jax.set_mesh(mesh):
    parts = gradients(lambda *x: sharded_attention(*x, cut=cut, **options))
  # The same operations for each head.
  chex.assert_trees_all_close(parts, whole, rtol=1e-6, atol=1e-6)
