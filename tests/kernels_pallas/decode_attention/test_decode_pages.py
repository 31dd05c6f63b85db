"""Appending writes the right slots; invalid calls raise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention.api import (
  choose,
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.pages import (
  Pages,
  append_to_pages,
  empty_pages,
  quantize,
)
from kernels_pallas.decode_attention.spec import Blocks
from tests.support_decode import (
  BACKENDS,
  CLOSE,
  COUNT,
  LENS,
  SIZE,
  STARTS,
  TOKENS,
  S,
  draw,
  every_backend,
  plain,
  pool,
  quick,
  tables,
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8,
                                   jnp.float8_e4m3fn])  # fmt: skip
def test_tokens_are_appended_to_the_slots_that_are_read(dtype):
  """Token by token and all at once give the same, correct pages."""
  k, v = draw(TOKENS, 2, 8, seed=5), draw(TOKENS, 2, 8, seed=6)
  lens, starts = (
    np.array([6, 0, 9], np.int32),
    np.array([0, 6, 6, 15], np.int32),
  )
  table = jnp.asarray(tables(lens))
  start = empty_pages(COUNT, 2, SIZE, 8, dtype)
  append = jax.jit(append_to_pages)
  once = append(start, k, v, table, jnp.asarray(lens), jnp.asarray(starts))
  step = start
  for t in range(9):
    at = np.minimum(starts[:-1] + t, TOKENS - 1)
    now = np.where(t < lens, t + 1, 0).astype(np.int32)
    step = append(step, k[at], v[at], table, jnp.asarray(now))
  chex.assert_trees_all_equal(step, once)
  held_k, held_v = plain(once)
  worst = {jnp.float32: 0, jnp.bfloat16: 2**-8, jnp.int8: 0.5 / 127,
           jnp.float8_e4m3fn: 2**-4}[dtype]  # fmt: skip
  written = np.zeros((COUNT, SIZE), bool)
  for row, first in ((0, 0), (2, 6)):
    for t in range(lens[row]):
      at = int(table[row, t // SIZE]), t % SIZE
      written[at] = True
      for x, held in ((k, held_k), (v, held_v)):
        x = np.asarray(x[first + t], np.float64)
        most = np.abs(x).max(-1, keepdims=True) * worst * (1 + 1e-6)
        assert np.all(np.abs(held[at[0], :, at[1]] - x) <= most)
  assert not np.any(
    np.asarray(once.kv).astype(np.float32).swapaxes(1, 2)[~written]
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8,
                                   jnp.float8_e4m3fn])  # fmt: skip
def test_the_append_kernel_equals_a_scatter(dtype):
  """Rows that begin and end anywhere in a group, stray tokens, empty rows, and
  (invalid, but unknown while traced) more new tokens than the row has."""
  count, size, K, H = 5, 32, 2, 8
  table = jnp.array([[3, 0], [1, -1], [4, -1], [2, -1]], jnp.int32)
  lens = jnp.array([41, 3, 0, 32], jnp.int32)
  starts = jnp.array([0, 22, 25, 25, 26], jnp.int32)
  k, v = draw(28, K, H), draw(28, K, H, seed=1)
  held = empty_pages(count, K, size, H, dtype)
  kv = draw(count, K, size, 2 * H, seed=2)
  held = Pages(kv.astype(dtype), held.scale, H)

  @quick
  def both(held, k, v, table, lens, starts):
    return [
      append_to_pages(held, k, v, table, lens, starts, **options)
      for options in (BACKENDS["xla"], BACKENDS["mosaic_tpu"])
    ]

  for where, slots in (
    ((lens, starts), 26),
    ((lens.at[0].set(9), starts), 13),
    ((0 * lens, starts), 0),
    ((lens, 0 * starts), 0),
  ):
    expected, found = both(held, k, v, table, *where)
    chex.assert_trees_all_equal(found, expected)
    changed = np.asarray(found.kv != held.kv).any((1, 3)).sum()
    assert changed == slots


def test_the_kernel_that_appends_does_not_race(tpu_interpreter):
  """With groups that rows share, rows without tokens, unused items."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  held = Pages(draw(3, 1, 16, 16, seed=2), None, 8)
  k, v = draw(12, 1, 8), draw(12, 1, 8, seed=1)
  # 7 tokens in two groups and pages, none, 4 in one group; 1 has no row.
  table = jnp.array([[2, 0], [-1, -1], [1, -1]], jnp.int32)
  where = table, jnp.array([20, 0, 6], jnp.int32), jnp.array([0, 7, 7, 11])
  append = jax.jit(
    lambda *where: append_to_pages(
      held, k, v, *where, backend="mosaic_tpu", interpret=tpu_interpreter
    )
  )
  found = append(*where)
  expected = append_to_pages(held, k, v, *where, backend="xla")
  chex.assert_trees_all_equal(found, expected)
  assert np.asarray(found.kv != held.kv).any((1, 3)).sum() == 11
  # With more new tokens than a row has, no other slot is written.
  table, lens, starts = where
  short = table, lens.at[2].set(3), starts
  found = append(*short)
  chex.assert_trees_all_equal(
    found,
    quick(lambda *x: append_to_pages(held, k, v, *x, backend="xla"))(*short),
  )
  # With no token at all, a group is written all the same.
  chex.assert_trees_all_equal(append(table, 0 * lens, 0 * starts), held)
  assert not interpret_pallas_call.races.races_found


