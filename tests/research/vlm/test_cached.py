"""Features that are computed once: what they equal, and when they are not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.typing import UserError
from research.vlm import WithImages, cached
from research.vlm.buckets import Bucket, BucketedQuestions
from research.vlm.scenes.sample import Sample
from tests import support_vlm

MODEL, PARAMS = support_vlm.model(), support_vlm.params()
TRAINABLE = "^(connector|language)/"
IMAGES = support_vlm.pixels(3, 1)[:, 0]


def sample(*images):
  return Sample(images, "w5", "w6", "", "", program={}, objects=())


def questions(**changes):
  fields = dict(
    # The first image occurs three times.
    samples=[
      sample(IMAGES[0]),
      sample(IMAGES[1], IMAGES[0]),
      sample(IMAGES[2]),
      sample(IMAGES[0]),
    ],
    preprocessor=support_vlm.PREPROCESSOR,
    image_token=support_vlm.IMAGE,
    buckets=(Bucket(length=16, views=4, rows=2, pool=1),),
  )
  return BucketedQuestions(**(fields | changes))


def with_features(folder=None, params=PARAMS, **changes):
  own = cached.CachedFeatures(folder=folder, **changes)
  return questions(inputs=own).with_encoder(MODEL, params, TRAINABLE)


def batches(data):
  return data.evaluation(support_vlm.tokenizer())


@pytest.fixture(name="encoded")
def _encoded(monkeypatch):
  """Counts the views that are encoded."""
  counted = []
  encode = cached._encode

  def counting(model, params, pixels):
    counted.append(int(pixels.any(axis=(1, 2, 3)).sum()))
    return encode(model, params, pixels)

  monkeypatch.setattr(cached, "_encode", counting)
  return counted


@pytest.mark.slow
def test_soft_tokens_and_loss_are_those_of_pixels():
  plain, made = batches(questions()), batches(with_features())
  loss = jax.jit(lambda *x: WithImages(MODEL)(*x, None)[0])
  encode = jax.jit(MODEL.encode)
  connect = jax.jit(lambda *x: MODEL.with_features(*x)["embed"].features)
  for one, other in zip(plain, made, strict=True):
    assert "pixels" not in other and other["features"].shape[2:4] == (4, 4)
    expected = encode(PARAMS, one["pixels"]).reshape(2, 4, 4, -1)
    found = connect(PARAMS, other["features"]).reshape(expected.shape)
    used = one["pixels"].any(axis=(2, 3, 4))
    np.testing.assert_allclose(
      found[used], expected[used], rtol=1e-4, atol=1e-5
    )
  np.testing.assert_allclose(
    loss(PARAMS, made[0]), loss(PARAMS, plain[0]), rtol=1e-5
  )


def test_a_view_is_encoded_once_and_found_in_the_next_run(tmp_path, encoded):
  data = with_features(str(tmp_path))
  first = batches(data)
  assert sum(encoded) == 3
  batches(data)
  again = batches(with_features(str(tmp_path)))
  assert sum(encoded) == 3
  for one, other in zip(first, again, strict=True):
    np.testing.assert_array_equal(one["features"], other["features"])
  # A file that a crash cut short is made anew.
  file = next(path for path in tmp_path.rglob("*") if path.is_file())
  file.write_bytes(file.read_bytes()[:-1])
  batches(with_features(str(tmp_path)))
  assert sum(encoded) == 4


def test_another_encoder_has_other_features(tmp_path, encoded):
  other = PARAMS | {
    "vision": jax.tree.map(lambda x: x * 1.01, PARAMS["vision"])
  }
  found = [
    batches(with_features(str(tmp_path), params))[0]["features"]
    for params in (PARAMS, other)
  ]
  assert sum(encoded) == 6 and len(list(tmp_path.iterdir())) == 2
  assert np.abs(found[0] - found[1]).max() > 1e-3
  connector = PARAMS | {
    "connector": jax.tree.map(jnp.zeros_like, PARAMS["connector"])
  }
  assert cached.encoder_hash(MODEL, connector) == cached.encoder_hash(
    MODEL, PARAMS
  )


def test_data_of_one_experiment_takes_the_encoder_of_the_next(encoded):
  """The features of the first encoder are not those of the second."""
  other = PARAMS | {
    "vision": jax.tree.map(lambda x: x * 1.01, PARAMS["vision"])
  }
  first = with_features()
  again = first.with_encoder(MODEL, PARAMS, TRAINABLE)
  assert again.inputs is first.inputs
  second = first.with_encoder(MODEL, other, TRAINABLE)
  expected = with_features(params=other)
  chex.assert_trees_all_equal(batches(second), batches(expected))
  with pytest.raises(UserError, match="vision/.* is trained"):
    first.with_encoder(MODEL, PARAMS, ".")


def test_memory_is_bounded(encoded):
  data = with_features(megabytes=0)
  batches(data)
  assert len(data.inputs.memory) == 1 and sum(encoded) > 3


def test_what_changes_is_not_cached():
  inputs = cached.CachedFeatures()
  with pytest.raises(UserError, match="vision/.* is trained"):
    inputs.with_encoder(MODEL, PARAMS, ".")
  with pytest.raises(UserError, match="found no encoder"):
    batches(questions(inputs=inputs))
