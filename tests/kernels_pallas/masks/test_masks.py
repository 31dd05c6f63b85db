"""Masks against their definition, one (query, key) pair at a time."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask, intervals

T, S, B = 7, 10, 2


def ints(seed, *shape, low=-1, high=3):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(low, high, shape), jnp.int32)


def segments():
  return ints(0, B, T), ints(1, B, S)


def positions():
  return ints(2, B, T, high=9), ints(3, B, S, high=9)


def bounds(R, low=-1, high=13):
  """R intervals a query, of which some overlap and some are empty."""
  return ints(6, B, 2 * R, T, low=low, high=high)


def near_or_third(q, k):
  return (abs(q - k) < 3) | (k % 3 == 0)


MASKS = {
  "full": Mask.full(),
  "full_window": Mask.full((2, 1)),
  "causal": Mask.causal(),
  "causal_top_left": Mask.causal(offset=0),
  "causal_window": Mask.causal((3, None)),
  "causal_segments": Mask.causal((4, 0), segments()),
  "causal_positions": Mask.causal((3, None), segments(), *positions()),
  "one_row_of_positions": Mask.causal(q_positions=ints(4, 1, T, high=9)),
  "prefix": Mask.prefix_lm(jnp.array([0, 6])),
  "prefix_window": Mask.prefix_lm(jnp.array([4, 2]), (5, None)),
  "block_causal": Mask.block_causal(3),
  "block_causal_window": Mask.block_causal(3, (4, 1), segments()),
  "function": Mask.where(near_or_third),
  "function_window": Mask.where(near_or_third, (4, 1), segments(), offset=-2),
  "function_positions": Mask.where(
    near_or_third, None, None, *positions(), extent=7
  ),
  "intervals": Mask.intervals(bounds(2)),
  "intervals_window": Mask.intervals(bounds(3), (4, 1), segments(), offset=2),
  "intervals_positions": Mask.intervals(
    bounds(2)[:1], (5, None), None, *positions()
  ),
}
DIFFUSION = {
  "diffusion": Mask.block_diffusion(6, 2),
  "diffusion_ragged": Mask.block_diffusion(6, 4),
  "diffusion_packed": Mask.block_diffusion(
    6, 2, ints(5, B, 12), jnp.tile(jnp.arange(6), (B, 2))
  ),
}
ALL = [(name, mask, T, S) for name, mask in MASKS.items()]
ALL += [(name, mask, 12, 12) for name, mask in DIFFUSION.items()]
IDS = [name for name, *_ in ALL]


def at(leaf, b, i, default):
  return default if leaf is None else int(leaf[b % leaf.shape[0], i])


def definition(m, b, i, j, T, S):
  """Whether query i sees key j: the definition, in Python integers."""
  q = i + (S - T if m.offset is None else m.offset)
  k = j
  if m.kind == "block_diffusion":
    q, k = i % m.length, j % m.length
  q, k = at(m.q_positions, b, i, q), at(m.kv_positions, b, j, k)
  if (m.q_positions is not None and q < 0) or (
    m.kv_positions is not None and k < 0
  ):
    return False
  ours, theirs = at(m.q_segments, b, i, 0), at(m.kv_segments, b, j, 0)
  if ours != theirs or ours < 0:
    return False
  left, right = m.window
  if left is not None and k < q - left:
    return False
  if right is not None and k > q + right:
    return False
  if m.kind == "causal":
    return k <= q
  if m.kind == "prefix":
    return k <= q or k < int(m.prefix[b])
  if m.kind == "block_causal":
    return k // m.block <= q // m.block
  if m.kind == "function":
    known = m.q_positions is None or q < m.extent
    known &= m.kv_positions is None or k < m.extent
    return known and (abs(q - k) < 3 or k % 3 == 0)
  if m.kind == "intervals":
    edges = m.bounds[b % m.bounds.shape[0], :, i].tolist()
    pairs = zip(edges[0::2], edges[1::2], strict=True)
    return any(lo <= k < hi for lo, hi in pairs)
  if m.kind == "block_diffusion":
    ours, theirs = q // m.block, k // m.block
    if i < m.length:
      return ours == theirs if j < m.length else ours > theirs
    return j >= m.length and ours >= theirs
  return True


def table(mask, T, S):
  mask = jax.tree.map(np.asarray, mask)  # whose entries are read one by one
  index = itertools.product(range(B), range(T), range(S))
  flat = [definition(mask, *where, T, S) for where in index]
  return np.array(flat).reshape(B, T, S)


@pytest.mark.parametrize(("name", "mask", "T", "S"), ALL, ids=IDS)
@pytest.mark.sample(5)
def test_visible_is_the_definition_and_tiles_are_its_parts(name, mask, T, S):
  mask.check(B, T, S)
  expected = table(mask, T, S)
  assert expected.sum() > 0
  tile = jax.jit(
    lambda mask, i, j: (
      mask.visible(T, S),
      mask.visible(T, S, (i, 3), (j, 4)),
      mask.visible(T, S, (2, 3), (5, 4)),
    )
  )
  whole, traced, static = tile(mask, 2, 5)
  np.testing.assert_array_equal(np.broadcast_to(whole, (B, T, S)), expected)
  part = np.broadcast_to(expected[:, 2:5, 5:9], (B, 3, 4))
  np.testing.assert_array_equal(np.broadcast_to(traced, part.shape), part)
  np.testing.assert_array_equal(np.broadcast_to(static, part.shape), part)


@pytest.mark.parametrize(("name", "mask", "T", "S"), ALL, ids=IDS)
def test_static_bounds_enclose_the_visible_keys(name, mask, T, S):
  expected = table(mask, T, S)
  for start, stop in itertools.combinations(range(T + 1), 2):
    lo, hi = mask.key_range(start, stop, T, S)
    seen = expected[:, start:stop].any((0, 1)).nonzero()[0]
    assert 0 <= lo <= hi <= S
    assert not len(seen) or (lo <= seen[0] and seen[-1] < hi)
    for first, last in itertools.combinations(range(S + 1), 2):
      if mask.is_full_tile(start, stop, first, last, T, S):
        assert expected[:, start:stop, first:last].all()


@pytest.mark.parametrize(
  ("mask", "ranges"),
  [
    (Mask.causal(), [(0, 4), (0, 6), (0, 8), (0, 10)]),
    (Mask.causal((2, 0)), [(0, 4), (2, 6), (4, 8), (6, 10)]),
    (Mask.full((1, 1)), [(1, 5), (3, 7), (5, 9), (7, 10)]),
    (Mask.block_causal(3), [(0, 6), (0, 6), (0, 9), (0, 10)]),
    (Mask.causal(offset=0), [(0, 2), (0, 4), (0, 6), (0, 8)]),
  ],
)
def test_index_rules_bound_the_keys_tightly(mask, ranges):
  found = [mask.key_range(i, i + 2, 8, 10) for i in range(0, 8, 2)]
  assert found == ranges


def test_rows_before_the_first_key_have_an_empty_range():
  assert Mask.causal().key_range(0, 2, 6, 4) == (0, 0)
  assert Mask.causal().key_range(2, 3, 6, 4) == (0, 1)


def test_interior_tiles_are_full_and_diagonal_tiles_are_not():
  causal = Mask.causal()
  assert causal.is_full_tile(4, 8, 0, 4, 8, 8)
  assert not causal.is_full_tile(4, 8, 4, 8, 8, 8)
  assert not Mask.causal((2, None)).is_full_tile(4, 8, 0, 4, 8, 8)
  assert not Mask.full().is_full_tile(0, 8, 4, 9, 8, 8)


def test_block_diffusion_is_the_published_picture():
  picture = """
    11000000 11000000 00111100 00111100
    00001100 00001100 00001111 00001111"""
  expected = np.array([[c == "1" for c in row] for row in picture.split()])
  found = Mask.block_diffusion(4, 2).visible(8, 8)
  np.testing.assert_array_equal(found[0], expected)


def test_padding_is_hidden_and_nothing_else():
  mask = MASKS["causal_positions"]
  grown = mask.padded(1, 2).visible(T, S, (0, T + 1), (0, S + 2))
  expected = np.pad(table(mask, T, S), ((0, 0), (0, 1), (0, 2)))
  np.testing.assert_array_equal(grown, expected)
  keys = Mask.full().visible(3, 3, (0, 3), (0, 5))
  np.testing.assert_array_equal(keys[0].sum(1), [3, 3, 3])


def test_valid_keys_are_those_not_marked_as_padding():
  mask = Mask.full(
    segments=(jnp.array([[0, -1]]), jnp.array([[0, 0, -1]])),
    kv_positions=jnp.array([[-1, 4, 5]]),
  )
  np.testing.assert_array_equal(mask.valid_keys(), [[False, True, False]])
  np.testing.assert_array_equal(mask.valid_queries(), [[True, False]])
  assert Mask.causal().valid_keys() is None


def test_masks_are_pytrees_with_static_rules():
  mask = MASKS["causal_positions"]
  leaves, tree = jax.tree.flatten(mask)
  assert len(leaves) == 4
  assert jax.tree.unflatten(tree, leaves).window == (3, None)
  assert hash(tree) != hash(jax.tree.structure(MASKS["causal_segments"]))


def in_numpy(start):
  table = np.arange(8) // 3
  mask = Mask.where(lambda q, k: table[q] == table[k])
  return mask.visible(8, 8, (start, 4))


def closes_over(x):
  return Mask.where(lambda q, k: x[q] == x[k]).key_range(0, 2, 4, 4)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Mask.causal((-1, 0)), "no negative side"),
    (lambda: Mask.block_causal(0), "at least 1"),
    (lambda: Mask.block_diffusion(0, 2), "at least 1"),
    (lambda: Mask.block_diffusion(4, 2).check(1, 8, 4), "found 8 and 4"),
    (lambda: Mask.full(segments=ints(0, 3, 5)).check(2, 5, 5), "q_segments"),
    (lambda: Mask.full(q_positions=ints(0, 1, 5)).check(1, 4, 5), "(1, 4)"),
    (lambda: Mask(q_segments=ints(0, 1, 5)).check(1, 5, 5), "together"),
    (lambda: Mask(kind="diagonal").visible(2, 2), "diagonal"),
    (lambda: Mask.where(lambda q, k: q - k).visible(2, 2), "found int32"),
    (lambda: Mask.where(lambda q, k: 1).visible(2, 2), "found int of shape"),
    (lambda: jax.jit(in_numpy)(jnp.int32(0)), "indexes a NumPy array"),
    (
      lambda: Mask.where(lambda q, k: q.ravel() > 0).visible(2, 3),
      "expected bool that broadcasts to (1, 2, 3)",
    ),
    (
      lambda: Mask.where(max, q_positions=ints(0, 1, 5)).check(1, 5, 5),
      "an extent with them",
    ),
    (lambda: jax.jit(closes_over)(jnp.arange(4)), "it closes over an array"),
    (lambda: Mask.intervals(bounds(2)).check(B, 5, 5), "expected [2, 2 R, 5]"),
    (lambda: Mask.intervals(bounds(9)).check(B, T, S), "from 1 to 8"),
    (
      lambda: Mask.intervals(bounds(1)[:, :1]).check(B, T, S),
      "found shape (2, 1, 7)",
    ),
    (
      lambda: Mask(kind="intervals", bounds=jnp.zeros((1, 2, T))).check(
        B, T, S
      ),
      "found float32, expected integers",
    ),
    (lambda: Mask(kind="intervals").check(B, T, S), "found none with kind"),
    (lambda: Mask(bounds=bounds(1)).check(B, T, S), "found some with kind"),
    (
      lambda: Mask.intervals(
        bounds(1), (3, 0), kv_positions=positions()[1]
      ).check(B, T, S),
      "with kv_positions alone",
    ),
  ],
)
def test_invalid_masks_raise(make, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make()


def test_an_unknown_rule_hides_nothing_silently():
  """A rule that one of the cases forgets raises, or is evaluated."""
  mask = dataclasses.replace(Mask.full(), kind="new")
  assert not mask.is_full_tile(0, 4, 0, 4, 8, 8)
  with pytest.raises(ValueError, match="'new'"):
    mask.visible(8, 8)
  with pytest.raises(ValueError, match="'new'"):
    intervals.mask_intervals(mask, 8, 8)