def fails(message, *, q=None, pages=None, table=None, lens=None, starts=None,
          **options):  # fmt: skip
  q = draw(TOKENS, 4, 8) if q is None else q
  pages = pool(2, 8, 8) if pages is None else pages
  table = tables() if table is None else table
  lens = LENS if lens is None else np.array(lens, np.int32)
  starts = STARTS if starts is None else np.array(starts, np.int32)
  # Where annotations are checked, they may fail first.
  with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check"):
    paged_attention(
      q, pages, *map(jnp.asarray, (table, lens, starts)), **options
    )


def test_invalid_input_raises():
  fails("N % K = 0", q=draw(TOKENS, 3, 8))
  fails("equal head dims", q=draw(TOKENS, 4, 6))
  fails(r"expected \[6, W\]", table=tables()[:4])
  fails("expected \\(7,\\)", starts=STARTS[:-1])
  fails("row 2 has 21 tokens, expected 0 to 20", lens=[7, 6, 21, 0, 13, 1])
  fails("row 4 has -1", lens=[7, 6, 20, 0, -1, 1])
  fails("row 1 has 5 tokens, 6 of them new", lens=[7, 5, 20, 0, 13, 1])
  fails("row 0 starts at 3", starts=[3, 1, 7, 10, 11, 12, 13])
  fails("within the 15 tokens", starts=[0, 1, 7, 10, 11, 12, 16])
  for bad in (-1, COUNT):
    table = tables()
    table[2, 3] = bad
    fails(f"row 2 has page {bad} for its tokens from 12 on", table=table)
  fails("window: found 0", window=0)
  fails("softcap: found -1", softcap=-1.0)
  fails("softcap: found inf", softcap=float("inf"))
  fails("scale", scale=float("nan"))
  fails("sinks", sinks=draw(3))
  fails("backend: found 'cuda'", backend="cuda")
  fails("has no use for it", backend="xla", interpret=True)
  fails("no 0", pages=Pages(pool(2, 8, 8).kv, None, 16))
  fails("scale: found None with int8", pages=Pages(
    pool(2, 8, 8).kv.astype(jnp.int8), None, 8))  # fmt: skip
  fails("float16, expected bfloat16", q=draw(TOKENS, 4, 8).astype(jnp.float16),
        backend="mosaic_tpu")  # fmt: skip
  fails("multiples of 8 in float32", backend="mosaic_tpu")
  for name in ("queries", "keys", "splits"):
    with pytest.raises(ValueError, match="at least 1 of each"):
      Blocks(**{name: 0})
  with pytest.raises(ValueError, match="token for each of 6 rows"):
    paged_attention(draw(TOKENS, 4, 8), pool(2, 8, 8), *map(
      jnp.asarray, (tables(), LENS)))  # fmt: skip
  with pytest.raises(ValueError, match="row 1 has 25"):
    decode_attention(draw(2, 2, 8), draw(2, S, 1, 8), draw(2, S, 1, 8),
                     jnp.array([24, 25]))  # fmt: skip
  with pytest.raises((ValueError, TypeError), match="one B|Type"):
    decode_attention(draw(2, 2, 8), draw(3, S, 1, 8), draw(3, S, 1, 8),
                     jnp.array([24, 2, 2]))  # fmt: skip
  with pytest.raises(ValueError, match="append_to_pages: found"):
    append_to_pages(pool(2, 8, 8), draw(1, 2, 8), draw(1, 2, 4),
                    jnp.asarray(tables()[:1]), jnp.array([3]))  # fmt: skip
  for backend in ("auto", "xla"):
    with pytest.raises(ValueError, match=f"{backend} has no use for it"):
      append_to_pages(pool(2, 8, 8), draw(1, 2, 8), draw(1, 2, 8),
                      jnp.asarray(tables()[:1]), jnp.array([3]),
                      backend=backend, interpret=True)  # fmt: skip
  with pytest.raises(ValueError, match="at least 1"):
    empty_pages(0, 2, 4, 8)


