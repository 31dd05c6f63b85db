"""Attention over sharded tokens: exact, forward and backward."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.sharded import (
  AttentionSharding,
  sharded_attention,
  with_positions,
)
from kernels_pallas.flash_attention.spec import Backend, Blocks, Operands, Spec
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask
from kernels_pallas.masks.intervals import EMPTY, mask_intervals, tile_classes
from kernels_pallas.sequence_parallel import ring, zigzag
from kernels_pallas.sequence_parallel.ring import ring_attention
from tests import support_sequence as support
from tests.support_pairwise import cases
from tests.support_sequence import MASKS, T


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


# Mesh, sharding, shards in zig-zag order.
WAYS = {
  "ring": (support.ROWS, support.RING, 0),
  "ring in zig-zag order": (support.ROWS, support.RING, 4),
  "gathered in zig-zag order": (support.ROWS, support.GATHER, 4),
  "exchanged": (support.ROWS, support.ULYSSES, 0),
  "ring and heads": (
    {"along": 4, "heads": 2},
    AttentionSharding(heads=("heads",), ring=("along",)),
    4,
  ),
  "ring and exchanged": (
    {"along": 2, "others": 2, "rows": 2},
    AttentionSharding(("rows",), ring=("along",), ulysses=("others",)),
    0,
  ),
}
FACTORS = {
  "way": WAYS,
  "mask": MASKS,
  "heads": {"grouped": (4, 2, 4, 4), "one": (4, 1, 4, 4), "wide": (4, 4, 4, 6)},
  "softcap": {"no": {}, "yes": {"softcap": 1.5}},
  "without": {"nothing": (), "sinks": ("sinks",), "dlse": ("dlse",)},
}


@pytest.mark.parametrize("row", cases(FACTORS))
@pytest.mark.sample(43, 1)
def test_agrees_with_one_device(row):
  choice = {name: FACTORS[name][value] for name, value in row.items()}
  x = support.operands(choice["heads"])
  x = {name: y for name, y in x.items() if name not in choice["without"]}
  mask, options = MASKS[row["mask"]](), choice["softcap"]
  expected = support.alone(mask, x, **options)
  found = support.shared(mask, x, *choice["way"], **options)
  assert all(float(jnp.abs(g).max()) > 1e-3 for g in expected.values())
  chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
  ("way", "name"),
  [
    ("ring in zig-zag order", "marked"),
    ("gathered in zig-zag order", "intervals"),
    ("exchanged", "intervals"),
  ],
)
def test_intervals_are_cut_with_the_queries(way, name):
  x = support.operands((4, 4, 4, 4))
  mask = MASKS[name]()
  expected = support.alone(mask, x)
  found = support.shared(mask, x, *WAYS[way])
  chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


def test_coordinates_that_are_no_positions_take_no_window_on_a_mesh():
  marked = MASKS["marked"]()
  mask = dataclasses.replace(marked, window=(3, None))
  with pytest.raises(ValueError, match="with kv_positions alone"):
    support.shared(mask, support.operands(), support.ROWS, support.RING)
  # Nor by positions that are added before a layer's window is.
  assert with_positions(marked, T, T).q_positions is None


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ring in zig-zag order", "ring"])
@pytest.mark.sample(2, 1)
def test_float32_in_loops_of_tiles(way):
  x = support.operands(dtype=jnp.float32)
  mask, blocks = MASKS["segments"](), Blocks(q=4, k=4, unroll=1)
  expected = support.alone(mask, x)
  found = support.shared(mask, x, *WAYS[way], config=blocks)
  # Sums of up to 32 products of numbers near 1, eight of them at a time.
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ring", "gathered"])
@pytest.mark.sample(3)
def test_tpu_kernels(way):
  """Interpreted, two devices, tiles that would span both chunks of a shard."""
  cut = {
    "ring": AttentionSharding(ring=("along",)),
    "gathered": AttentionSharding(length=("along",)),
  }[way]
  x = support.operands(dtype=jnp.float32)
  tiles = Tiles(*[Tile(16, 16, 4, 4)] * 3)
  mask = Mask.causal(segments=support.documents(1))
  expected = support.alone(mask, x)
  found = support.shared(
    mask,
    x,
    {"along": 2},
    cut,
    shards=2,
    backend="mosaic_tpu",
    config=tiles,
    interpret=True,
  )
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_bfloat16_error_is_at_most_twice_that_of_one_device():
  exact = support.operands()
  x = {name: y.astype(jnp.bfloat16) for name, y in exact.items()}
  x["dlse"] = x["dlse"].astype(jnp.float32)
  mask = Mask.causal()
  wide = {name: y.astype(jnp.float64) for name, y in x.items()}
  expected = support.alone(mask, wide)

  @support.quick
  def alone(x):
    return support.results(flash_attention, mask, x)

  def errors(found):
    return {
      name: float(jnp.abs(y.astype(jnp.float64) - expected[name]).max())
      for name, y in found.items()
    }

  ours = errors(support.shared(mask, x, *WAYS["ring in zig-zag order"]))
  theirs = errors(alone(x))
  for name, error in ours.items():
    # kernels_pallas/MATH.md 8; the log-sum-exp has only float32's errors.
    assert error <= 2 * theirs[name] + 1e-6, (name, ours, theirs)


def test_only_shards_are_communicated():
  length = 88  # no other size
  x = support.operands(dtype=jnp.float32, length=length)
  done, found = support.program(support.ROWS, support.RING, x)
  assert {c.kind for c in found} == {"collective-permute"}
  # k and v, forth and back; dk and dv; positions [1, 22]. A loop and once.
  moved = [s for c in found for s in c.shapes if c.loops]
  assert moved.count((1, 22, 2, 4)) == 6 and set(moved) == {
    (1, 22, 2, 4),
    (1, 22),
  }
  last = [s for c in found for s in c.shapes if not c.loops]
  assert last == [(1, 22, 2, 4)] * 2
  assert f"{length}" not in {
    size for c in done.as_text().split("[")[1:] for size in
    c.split("]")[0].split(",")
  }  # fmt: skip


def visited(mask, at, shards):
  """Tiles of 4 x 4 that each shard's kernels are called for."""
  length, size = len(at), 4

  def attend(spec, x):
    B, T, N, _ = x.q.shape
    tiles = tile_classes(mask_intervals(x.mask, T, T), T, T, size, size)
    count = jnp.sum(tiles != EMPTY).astype(jnp.float64)
    # Partials combine to the logarithm of the sum.
    return jnp.zeros_like(x.q), jnp.full((B, N, T), jnp.log(count))

  around = ring._Ring(Backend(attend, None, Blocks), ("along",))
  x = jnp.ones((1, length, 1, 1))
  mask = support.reordered(support.with_positions(mask, length, length), at)

  def local(x, mask):
    return ring._ring(around, Spec(scale=1.0), Operands(x, x, x, mask))[1]

  cut = jax.P(None, "along")
  specs = jax.tree.map(lambda _: cut, mask)
  with jax.set_mesh(support.mesh_of({"along": shards})):
    lse = jax.jit(
      jax.shard_map(
        local, in_specs=(cut, specs), out_specs=jax.P(None, None, "along")
      )
    )(x, mask)
  return np.exp(lse[0, 0, :: length // shards]).round().astype(int).tolist()


@pytest.mark.parametrize("name", ["causal", "window"])
def test_every_shard_visits_as_many_tiles_and_none_without_a_pair(name):
  n, length = 4, 64
  mask = {"causal": Mask.causal(), "window": Mask.causal((9, None))}[name]
  visible = np.asarray(mask.visible(length, length))[0]
  found = {}
  for way, at in (
    ("text", np.arange(length)),
    ("zigzag", zigzag.zigzag(length, n)),
  ):
    tiles = visible[at][:, at].reshape(length // 4, 4, length // 4, 4)
    expected = tiles.any((1, 3)).reshape(n, -1).sum(1).tolist()
    found[way] = visited(mask, at, n)
    assert found[way] == expected
  if name == "causal":
    assert found == {"zigzag": [34] * 4, "text": [10, 26, 42, 58]}


@pytest.mark.slow
def test_a_step_without_a_visible_pair_does_nothing():
  """The contents of later shards, NaN even, are not read."""
  x = support.operands(dtype=jnp.float32)
  x["v"] = x["v"].at[:, 24:].set(jnp.nan)
  found = support.shared(Mask.causal(), x, support.ROWS, support.RING)
  assert jnp.isfinite(found["o"][:, :24]).all()
  assert jnp.isnan(found["o"][:, 24:]).all()
  assert jnp.isfinite(found["dq"][:, :24]).all()


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_zigzag_order_on_the_host_and_by_two_exchanges(n):
  x = jnp.arange(2 * 32).reshape(2, 32)
  at = zigzag.zigzag(32, n)
  shard = 32 // n
  for r in range(n):
    chunks = np.unique(at[r * shard : (r + 1) * shard] // (16 // n))
    assert chunks.tolist() == sorted({r, 2 * n - 1 - r})

  @jax.jit
  @jax.shard_map(in_specs=jax.P(None, "along"), out_specs=jax.P(None, "along"))
  def there_and_back(x):
    there = zigzag.to_zigzag(x, ("along",))
    return there, zigzag.from_zigzag(there, ("along",))

  with jax.set_mesh(support.mesh_of({"along": n})):
    there, back = there_and_back(x)
  chex.assert_trees_all_equal(there, x[:, at])
  chex.assert_trees_all_equal(back, x)


def test_calls_unsupported_by_a_ring_raise():
  x = support.operands()
  cut = jax.P(None, "along")

  def call(mask, **options):
    def local(q, k, v):
      return ring_attention(q, k, v, axis=("along",), mask=mask, **options)

    with jax.set_mesh(support.mesh_of({"along": 4})):
      return jax.eval_shape(
        jax.shard_map(local, in_specs=cut, out_specs=cut),
        x["q"],
        x["k"],
        x["v"],
      )

  with pytest.raises(ValueError, match="causal mask by index.*q_positions"):
    call(Mask.causal())
  with pytest.raises(ValueError, match="'reference', expected one"):
    call(Mask.full(), backend="reference")
  with pytest.raises(ValueError, match="softcap"):
    call(Mask.full(), softcap=-1.0)
  with pytest.raises(ValueError, match="gathered or go around"):
    AttentionSharding(length=("a",), ring=("b",))
  for option in ({"bias": x["q"]}, {"dropout_rate": 0.1, "dropout_seed": 1}):
    with pytest.raises(ValueError, match=f"found {min(option)}"):
      support.shared(Mask.full(), x, support.ROWS, support.ULYSSES, **option)
  with pytest.raises(ValueError, match="30 tokens over 4 shards.*of 8"):
    zigzag.zigzag(30, 4)


@pytest.mark.slow
def test_block_diffusion_and_decoding_do_not_shard_tokens():
  """If tokens cannot be sharded, all devices compute the same."""
  x = support.operands()
  del x["sinks"]
  mask = Mask.block_diffusion(T // 2, 4)
  expected = support.alone(mask, x)
  found = support.shared(mask, x, support.ROWS, support.RING)
  chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)
  q = x["q"][:, -8:]
  with jax.set_mesh(support.mesh_of(support.ROWS)):
    found = jax.jit(
      lambda q, k, v: sharded_attention(
        q, k, v, mask=Mask.causal(), sharding=support.RING
      )
    )(q, x["k"], x["v"])
  expected = flash_attention(q, x["k"], x["v"], mask=Mask.causal())
  chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)
