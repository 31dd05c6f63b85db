"""Masks of intervals against the rules of their papers, pair by pair.

Those of Gemma 3, Gemma 4, Molmo 2 and PaliGemma also against transformers'.
"""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import (
  Mask,
  autoregressive_blocks,
  bidirectional_tokens,
  image_blocks,
  latest_image,
  message_tree,
  prefix_blocks,
  tree_positions,
)

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "vision_masks.json"
B, T = 3, 14
LAST = np.arange(T)[:, None] >= np.arange(T)  # causal


def draw(seed, low, high, *shape):
  rng = np.random.default_rng(seed)
  return rng.integers(low, high, shape).astype(np.int32)


def seen(mask, keys=T):
  """All pairs of a mask that was built, and is evaluated, by one program."""
  mask.check(B, T, keys)
  found = jax.jit(lambda mask: mask.visible(T, keys))(mask)
  return np.broadcast_to(found, (B, T, keys))


def big_vision(mask_ar):
  """PaliGemma's rule: key k is visible to query q iff c_k <= c_q."""
  c = np.cumsum(mask_ar, axis=1)
  return c[:, None] <= c[:, :, None]


def documents(seed):
  ids = np.sort(draw(seed, 0, 3, B, T), axis=1)
  ids[0, -3:] = -1
  return ids, (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_follow_big_visions_rule(seed):
  mask_ar = draw(seed, 0, 2, B, T)
  ids, same = documents(seed)
  found = seen(autoregressive_blocks(jnp.asarray(mask_ar)))
  np.testing.assert_array_equal(found, big_vision(mask_ar))
  packed = autoregressive_blocks(
    jnp.asarray(mask_ar), (4, 2), segments=jnp.asarray(ids)
  )
  apart = np.arange(T) - np.arange(T)[:, None]
  near = (apart >= -4) & (apart <= 2)
  np.testing.assert_array_equal(seen(packed), big_vision(mask_ar) & same & near)


# Images that touch, that begin and end the row, of one token, and none.
IMAGES = np.array(
  [
    [0, 0, 0, 1, 1, -1, -1, 2, -1, 3, 3, 3, -1, -1],
    [-1, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5],
    [-1] * T,
  ],
  np.int32,
)


@pytest.mark.parametrize("window", [None, 3])
def test_tokens_of_an_image_see_each_other(window):
  """Gemma 3: causal, or of the same image; a window bounds both."""
  own = (IMAGES[:, :, None] == IMAGES[:, None]) & (IMAGES >= 0)[:, :, None]
  expected = LAST | own
  left = (None, None) if window is None else (window - 1, None)
  if window is not None:
    expected &= np.arange(T) > np.arange(T)[:, None] - window
  ids, same = documents(1)
  found = image_blocks(jnp.asarray(IMAGES), left, jnp.asarray(ids))
  np.testing.assert_array_equal(seen(found), expected & same)
  # The same as big_vision's pattern: 1 for text and an image's first token.
  first = np.diff(IMAGES, axis=1, prepend=-9) != 0
  pattern = big_vision((IMAGES < 0) | first)
  np.testing.assert_array_equal(
    seen(image_blocks(jnp.asarray(IMAGES))), pattern
  )


def of_peers(name, types, length):
  """Our mask for that of transformers, over rows of types."""
  letters = np.array([list(row) for row in types])
  segments = jnp.where(letters == "-", -1, 0)
  vision = jnp.asarray(letters == "v")
  first = jnp.diff(vision, axis=1, prepend=False)
  images = jnp.where(vision, jnp.cumsum(first, axis=1), -1)
  window = (length - 1, None)
  return {
    "gemma3_full": lambda: image_blocks(images, None, segments),
    "gemma3_sliding": lambda: image_blocks(images, window, segments),
    "gemma4_full": lambda: Mask.causal(None, segments),
    "gemma4_sliding": lambda: image_blocks(images, window, segments),
    "molmo2": lambda: bidirectional_tokens(vision, segments),
    "paligemma": lambda: prefix_blocks(
      jnp.asarray(np.isin(letters, ["v", "p"]).sum(1)),
      letters.shape[1],
      None,
      segments,
    ),
  }[name]()


STORED = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", STORED["masks"])
def test_masks_are_those_of_transformers(name):
  types = STORED["prefixed" if name == "paligemma" else "types"]
  found = of_peers(name, types, STORED["window"]).visible(16, 16)
  for row, pairs, text in zip(
    types, np.asarray(found), STORED["masks"][name], strict=True
  ):
    live = [n for n, kind in enumerate(row) if kind != "-"]
    drawn = ["".join(".#"[int(k)] for k in pairs[n]) for n in live]
    assert drawn == [text[n] for n in live]


def test_prefixes_are_those_of_the_other_kind():
  prefix = jnp.array([0, 5, 14])
  ours = prefix_blocks(prefix, T, (6, None))
  np.testing.assert_array_equal(
    seen(ours), seen(Mask.prefix_lm(prefix, (6, None)))
  )


def test_marked_tokens_see_all_that_are_marked():
  """Molmo 2: causal, or both are vision, however many runs there are."""
  marked = IMAGES >= 0
  marked[0, ::2] ^= True
  ids, same = documents(2)
  found = bidirectional_tokens(jnp.asarray(marked), jnp.asarray(ids))
  both = marked[:, :, None] & marked[:, None]
  np.testing.assert_array_equal(seen(found), (LAST | both) & same)
  assert found.bounds.shape[1] == 4


def test_text_sees_its_latest_image():
  """Flamingo: images so far = number of the key's image, from 1."""
  marks = draw(3, 0, 4, B, T) == 0
  marks[0] = False
  marks[1, 0] = True  # an image comes first
  sizes = np.array([[2, 1, 3], [1, 0, 4], [3, 3, 3]], np.int32)
  S = 9
  numbers = np.zeros((B, S), int)  # of keys of no image
  for row, own in enumerate(sizes):
    numbers[row, : own.sum()] = np.repeat(np.arange(3), own) + 1
  count = np.cumsum(marks, axis=1)
  assert count.max() > 3  # more images than keys are given for
  expected = (count[:, :, None] == numbers[:, None]) & (count > 0)[:, :, None]
  mask = latest_image(jnp.asarray(marks), jnp.asarray(sizes))
  np.testing.assert_array_equal(seen(mask, S), expected)
  assert not expected[0].any() and expected[1].any()
  # A piece of the text, as in decoding.
  rest = latest_image(
    jnp.asarray(marks[:, 5:]),
    jnp.asarray(sizes),
    before=jnp.asarray(count[:, 4]),
  )
  np.testing.assert_array_equal(rest.visible(T - 5, S), expected[:, 5:])
  # Two packed documents: images 1 and 2 are those of the first one.
  ids = (np.repeat([[0, 1]], T // 2, axis=1), np.array([[0] * 6 + [1] * 3]))
  mask = latest_image(
    jnp.asarray(marks), jnp.asarray(sizes[2:]), tuple(map(jnp.asarray, ids))
  )
  same = ids[0][:, :, None] == ids[1][:, None]
  theirs = count[:, :, None] == np.repeat([1, 2, 3], 3)
  np.testing.assert_array_equal(seen(mask, S), theirs & same)


# A prefix with branches, one of them branching again, and a second tree.
NODES = np.array([[0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4, 5, 6, -1]], np.int32)
PARENTS = np.array([[-1, 0, 0, 2, 2, -1, 5]], np.int32)


def ways(nodes, parents):
  """The messages at and above each one."""
  found = []
  for n, parent in enumerate(parents):
    found.append({n} | (found[parent] if parent >= 0 else set()))
  return found


def tree(nodes, parents, mask_ar):
  """A token sees messages above its own, and its own by big_vision's rule."""
  above = ways(nodes, parents)
  found = np.zeros((len(nodes),) * 2, bool)
  c = np.cumsum(mask_ar)
  for q, mine in enumerate(nodes):
    for k, other in enumerate(nodes):
      if mine < 0 or other < 0:
        continue
      within = c[k] <= c[q] if mine == other else True
      found[q, k] = other in above[mine] and within
  return found


@pytest.mark.parametrize("blocks", [False, True])
def test_a_token_sees_the_messages_above_its_own(blocks):
  mask_ar = draw(5, 0, 2, 1, T) if blocks else np.ones((1, T), np.int32)
  mask = message_tree(
    jnp.asarray(NODES),
    jnp.asarray(PARENTS),
    3,
    jnp.asarray(mask_ar) if blocks else None,
  )
  expected = tree(NODES[0], PARENTS[0], mask_ar[0])
  np.testing.assert_array_equal(
    seen(mask), np.broadcast_to(expected, (B, T, T))
  )


def test_positions_go_on_from_the_message_above():
  found = jax.jit(functools.partial(tree_positions, depth=3))(
    jnp.asarray(NODES), jnp.asarray(PARENTS)
  )
  above, lengths = ways(NODES[0], PARENTS[0]), np.bincount(NODES[0][:-1])
  expected, at = [], dict.fromkeys(range(7), 0)
  for n in NODES[0][:-1]:
    expected.append(sum(lengths[m] for m in above[n] - {n}) + at[n])
    at[n] += 1
  np.testing.assert_array_equal(found[0], [*expected, -1])


def test_a_message_without_a_parent_entry_is_padding():
  """Number 6 is the last that has one."""
  unknown = np.where(NODES < 0, 7, NODES)
  for build in (message_tree, tree_positions):
    expected, found = (
      build(jnp.asarray(nodes), jnp.asarray(PARENTS), 3)
      for nodes in (NODES, unknown)
    )
    if build is message_tree:
      expected, found = seen(expected), seen(found)
      assert not expected[:, -1].any()
    np.testing.assert_array_equal(found, expected)


def test_a_piece_goes_on_where_a_cache_ends():
  """Bounds are positions in the cache: what it has is visible."""
  start = jnp.array([4, 0, 9])
  whole = np.pad(IMAGES, ((0, 0), (9, 0)), constant_values=-1)
  piece = image_blocks(jnp.asarray(IMAGES), start=start)
  for row, n in enumerate(np.asarray(start)):
    expected = image_blocks(jnp.asarray(whole[row : row + 1, 9 - n :]))
    np.testing.assert_array_equal(piece.bounds[row], expected.bounds[0, :, n:])


@pytest.mark.parametrize(
  ("parents", "depth", "message"),
  [
    ([[-1, 0, 1]], 2, "found 2, expected 3"),
    ([[-1, 2, 0]], 3, "each below its own index"),
    ([[-1]], 9, "found 9, expected 1 to 8"),
  ],
)
def test_trees_that_do_not_fit_raise(parents, depth, message):
  nodes = jnp.zeros((1, T), jnp.int32)
  with pytest.raises(ValueError, match=re.escape(message)):
    message_tree(nodes, jnp.array(parents), depth)


def test_coordinates_that_are_no_positions_take_no_window():
  for mask in (
    bidirectional_tokens(jnp.asarray(IMAGES) >= 0),
    message_tree(jnp.asarray(NODES), jnp.asarray(PARENTS), 3),
  ):
    mask.check(B, T, T)
    local = Mask.intervals(
      mask.bounds, (3, None), kv_positions=mask.kv_positions
    )
    with pytest.raises(ValueError, match="with kv_positions alone"):
      local.check(B, T, T)
