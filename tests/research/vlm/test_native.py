"""Images of native resolution: places for patches, and what padding changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.typing import UserError
from research.vlm import connectors, data
from research.vlm.encoders import EncoderSizes, native, qwen, windows
from research.vlm.images.patches import patchify
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.native import Native
from research.vlm.scenes.sample import Sample
from tests import support_golden, support_qwen, support_vlm


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("rows, columns", [(2, 6), (6, 4), (4, 4)])
def test_coordinates_are_those_of_the_patches(rows, columns, side):
  view = np.zeros((3 * rows, 3 * columns, 3), np.uint8)
  expected = patchify(view, 3, side)[1]
  grids = jnp.asarray([(rows, columns), (0, 0)])
  found = native.coordinates(grids, 40, side)
  np.testing.assert_array_equal(found[0, : len(expected)], expected)
  assert (found[0, len(expected) :] == -1).all() and (found[1] == -1).all()


def test_soft_tokens_follow_each_other():
  soft = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4, 1)
  sizes = np.array([[2, 0, 3], [4, 1, 0]])
  found = native.without_padding(jnp.asarray(soft), jnp.asarray(sizes))
  for row, own, counts in zip(found, soft, sizes, strict=True):
    expected = np.concatenate([x[:n] for x, n in zip(own, counts, strict=True)])
    np.testing.assert_array_equal(row[: counts.sum()], expected)


def test_windows_are_squares_of_patches_in_order():
  at = native.coordinates(jnp.asarray([(6, 10)]), 64, 2)
  valid = at[..., 0] >= 0
  found = windows.windows_of(at, valid, 4)[0]
  # Two rows of three windows; those at the ends are smaller.
  sizes = np.unique_counts(np.asarray(found)[np.asarray(valid[0])]).counts
  np.testing.assert_array_equal(np.sort(sizes), [4, 8, 8, 8, 16, 16])
  for window in set(found[valid[0]].tolist()):
    inside = np.asarray(at[0][found == window])
    assert len({tuple(x // 4) for x in inside}) == 1
  sizes = EncoderSizes(width=24, depth=2, heads=2, hidden=8, patch=4)
  tower = qwen.qwen2_5_vl(sizes, window=4, full=(1,))
  order = windows.window_order(at, valid, tower.layer_kinds())
  in_order = np.asarray(found[order[0]])
  changes = np.count_nonzero(np.diff(in_order))
  assert changes == 6 and (in_order[60:] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_views_of_one_size_are_images_of_that_size(name, tmp_path):
  """Patches go row by row here, and square by square in the goldens."""
  model, params = support_qwen.opened(name, tmp_path)
  golden = support_golden.golden(name)
  view = jnp.asarray(golden["image_2"])[None, None]
  found = jax.jit(model.encode)(params, view)[0]
  assert found.shape[0] == 4
  expected = golden["features"][-4:]
  if name == "qwen3_vl":
    deeper = golden["deeper"][-4:].reshape(4, -1)
    expected = np.concatenate([expected, deeper], axis=-1)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)
  np.testing.assert_array_equal(model.soft_grids(view), [[(1, 4)]])


def test_connectors_that_read_whole_views_are_refused():
  pool = connectors.AttentionPool(size=32, queries=2)
  model = dataclasses.replace(support_vlm.model(), connector=pool)
  patches = native.Patches(
    jnp.zeros((1, 1, 16, 48), jnp.uint8), jnp.zeros((1, 1, 2), jnp.int32)
  )
  with pytest.raises(UserError, match="AttentionPool, which would read"):
    model.encode({}, patches)


def test_an_image_of_too_many_patches_is_refused():
  how = Preprocessor(Native(patch=4, merge=2, min_pixels=1))
  image = np.zeros((16, 24, 3), np.uint8)
  with pytest.raises(UserError, match="found 24 of an image, expected at most"):
    data.Prompt.from_images([image], how, 1, patches=16)


def test_a_prompt_without_images_stands_beside_one_with_an_image():
  how = Preprocessor(Native(patch=4, merge=2, min_pixels=1))
  image = np.zeros((16, 24, 3), np.uint8)
  prompts = [data.Prompt.from_images(x, how, 2) for x in ((), (image,))]
  found = data.batch_images(prompts, square=2)
  assert found.shape == (2, 2, 64, 48)
  np.testing.assert_array_equal(found.grids[:, 0], [(0, 0), (4, 6)])
  assert not found.grids[:, 1].any()
  assert data.batch_images(prompts[:1], square=2).shape == (1, 2, 64, 48)


def test_rows_of_questions_have_patches_and_grids():
  how = Preprocessor(Native(patch=4, merge=2, min_pixels=1))
  images = tuple(np.full((h, w, 3), h, np.uint8) for h, w in ((16, 24), (8, 8)))
  fields = dict(
    samples=[Sample(images, "w5", "w6", "", "", program={}, objects=())],
    preprocessor=how,
    image_token=support_vlm.IMAGE,
    length=16,
    views=3,
  )
  questions = data.ImageQuestions(**fields, patches=32)
  [row] = questions.rows(support_vlm.tokenizer())
  assert row["patches"].shape == (3, 32, 48)
  np.testing.assert_array_equal(row["grids"], [(4, 6), (2, 2), (0, 0)])
  counts = (row["patches"] != 0).all(-1).sum(-1)
  np.testing.assert_array_equal(counts, [24, 4, 0])
  assert (row["tokens"] == support_vlm.IMAGE).sum() == 7
  with pytest.raises(UserError, match="patches: found None, expected the most"):
    data.ImageQuestions(**fields)
  views = fields | dict(preprocessor=support_vlm.PREPROCESSOR)
  with pytest.raises(UserError, match="patches: found 32, expected None"):
    data.ImageQuestions(**views, patches=32)