@pytest.mark.slow
def test_lengths_may_be_static_while_the_table_is_traced():
  """Then rows have room for as many pages as the table lists."""
  q, pages = draw(TOKENS, 4, 8), pool(2, 8, 8)
  lens, starts = jnp.asarray(LENS), jnp.asarray(STARTS)

  def run(table):
    return paged_attention(q, pages, table, lens, starts, backend="reference")

  table = jnp.asarray(tables())
  chex.assert_trees_all_close(quick(run)(table), run(table), rtol=1e-6)
  with pytest.raises(ValueError, match="row 2 has 20 tokens, expected 0 to 16"):
    quick(run)(table[:, :4])


def test_pages_beyond_the_table_are_not_read_when_traced():
  """Traced lengths and tables: clipped, finite, and other rows unharmed."""
  q, pages, table = draw(TOKENS, 4, 8), pool(2, 8, 8), tables()
  clean = every_backend(q, pages, *map(jnp.asarray, (table, LENS, STARTS)))
  lens, wrong = LENS.copy(), table.copy()
  lens[2], wrong[0, 0] = 10**6, 10**9
  found = every_backend(q, pages, *map(jnp.asarray, (wrong, lens, STARTS)))
  for (o, _), (expected, _) in zip(found, clean, strict=True):
    chex.assert_tree_all_finite(o)
    others = np.r_[1:7, 10:13]
    chex.assert_trees_all_equal(o[others], expected[others])
  # The row that is too long sees every key that it has, once.
  long = [jax.tree.map(lambda x: x[7:10], y) for y in found]
  for y in long[1:]:
    chex.assert_trees_all_close(y, long[0], **CLOSE)


def test_tokens_without_a_page_are_not_written_when_traced():
  """Neither to the last page, which -1 would be, nor to any other."""
  held, k, v = pool(2, 8, 8), draw(2, 2, 8), draw(2, 2, 8, seed=1)
  lens, starts = jnp.array([2], jnp.int32), jnp.array([0, 2], jnp.int32)

  @quick
  def append(table):
    return append_to_pages(held, k, v, table, lens, starts, backend="xla")

  for bad in (-1, COUNT, 10**9):
    chex.assert_trees_all_equal(append(jnp.array([[bad]], jnp.int32)), held)
  assert np.any(append(jnp.array([[COUNT - 1]], jnp.int32)).kv != held.kv)


def test_the_backend_is_that_of_the_platform_compiled_for():
  device = jax.sharding.AbstractDevice("TPU v5", None, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  assert choose(jnp.bfloat16)[0] == "xla"
  with jax.sharding.use_abstract_mesh(mesh):
    assert choose(jnp.bfloat16)[0] == "mosaic_tpu"
    assert choose(jnp.float16)[0] == "xla"
    assert choose(jnp.bfloat16, 48)[0] == "mosaic_tpu"
    assert "multiples of 16" in choose(jnp.bfloat16, 40)[1]


@pytest.mark.parametrize("code", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.sample(2)
def test_nan_makes_its_own_scale_nan(code):
  """NaN propagates through it where codes cannot hold NaN."""
  x = jnp.ones((3, 8)).at[1, 2].set(jnp.nan)
  assert np.isnan(quantize(x, code)[1]).tolist() == [False, True, False]
