"""Decoding on a mesh of eight devices against the same on one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import cpu, sharded
from kernels_pallas.decode_attention.api import (
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.pages import append_to_pages, empty_pages
from kernels_pallas.decode_attention.sharded import DecodeSharding
from kernels_pallas.decode_attention.spec import Blocks
from tests import support_hlo

R, K, N, H, SIZE, WIDTH = 4, 4, 8, 16, 4, 3
POOL = 6  # pages of each half of the rows
CUT = DecodeSharding(("rows",), ("heads",))
BACKENDS = {
  "xla": {"backend": "xla"},
  "mosaic_tpu": {"backend": "mosaic_tpu", "interpret": True},
}
LENS = jnp.asarray([9, 3, 12, 0], jnp.int32)
# Each pair of rows has its own pool, with its own page numbers.
TABLE = np.array([[3, 0, 5], [1, 0, 0], [2, 4, 1], [0, 0, 0]], np.int32)


@pytest.fixture(name="mesh", scope="module")
def _mesh():
  kind = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((2, 4), ("rows", "heads"), axis_types=kind)


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def on(mesh, function, *args):
  """The result under the mesh, and the collectives of its program."""
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.set_mesh(mesh):
    compiled = jax.jit(function, in_shardings=whole).lower(*args).compile()
    found = compiled(*jax.device_put(args, whole))
  return found, support_hlo.collectives(compiled.as_text(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
@pytest.mark.sample(2)
def test_a_cache_by_rows_and_heads(mesh, backend):
  x = draw(R, N, H), draw(R, 12, K, H), draw(R, 12, K, H, seed=1), LENS
  options = {"sinks": draw(N), "window": 7, "return_lse": True}
  ours = BACKENDS.get(backend, {"backend": backend})
  if backend == "cpu" and not cpu.available():
    pytest.skip("no C++ kernel can be compiled here")
  found, moved = on(mesh, lambda *x: sharded.sharded_decode_attention(
    *x, sharding=CUT, blocks=Blocks(1, 4, 2), **options, **ours
  ), *x)  # fmt: skip
  alone = decode_attention(*x, backend="reference", **options)
  chex.assert_trees_all_close(found, alone, rtol=1e-5, atol=1e-5)
  assert not [c for c in moved if "shard_map" in c.line]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.sample(3)
def test_pages_in_pools_by_rows_and_heads(mesh, backend, dtype):
  pages = empty_pages(2 * POOL, K, SIZE, H, dtype)
  q, k, v = draw(R, N, H), draw(R, K, H), draw(R, K, H, seed=1)
  far = jnp.asarray(TABLE + POOL * (np.arange(R)[:, None] >= R // 2))

  def steps(append, attend, table):
    def run(q, k, v, pages, table):
      for n in range(4):
        lens = jnp.where(n < LENS, n + 1, 0)
        pages = append(pages, k + n, v - n, table, lens)
      return attend(q, pages, table, lens), pages

    return run, (q, k, v, pages, table)

  function, args = steps(
    lambda *x: sharded.sharded_append_to_pages(*x, sharding=CUT),
    lambda *x: sharded.sharded_paged_attention(
      *x, sharding=CUT, **BACKENDS[backend]
    ),
    jnp.asarray(TABLE),
  )
  found, moved = on(mesh, function, *args)
  alone, args = steps(
    append_to_pages,
    lambda *x: paged_attention(*x, backend="reference"),
    far,
  )
  chex.assert_trees_all_close(
    found, jax.jit(alone)(*args), rtol=1e-5, atol=1e-5
  )
  assert not [c for c in moved if "shard_map" in c.line]


@pytest.mark.slow
def test_mixed_rows_by_heads(mesh):
  cut = DecodeSharding(heads=("heads",))
  kv = draw(POOL * 2, K, SIZE, 2 * H)
  pages = empty_pages(POOL * 2, K, SIZE, H, jnp.float32)
  pages = type(pages)(kv, None, H)
  starts = jnp.asarray([0, 5, 6, 12, 12], jnp.int32)
  table = jnp.asarray(TABLE)
  x = draw(13, N, H), pages, table, LENS, starts
  found, moved = on(mesh, lambda *x: sharded.sharded_paged_attention(
    *x, sharding=cut, backend="xla", return_lse=True), *x)  # fmt: skip
  alone = paged_attention(*x, backend="reference", return_lse=True)
  chex.assert_trees_all_close(found, alone, rtol=1e-5, atol=1e-5)
  assert not [c for c in moved if "shard_map" in c.line]
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="depend on data"):
    sharded.sharded_paged_attention(*x, sharding=CUT)


def test_axes_that_do_not_divide_are_named(mesh):
  x = draw(3, N, H), draw(3, 12, K, H), draw(3, 12, K, H), LENS[:3]
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="3 rows in 2 parts"):
    sharded.sharded_decode_attention(*x, sharding=CUT)
