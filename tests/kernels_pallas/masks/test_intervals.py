"""Intervals and tile classes against `Mask.visible` of every pair."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask, function_masks, intervals

B, T, S = 2, 24, 40
EMPTY, PARTIAL, FULL = 0, 1, 2


def ids(n, high, rows=B, seed=0):
  rng = np.random.default_rng([seed, n, high])
  return jnp.asarray(rng.integers(-1, high, (rows, n)), jnp.int32)


def segments():
  return tuple(jnp.asarray(np.sort(ids(n, 4), axis=1)) for n in (T, S))


def bounds(R):
  """R intervals a query, of which some overlap and some are empty."""
  rng = np.random.default_rng(R)
  return jnp.asarray(rng.integers(-2, S + 3, (B, 2 * R, T)), jnp.int32)


def rising():
  """A block of 4 queries sees 8 keys, a tile, and one key more."""
  first = 8 * (jnp.arange(T) // 4 % 5)
  more = jnp.arange(T) % S
  return jnp.stack([first, first + 8, more, more + 1])[None]


def picture(q, k):
  """A patch of 8 x 5 sees its neighbours two rows and one column away."""
  return (abs(q // 5 - k // 5) < 3) & (abs(q % 5 - k % 5) < 2)


def documents_of_7(q, k):
  ids = jnp.asarray(np.arange(64) // 7)
  return ids[q] == ids[k]


BY_INDEX = {
  "full": lambda: Mask.full(),
  "causal": lambda: Mask.causal(),
  "top_left": lambda: Mask.causal(offset=0),
  "empty_rows": lambda: Mask.causal(offset=-4),
  "sliding": lambda: Mask.causal((5, None)),
  "band": lambda: Mask.full((3, 4)),
  "block_causal": lambda: Mask.block_causal(4),
  "block_causal_window": lambda: Mask.block_causal(5, (6, 2)),
  "picture": lambda: Mask.where(picture, (8, None)),
  "closure": lambda: Mask.where(documents_of_7),
  "never": lambda: Mask.where(lambda q, k: k < 0 * q),
}
BY_DATA = {
  "prefix": lambda: Mask.prefix_lm(jnp.array([7, 0])),
  "prefix_window": lambda: Mask.prefix_lm(jnp.array([7, 0]), (9, None)),
  "segments": lambda: Mask.causal(segments=segments()),
  "positions": lambda: Mask.full((4, 3), None, ids(T, 30), ids(S, 30, 1)),
  "q_positions": lambda: Mask.block_causal(3, q_positions=ids(T, 50)),
  "kv_positions": lambda: Mask.causal(kv_positions=ids(S, 30)),
  "picture_positions": lambda: Mask.where(
    picture, (8, 9), segments(), ids(T, 44), ids(S, 44, 1), extent=40
  ),
  "picture_kv_positions": lambda: Mask.where(
    picture, kv_positions=ids(S, 30), extent=30
  ),
  "picture_q_positions": lambda: Mask.where(
    picture, q_positions=ids(T, 30, 1), extent=30
  ),
  "intervals": lambda: Mask.intervals(bounds(3), (9, None)),
  "intervals_rising": lambda: Mask.intervals(rising()),
  "intervals_positions": lambda: Mask.intervals(
    bounds(2), (9, 3), segments(), ids(T, 30), ids(S, 30, 1)
  ),
}
DIFFUSION = {
  "diffusion": (lambda: Mask.block_diffusion(12, 3), True),
  "diffusion_ragged": (lambda: Mask.block_diffusion(12, 5), True),
  "diffusion_data": (
    lambda: Mask.block_diffusion(
      12, 3, ids(24, 2), jnp.tile(ids(12, 12), (1, 2))
    ),
    False,
  ),
}
PACKED = {
  "packed": (
    lambda: Mask.causal(segments=jnp.repeat(jnp.array([[2, 1, 0]]), 8, 1)),
    False,
  )
}
# Masks by data for which no empty tile is visited: with one bound, the greatest
# query and the least key are a pair; with documents numbered in rising or
# falling order, the least and the greatest enclose no other document.
NONE_IN_VAIN = ("prefix", "q_positions", "kv_positions", "packed")
CASES = {
  **{k: (v, True, T, S) for k, v in BY_INDEX.items()},
  **{k: (v, False, T, S) for k, v in BY_DATA.items()},
  **{k: (*v, 24, 24) for k, v in (DIFFUSION | PACKED).items()},
}


def at_once(f):
  """`f` as one program for masks by data; else NumPy computes it."""
  program = jax.jit(f, static_argnums=range(1, f.__code__.co_argcount))
  return lambda mask, *sizes: (
    program(mask, *sizes) if jax.tree.leaves(mask) else f(mask, *sizes)
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def visible(mask, queries, keys):
  return mask.visible(queries, keys)


@at_once
def rows_of(mask, queries, keys):
  found = intervals.mask_intervals(mask, queries, keys)
  return found.bounds, found.keys, found.segments


@at_once
def classes(mask, queries, keys, block):
  rows = intervals.mask_intervals(mask, queries, keys)
  return intervals.tile_classes(rows, queries, keys, *block)


@at_once
def lines_of(mask, queries, keys, axis):
  """Returns classes by line, their tables, and the tables' width."""
  rows = intervals.mask_intervals(mask, queries, keys)
  wide = intervals.max_visited(rows, queries, keys, 4, 4, axis)
  found = intervals.tile_classes(rows, queries, keys, 4, 4)
  lines = found if axis == 2 else found.swapaxes(1, 2)
  return lines, intervals.visit_table(lines, wide), wide


