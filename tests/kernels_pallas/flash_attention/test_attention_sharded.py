"""Attention on a mesh of eight devices against the same on one."""

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
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.masks import Mask, intervals
from tests import support_hlo

B, T, N, K, H = 4, 16, 4, 2, 8
SIZES = {"rows": 2, "queries": 2, "heads": 2}

ALL = AttentionSharding(("rows",), ("queries",), ("heads",))
# Sums of 16 products of numbers near 1, the loss of 2048, in another order.
CLOSE = dict(rtol=1e-5, atol=5e-5)


def mesh_of(sizes):
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )


def arrays(keys=T, heads=(N, K)):
  rng = np.random.default_rng(0)
  shapes = ((T, heads[0]), (keys, heads[1]), (keys, heads[1]), (T, heads[0]))
  return [
    jnp.asarray(rng.standard_normal((B, t, n, H)), jnp.float32)
    for t, n in shapes
  ]


def documents():
  rng = np.random.default_rng(1)
  segments = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32)
  segments[:, -3:] = -1
  return jnp.asarray(segments)


def lengths():
  """Positions of right-padded rows."""
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
  for row, length in enumerate((16, 9, 5, 1)):
    positions[row, length:] = -1
  return jnp.asarray(positions)


def dilated(q, k):
  return (q >= k) & ((q - k) % 3 != 1)


def bounds():
  rng = np.random.default_rng(2)
  found = np.sort(rng.integers(0, T + 1, (B, 4, T)), axis=1)
  return jnp.asarray(found, jnp.int32)


MASKS = {
  "causal": lambda: Mask.causal(),
  "window": lambda: Mask.causal((4, None), segments=documents()),
  "padded": lambda: Mask.causal(q_positions=lengths(), kv_positions=lengths()),
  "prefix": lambda: Mask.prefix_lm(jnp.asarray([3, 7, 0, 16], jnp.int32)),
  "one prefix": lambda: Mask.prefix_lm(jnp.asarray([9], jnp.int32)),
  "blocks": lambda: Mask.block_causal(4),
  "diffusion": lambda: Mask.block_diffusion(8, 4, segments=documents()),
  "full": lambda: Mask.full(),
  "function": lambda: Mask.where(dilated, segments=documents()),
  "intervals": lambda: Mask.intervals(bounds(), (9, None), documents()),
}


def gradients(attend, mask, q, k, v, do):
  def loss(q, k, v):
    y = attend(q, k, v, mask=mask)
    return (y * do).sum(), y

  return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)


def both(mask, cut, operands, sizes=SIZES, **options):
  """Returns (output, gradients) of one device and of the mesh, and its HLO."""

  def alone(q, k, v, mask):
    return flash_attention(q, k, v, mask=mask, **options)

  def shared(q, k, v, mask):
    return sharded_attention(q, k, v, mask=mask, sharding=cut, **options)

  found = []
  for attend, mesh in ((alone, None), (shared, mesh_of(sizes))):

    def run(mask, *operands, attend=attend):
      return gradients(lambda *x, mask: attend(*x, mask), mask, *operands)

    if mesh is None:
      found.append(jax.jit(run)(mask, *operands))
      continue
    with jax.set_mesh(mesh):
      compiled = jax.jit(run, in_shardings=_whole(mesh))
      compiled = compiled.lower(mask, *operands).compile()
      found.append(compiled(*jax.device_put((mask, *operands), _whole(mesh))))
  return *found, support_hlo.collectives(compiled.as_text(), mesh)


def _whole(mesh):
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.sample(5)
def test_every_mask_over_rows_queries_and_heads(name):
  alone, shared, _ = both(MASKS[name](), ALL, arrays())
  chex.assert_trees_all_close(alone, shared, **CLOSE)


@pytest.mark.slow
def test_tiles_in_loops_over_rows_queries_and_heads():
  mask = Mask.causal(segments=documents())
  blocks = Blocks(q=4, k=4, unroll=1)
  alone, shared, _ = both(mask, ALL, arrays(), config=blocks)
  chex.assert_trees_all_close(alone, shared, **CLOSE)


@pytest.mark.parametrize("keys", [24, 12])
def test_more_or_fewer_keys_than_queries(keys):
  alone, shared, _ = both(Mask.causal(), ALL, arrays(keys))
  chex.assert_trees_all_close(alone, shared, **CLOSE)


@pytest.mark.parametrize(
  ("heads", "size"), [((4, 2), 4), ((6, 3), 2), ((8, 1), 8), ((2, 2), 4)]
)
@pytest.mark.sample(3)
def test_heads_that_the_axis_does_not_divide(heads, size):
  cut = AttentionSharding(heads=("heads",))
  if heads[0] % size:
    cut = AttentionSharding()
  alone, shared, _ = both(
    Mask.causal(), cut, arrays(heads=heads), {"heads": size}
  )
  chex.assert_trees_all_close(alone, shared, **CLOSE)


@pytest.mark.parametrize(
  ("heads", "size"), [((2, 2), 4), ((2, 1), 4), ((6, 2), 4), ((6, 6), 4)]
)
def test_devices_with_different_numbers_of_heads_raise(heads, size):
  cut = AttentionSharding(heads=("heads",))
  message = rf"found {heads[0]} query heads over {size} devices .*'heads'"
  with pytest.raises(ValueError, match=message):
    both(Mask.causal(), cut, arrays(heads=heads), {"heads": size})


def test_only_keys_and_values_are_communicated():
  """The kernel gathers nothing else; replicated inputs are sliced."""
  *_, found = both(Mask.causal(segments=documents()), ALL, arrays())
  inside = [c for c in found if "shard_map" in c.line]
  moved = {(c.kind, c.axes, c.shapes) for c in inside if c.kind != "all-reduce"}
  # Two of four rows, all keys, one of two heads; their gradients, scattered.
  assert moved == {
    ("all-gather", frozenset({"queries"}), ((2, 16, 1, H),)),
    ("reduce-scatter", frozenset({"queries"}), ((2, 8, 1, H),)),
  }


def test_rows_and_heads_need_no_communication():
  cut = dataclasses.replace(ALL, length=())
  *_, found = both(Mask.causal(segments=documents()), cut, arrays())
  kinds = {c.kind for c in found if "shard_map" in c.line}
  assert kinds <= {"all-reduce"}


GIVEN = {
  "queries": (jnp.arange(16)[None], None, 4),
  "keys": (None, jnp.arange(16)[None] % 8, 8),
  "both": (jnp.arange(16)[None] % 8, jnp.arange(16)[None] % 8, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GIVEN)
def test_a_function_mask_is_unchanged_by_sharding(name):
  """Given positions keep their extent; otherwise indices define it."""
  q, k, extent = GIVEN[name]
  mask = Mask.where(dilated, None, None, q, k, offset=0, extent=extent)
  made = with_positions(mask, 16, 16)
  made.check(1, 16, 16)
  seen = np.asarray(mask.visible(16, 16))
  np.testing.assert_array_equal(made.visible(16, 16), seen)
  bounds = np.asarray(intervals.mask_intervals(made, 16, 16).bounds)
  lo, hi = (bounds[:, n::2, :, None] for n in (0, 1))
  at = np.asarray(made.kv_positions)[:, None, None]
  listed = ((at >= lo) & (at < hi) & (at >= 0)).any(1)
  np.testing.assert_array_equal(listed, seen)
  assert (made.extent == extent) == (name == "both")
