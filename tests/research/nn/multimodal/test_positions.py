"""Rotary positions of rows with images: transformers', and by enumeration."""

import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from research.nn.multimodal import ImagePositions, rope_index
from research.typing import UserError
from tests import support_golden, support_qwen

IMAGE = support_qwen.IMAGE


def enumerated(tokens, grids):
  """Returns positions and offset of a row, token by token."""
  at, out, images = 0, [], iter(grids)
  index = 0
  while index < len(tokens):
    if tokens[index] != IMAGE:
      out.append((at, at, at))
      at, index = at + 1, index + 1
      continue
    rows, columns = next(images)
    out += [(at, at + r, at + c) for r in range(rows) for c in range(columns)]
    at, index = at + max(rows, columns), index + rows * columns
  return np.array(out), at - len(tokens)


def found_of(tokens, grids, segments=None):
  given = jnp.asarray(tokens), jnp.asarray(grids, jnp.int32)
  return map(np.asarray, rope_index(*given, IMAGE, segments))


def test_positions_are_those_of_transformers():
  golden = support_golden.golden("qwen2_vl")
  tokens = golden["rope_tokens"]
  positions, offsets = found_of(tokens, golden["rope_grids"])
  real = tokens >= 0
  np.testing.assert_array_equal(positions[real], golden["rope_positions"][real])
  np.testing.assert_array_equal(offsets, golden["rope_offsets"])
  assert len(set(offsets.tolist())) > 3


def test_an_image_of_two_rows_and_three_columns():
  """The example of the specification: two words, an image, two words."""
  tokens = [[1, 2, *[IMAGE] * 6, 3, 4]]
  positions, offsets = found_of(tokens, [[[2, 3]]])
  image = [(2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 2), (2, 3, 3), (2, 3, 4)]
  expected = [(0, 0, 0), (1, 1, 1), *image, (5, 5, 5), (6, 6, 6)]
  np.testing.assert_array_equal(positions[0], expected)
  assert offsets.tolist() == [-3]


def test_images_may_follow_each_other_and_be_missing():
  """transformers takes images without text between for one."""
  grids = [(0, 0), (2, 2), (0, 0), (1, 3), (4, 1)]
  tokens = [*[IMAGE] * 7, 5, *[IMAGE] * 4, 6, 7]
  positions, offsets = found_of([tokens], [grids])
  expected, offset = enumerated(tokens, [g for g in grids if any(g)])
  np.testing.assert_array_equal(positions[0], expected)
  assert offsets.tolist() == [offset]


def test_packed_rows_are_their_documents():
  first, second = [5, *[IMAGE] * 6, 6], [7, 8, *[IMAGE] * 4, 9]
  row = [*first, *second, 0, 0]
  segments = [0] * len(first) + [1] * len(second) + [-1] * 2
  positions, _ = found_of([row], [[(3, 2), (2, 2)]], jnp.asarray([segments]))
  expected = [enumerated(first, [(3, 2)])[0], enumerated(second, [(2, 2)])[0]]
  np.testing.assert_array_equal(positions[0, :-2], np.concatenate(expected))


def test_slots_of_a_cache_and_the_tokens_after_them():
  tokens = jnp.asarray([[5, *[IMAGE] * 6, 6, 7], [5, 6, 7, *[-1] * 6]])
  grids = jnp.asarray([[(2, 3)], [(0, 0)]], jnp.int32)
  images = weights.with_tokens(ImagePositions(grids, IMAGE), tokens)
  whole, _ = rope_index(tokens, grids, IMAGE)
  np.testing.assert_array_equal(images.of_row(9), whole)
  slots = jnp.broadcast_to(jnp.arange(9), (2, 9))
  np.testing.assert_array_equal(images.of_slots(slots), whole)
  # Row 0 goes on three positions before its slot, row 1 at it.
  after = images.of_slots(jnp.asarray([[9], [3]]))
  np.testing.assert_array_equal(after[:, 0], [[6] * 3, [3] * 3])


def test_slots_of_a_cache_count_from_a_row_s_first_token():
  """As those of samplers whose prompts have padding on the left."""
  row = [5, *[IMAGE] * 6, 6, 7]
  expected, offset = enumerated(row, [(2, 3)])
  grids = jnp.asarray([[(2, 3)], [(2, 3)]], jnp.int32)
  tokens = jnp.asarray([[*row, 8, 8, 8, 8], [*[-1] * 4, *row]])
  images = weights.with_tokens(ImagePositions(grids, IMAGE), tokens)
  slots = jnp.broadcast_to(jnp.arange(12), (2, 12))
  found = np.asarray(images.of_slots(slots))
  after = [[n + offset] * 3 for n in range(9, 12)]
  expected = np.concatenate([expected, after])
  np.testing.assert_array_equal(found[0], expected)
  np.testing.assert_array_equal(found[1] - found[1, :1], expected)


def test_positions_of_unknown_tokens_are_refused():
  images = ImagePositions(jnp.zeros((1, 1, 2), jnp.int32), IMAGE)
  with pytest.raises(UserError, match="call weights.with_tokens"):
    images.of_slots(jnp.zeros((1, 1), jnp.int32))
  known = weights.with_tokens(images, jnp.zeros((1, 4), jnp.int32))
  with pytest.raises(UserError, match="found 3 tokens, expected the 4"):
    known.of_row(3)