@pytest.fixture(name="case", params=CASES)
def _case(request):
  build, exact, queries, keys = CASES[request.param]
  exact = "empty" if request.param in NONE_IN_VAIN else exact
  return build(), exact, queries, keys


def test_intervals_and_segments_equal_the_mask(case):
  mask, _, queries, keys = case
  bounds, places, both = jax.device_get(rows_of(mask, queries, keys))
  k = np.arange(keys)[None] if places is None else places
  k = k[:, None, None]
  lo, hi = bounds[:, 0::2, :, None], bounds[:, 1::2, :, None]
  seen = ((k >= lo) & (k < hi)).any(1)
  if both is not None:
    ours, theirs = both
    seen = seen & (ours[:, :, None] == theirs[:, None])
  expected = np.asarray(visible(mask, queries, keys))
  np.testing.assert_array_equal(*np.broadcast_arrays(seen, expected))


@pytest.mark.parametrize("block", [(4, 4), (5, 7), (8, 16), (100, 100)])
@pytest.mark.sample(2)
def test_tiles_are_classified_by_their_pairs(case, block):
  """Exact for masks by index, else an upper bound, sometimes exact."""
  mask, exact, queries, keys = case
  found = np.asarray(classes(mask, queries, keys, block))
  seen = np.asarray(visible(mask, queries, keys))
  seen = np.broadcast_to(seen, (max(len(found), len(seen)), queries, keys))
  count = np.zeros((len(seen), *found.shape[1:]), int)
  size = np.zeros(found.shape[1:], int)
  for i, j in np.ndindex(*size.shape):
    tile = seen[:, i * block[0] : (i + 1) * block[0]]
    tile = tile[:, :, j * block[1] : (j + 1) * block[1]]
    count[:, i, j] = tile.sum((1, 2))
    # A tile that reaches past the last key hides keys.
    size[i, j] = tile.shape[1] * block[1]
  best = np.where(count == 0, EMPTY, np.where(count == size, FULL, PARTIAL))
  found = np.broadcast_to(found, best.shape)
  if exact is True:
    np.testing.assert_array_equal(found, best)
    return
  assert np.all((found == best) | (found == PARTIAL))
  if exact == "empty":
    np.testing.assert_array_equal(found == EMPTY, best == EMPTY)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.sample(2, 1)
def test_tables_list_the_non_empty_tiles(case, axis):
  mask, _, queries, keys = case
  found = lines_of(mask, queries, keys, axis)
  lines, table, wide = jax.device_get(found)
  wide = int(wide)
  assert table.shape[-1] == wide
  assert wide >= (lines != EMPTY).sum(-1).max()
  for line, entries in zip(
    lines.reshape(-1, lines.shape[-1]), table.reshape(-1, wide), strict=True
  ):
    live = entries[entries & 3 != EMPTY]
    np.testing.assert_array_equal(live >> 2, np.flatnonzero(line))
    np.testing.assert_array_equal(live & 3, line[line != EMPTY])
    # Unused entries repeat the last tile, so nothing is fetched for them.
    rest = entries[len(live) :] >> 2
    assert np.all(rest == (live[-1] >> 2 if len(live) else 0))


def test_the_block_diffusion_mask_skips_three_quarters():
  n = 2 * 4096
  rows = intervals.mask_intervals(Mask.block_diffusion(4096, 32), n, n)
  found = intervals.tile_classes(rows, n, n, 256, 256)
  # Of 32 x 32 tiles: 16 of own blocks, 2 x 16 x 17 / 2 of clean ones.
  assert (found != EMPTY).sum() == 16 + 2 * 136
  assert 0.71 < (found == EMPTY).mean() < 0.73


