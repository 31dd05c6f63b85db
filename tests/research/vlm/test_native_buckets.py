"""Buckets of images of native resolution: by patches, and what padding changes.

A bucket of larger images is what one of smaller ones has to equal.
"""

import jax
import numpy as np
import pytest

from research import tree
from research.training.objectives.objective import NextToken
from research.typing import UserError
from research.vlm import WithImages
from research.vlm.buckets import Bucket, BucketedQuestions
from research.vlm.images.patches import patchify
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.native import Native
from research.vlm.scenes.sample import Sample
from tests import support_vlm

TOKENIZER, MODEL = support_vlm.tokenizer(), support_vlm.model()
NATIVE = Preprocessor(Native(patch=4, merge=2, min_pixels=1, max_pixels=256))
SMALL = Bucket(length=12, views=2, patches=8, rows=2)
LARGE = Bucket(length=12, views=2, patches=16, rows=2)
# Height and width of each sample's images, and whether SMALL has room for them.
SIZES = (
  (((8, 16),), True),
  (((16, 16),), False),
  (((8, 8), (16, 8)), True),
  ((), True),
  (((16, 8), (16, 16)), False),
  (((8, 8),), True),
)


def sample(number, sizes):
  rng = np.random.default_rng(number)
  images = tuple(rng.integers(0, 256, (*x, 3), np.uint8) for x in sizes)
  words = f"w{10 + number}", f"w{number}"
  return Sample(images, *words, "", "", program={}, objects=())


SAMPLES = [sample(i, sizes) for i, (sizes, _) in enumerate(SIZES)]


def questions(*buckets, preprocessor=NATIVE):
  return BucketedQuestions(
    samples=SAMPLES,
    preprocessor=preprocessor,
    image_token=support_vlm.IMAGE,
    buckets=buckets,
  )


def test_each_sample_goes_to_the_smallest_bucket_with_room_for_its_patches():
  plan = questions(LARGE, SMALL).plan(TOKENIZER)
  assert [part.bucket for part in plan.parts] == [SMALL, LARGE]
  for part, small in zip(plan.parts, (True, False), strict=True):
    found = sorted(i for pool in part.pools for row in pool for i in row)
    assert found == [i for i, x in enumerate(SIZES) if x[1] == small]
  report = plan.report()["buckets"]["12 tokens, 2 views of 16 patches"]
  # 16 and 8 + 16 patches, each sample in a row of its own.
  assert report["samples"] == 2 and report["rows"] == 2
  assert report["patches"] == (16 + 24) / 64
  only = questions(SMALL).plan(TOKENIZER)
  assert only.left_out == {"have an image of more than 8 patches": [1, 4]}


def test_a_row_has_the_patches_and_the_grids_of_its_images():
  small, _ = questions(SMALL, LARGE).plan(TOKENIZER).parts
  rows = questions(SMALL, LARGE).rows(TOKENIZER)[: len(small.pools)]
  for unit, ((*numbers,),) in zip(rows, small.pools, strict=True):
    assert unit["patches"].shape == (1, 2, 8, 48)
    images = [x for number in numbers for x in SAMPLES[number].images]
    grids = np.zeros((2, 2), int)
    for k, image in enumerate(images):
      grids[k] = image.shape[0] // 4, image.shape[1] // 4
      expected = patchify(image, 4, 2)[0].reshape(-1, 48)
      here, after = np.split(unit["patches"][0, k], [len(expected)])
      np.testing.assert_array_equal(here, expected)
      assert not after.any()
    np.testing.assert_array_equal(unit["grids"][0], grids)


def add(sums, found):
  return found if sums is None else jax.tree.map(np.add, sums, found)


def test_mixed_sizes_compile_once_a_bucket_and_padding_changes_nothing():
  """Loss and gradient over all samples, in one bucket and in two."""
  objective = WithImages(MODEL, NextToken(rows=32))

  @jax.jit
  def gradients(params, batch):
    return jax.value_and_grad(lambda p: objective(p, batch, None)[0])(params)

  params, sums = support_vlm.params(), {}
  for name, buckets in {"one": [LARGE], "two": [SMALL, LARGE]}.items():
    sums[name] = None
    for batch in questions(*buckets).evaluation(TOKENIZER):
      found = jax.device_get(gradients(params, batch))
      sums[name] = add(sums[name], found)
      noise = np.random.default_rng(1).integers(0, 256, batch["patches"].shape)
      used = (
        np.arange(batch["patches"].shape[2])
        < batch["grids"].prod(-1)[..., None]
      )
      noisy = np.where(used[..., None], batch["patches"], noise)
      again = gradients(params, batch | {"patches": noisy.astype(np.uint8)})
      jax.tree.map(np.testing.assert_array_equal, again, found)
  training = questions(SMALL, LARGE).training(TOKENIZER)
  shapes = set()
  for _, batch in zip(range(6), training, strict=False):
    shapes.add(batch["patches"].shape)
    gradients(params, batch)
  assert shapes == {x["patches"].shape for x in training.shapes}
  assert shapes == {(2, 2, 8, 48), (2, 2, 16, 48)}
  assert gradients._cache_size() == 2
  (loss, grads), (expected, others) = sums["two"], sums["one"]
  np.testing.assert_allclose(loss, expected, rtol=2e-5)
  pairs = zip(
    tree.flatten_paths(grads), tree.flatten_paths(others), strict=True
  )
  for (path, x), (_, y) in pairs:
    # As in test_buckets: biases of keys have gradients of rounding alone.
    size = 0.3 + np.abs(y).max()
    np.testing.assert_allclose(
      x / size, y / size, rtol=0, atol=5e-5, err_msg=path
    )


@pytest.mark.parametrize(
  "bucket, preprocessor, message",
  [
    (Bucket(length=8), NATIVE, "found None, expected the most patches"),
    (Bucket(length=8, patches=6), NATIVE, "found 6, .* a multiple of 4"),
    (SMALL, support_vlm.PREPROCESSOR, "found 8, expected None"),
  ],
  ids=["missing", "part of a square", "views of one size"],
)
def test_patches_that_are_not_the_tilings_are_refused(
  bucket, preprocessor, message
):
  with pytest.raises(UserError, match=f"Bucket.patches: {message}"):
    questions(bucket, preprocessor=preprocessor)
