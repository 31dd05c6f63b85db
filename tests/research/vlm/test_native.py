"""Images of native resolution: places for patches, and what padding changes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from research.typing import UserError
from research.vlm import connectors, data
from research.vlm.encoders import EncoderSizes, native, qwen, windows
from research.vlm.images.patches import patchify
from tests import support_qwen, support_vlm


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
  assert windows.window_order(at, valid, []) is None


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def model(request, tmp_path_factory):
  return support_qwen.opened(request.param, tmp_path_factory.mktemp("model"))


def test_places_for_more_patches_change_nothing(model):
  model, params = model
  images = support_qwen.images(model, "qwen2_vl")
  count = images.shape[-2]
  wider = jnp.pad(images.pixels, ((0, 0), (0, 1), (0, 16), (0, 0)))
  grids = jnp.pad(images.grids, ((0, 0), (0, 1), (0, 0)))
  few = model.encode(params, images)
  many = model.encode(params, native.Patches(wider, grids))
  soft = np.asarray(images.grids).prod(-1).sum(-1) // model.square**2
  assert few.shape[1] == 2 * count // 4 < many.shape[1]
  for n, x, y in zip(soft, few, many, strict=True):
    np.testing.assert_allclose(x[:n], y[:n], rtol=1e-5, atol=1e-5)


def test_views_of_one_size_are_images_of_that_size(model):
  """Patches go row by row, or square by square."""
  model, params = model
  pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
  how = support_qwen.preprocessor(model)
  prompts = [data.Prompt.from_images([view], how, 1) for view in pixels]
  found = model.encode(params, data.batch_images(prompts, model.square))
  expected = model.encode(params, jnp.asarray(pixels[:, None]))
  soft = expected.shape[1]
  assert soft == 6
  np.testing.assert_allclose(found[:, :soft], expected, rtol=1e-5, atol=1e-5)
  grids = model.soft_grids(jnp.asarray(pixels[:, None]))
  np.testing.assert_array_equal(grids, [[(2, 3)], [(2, 3)]])


def test_connectors_that_read_whole_views_are_refused():
  pool = connectors.AttentionPool(size=32, queries=2)
  model = dataclasses.replace(support_vlm.model(), connector=pool)
  patches = native.Patches(
    jnp.zeros((1, 1, 16, 48), jnp.uint8), jnp.zeros((1, 1, 2), jnp.int32)
  )
  with pytest.raises(UserError, match="AttentionPool, which would read"):
    model.encode({}, patches)


def test_an_image_of_too_many_patches_is_refused(model):
  how = support_qwen.preprocessor(model[0])
  image = np.zeros((16, 24, 3), np.uint8)
  with pytest.raises(UserError, match="found 24 of an image, expected at most"):
    data.Prompt.from_images([image], how, 1, patches=16)