def test_packed_documents_remove_tiles():
  segment = jnp.repeat(jnp.arange(4), 8)[None]
  rows = intervals.mask_intervals(Mask.causal(segments=segment), 32, 32)
  found = np.asarray(intervals.tile_classes(rows, 32, 32, 8, 8))
  np.testing.assert_array_equal(found[0], np.eye(4))


def test_a_window_with_block_diffusion_raises():
  mask = dataclasses.replace(Mask.block_diffusion(4, 2), window=(1, None))
  with pytest.raises(ValueError, match="expected none"):
    intervals.mask_intervals(mask, 8, 8)


@pytest.mark.parametrize("window", [(None, None), (30, 9)])
@pytest.mark.parametrize("given", [False, True])
def test_a_function_with_many_intervals_is_bounded_inexactly(window, given):
  """Every other key: 20 intervals. By index its tiles are still exact."""
  at = (jnp.arange(T)[None], jnp.arange(S)[None]) if given else (None, None)
  mask = Mask.where(
    lambda q, k: (q - k) % 2 == 0, window, None, *at, offset=0, extent=S
  )
  seen = np.asarray(mask.visible(T, S))[0]
  found = intervals.mask_intervals(mask, T, S)
  lo, hi = np.asarray(found.bounds)[0]
  k = np.arange(S)
  assert not (seen & ~((k >= lo[:, None]) & (k < hi[:, None]))).any()
  pairs = seen.reshape(T // 4, 4, S // 4, 4).sum((1, 3))
  kinds = np.asarray(intervals.tile_classes(found, T, S, 4, 4))[0]
  assert (kinds[pairs > 0] == PARTIAL).all()
  if not given:
    assert (kinds[pairs == 0] == EMPTY).all()
  with pytest.raises(ValueError, match="more than 8 intervals"):
    intervals.tile_arrays(found)


def test_a_function_is_evaluated_in_chunks(monkeypatch):
  """In chunks of 3 queries, the last of 2, the same intervals and counts."""

  def own(q, k):  # asked anew, since runs are kept by function
    return picture(q, k)

  window = (9, 3)
  whole = function_masks.key_intervals(picture, window, 3, 23, S)
  pairs = function_masks.count_visible_pairs(
    picture, window, 3, (23, S), (5, 7)
  )
  monkeypatch.setattr(function_masks, "_PAIRS", 3 * S)
  parts = function_masks.key_intervals(own, window, 3, 23, S)
  np.testing.assert_array_equal(whole.lo, parts.lo)
  np.testing.assert_array_equal(whole.hi, parts.hi)
  q, k = 3 + np.arange(23)[:, None], np.arange(S)[None]
  seen = picture(q, k) & (k >= q - 9) & (k <= q + 3)
  seen = np.pad(seen, ((0, 2), (0, 2))).reshape(5, 5, 6, 7)
  again = function_masks.count_visible_pairs(own, window, 3, (23, S), (5, 7))
  np.testing.assert_array_equal(pairs, seen.sum((1, 3)))
  np.testing.assert_array_equal(again, pairs)


@pytest.mark.parametrize("given", [False, True])
def test_intervals_are_counted_inside_the_window(given):
  """Dilation over a row of any length: 3 intervals in a window of 15."""
  n = 256
  at = (jnp.arange(n)[None],) * 2 if given else (None, None)
  mask = Mask.where(lambda q, k: (q - k) % 5 < 2, (14, 0), None, *at, extent=n)
  found = intervals.mask_intervals(mask, n, n)
  assert found.inexact_mask is None and found.bounds.shape[1] == 2 * 3


def test_a_function_is_evaluated_once():
  calls = []

  def counted(q, k):
    calls.append(q.shape)
    return (q - k) % 2 == 0

  mask = Mask.where(counted)
  for _ in range(3):
    found = intervals.mask_intervals(mask, 32, 32)
    intervals.tile_classes(found, 32, 32, 8, 8)
  assert len(calls) == 2  # for intervals, which are too many, and for tiles


@pytest.mark.parametrize("value", [True, False])
def test_a_function_may_be_constant(value):
  mask = Mask.where(lambda q, k: value)
  kind = FULL if value else EMPTY
  found = intervals.tile_classes(
    intervals.mask_intervals(mask, 8, 8), 8, 8, 4, 4
  )
  np.testing.assert_array_equal(found[0], np.full((2, 2), kind))
