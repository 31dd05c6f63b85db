"""BLIP-2's first stage: masks by hand, negatives by their law, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import experiment
from research import sharding, tree
from research.typing import UserError
from research.vlm.bootstrapping import (
  CaptionHead,
  FromPixels,
  ImageText,
  ImageTextModel,
  masks,
  objective,
)
from research.vlm.connectors.qformer import qformer
from research.vlm.encoders import vit
from research.vlm.images.normalise import CLIP, HALF
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling import InternVL, NaFlex, Square
from tests import support_vlm

QUERIES, LENGTH = 3, 4
MODEL = ImageTextModel(
  qformer=qformer(
    1, width=12, depth=2, heads=2, hidden=16, queries=QUERIES, text=True
  ),
  vocab_size=19,
  length=LENGTH,
  size=8,
  caption=CaptionHead(),
  caption_start=2,
)
SEGMENTS = np.array([[0, 0, 0, 0], [0, 0, -1, -1], [0, 0, 0, -1]])


def batch(rows=3, seed=0):
  rng = np.random.default_rng(seed)
  return dict(
    features=jnp.asarray(rng.normal(size=(rows, 5, 10)), jnp.float32),
    tokens=jnp.asarray(rng.integers(3, 19, (rows, LENGTH))),
    segments=jnp.asarray(SEGMENTS[:rows]),
  )


@functools.cache
def params():
  given = batch()
  shapes = jax.eval_shape(
    MODEL.init,
    jax.random.key(0),
    given["features"],
    given["tokens"],
    given["segments"] >= 0,
  )["params"]
  rng = np.random.default_rng(1)

  def draw(path, x):
    if path.endswith("temperature"):
      return jnp.float32(0.5)
    value = 0.4 * rng.normal(size=x.shape)
    return jnp.asarray(value + path.endswith("scale"), jnp.float32)

  return tree.map_paths(draw, shapes)


@pytest.mark.parametrize(
  "make, visible",
  [
    (masks.unimodal, lambda q, k: (q < QUERIES) == (k < QUERIES)),
    (masks.bidirectional, lambda q, k: True),
    (masks.multimodal_causal, lambda q, k: k < QUERIES or QUERIES <= k <= q),
  ],
)
def test_masks_are_those_of_figure_2(make, visible):
  valid = SEGMENTS >= 0
  total = QUERIES + LENGTH
  found = np.asarray(make(jnp.asarray(valid), QUERIES).visible(total, total))
  for row in range(3):
    real = [True] * QUERIES + list(valid[row])
    for q in range(total):
      for k in range(total):
        expected = real[q] and real[k] and visible(q, k)
        assert found[row, q, k] == expected, (row, q, k)


def test_negatives_follow_their_law():
  """Frequencies of 4,000 draws, within 4 standard deviations."""
  products = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)) * 2)
  ids = jnp.array([0, 1, 1, 2, -1])
  keys = jax.random.split(jax.random.key(0), 4_000)
  draw = jax.jit(
    jax.vmap(lambda key: objective.hard_negatives(products, ids, key))
  )
  drawn = map(np.asarray, draw(keys))
  for found, table in zip(drawn, (products.T, products), strict=True):
    table = np.array(table, np.float64)[:4, :4]
    p = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True) + 1e-4
    p *= np.array([[0, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0]])
    p /= p.sum(axis=1, keepdims=True)
    counts = np.stack([np.bincount(x, minlength=5) for x in found.T[:4]])
    assert not counts[:, 4].any()
    spread = np.sqrt(4_000 * p * (1 - p))
    assert (np.abs(counts[:, :4] - 4_000 * p) <= 4 * spread + 1).all()
    assert not counts[:, :4][p == 0].any()


@pytest.mark.slow
def test_every_weight_has_a_gradient_and_a_sharding_rule():

  def loss(params):
    total, _, sums = ImageText(MODEL)(params, batch(), jax.random.key(0))
    return total, sums

  gradients, sums = jax.jit(jax.grad(loss, has_aux=True))(params())
  assert set(sums) == {"contrast", "matching", "captions"}
  for path, x in tree.flatten_paths(gradients):
    assert sharding.logical_axes(path) is not None, path
    assert np.abs(x).max() > 0, path


@pytest.mark.slow
def test_a_padded_row_counts_nowhere():
  loss = jax.jit(ImageText(MODEL))
  total, count, _ = loss(params(), batch(), None)
  padded = {k: jnp.concatenate([x, x[:1]]) for k, x in batch().items()}
  padded["segments"] = padded["segments"].at[3].set(-1)
  again, rows, _ = loss(params(), padded, None)
  assert rows == count == 3
  np.testing.assert_allclose(again, total, rtol=1e-5)


def test_the_start_token_hides_the_first_word_from_captions():
  given = batch()
  valid = given["segments"] >= 0
  run = jax.jit(functools.partial(MODEL.apply, method="captions"))
  one = run({"params": params()}, given["features"], given["tokens"], valid)
  changed = given["tokens"].at[:, 0].set(7)
  two = run({"params": params()}, given["features"], changed, valid)
  np.testing.assert_array_equal(one, two)


def test_what_cannot_be_compared_is_refused():
  given = batch()
  pair = given["features"], given["tokens"], given["segments"] >= 0
  model = MODEL.clone(caption=None)
  with pytest.raises(UserError, match="no caption head"):
    model.apply({"params": params()}, *pair, method="captions")
  model = MODEL.clone(length=3)
  with pytest.raises(UserError, match="expected at most 3"):
    model.apply({"params": params()}, *pair, method="match")
  silent = qformer(1, width=12, depth=2, heads=2, hidden=16, queries=QUERIES)
  model = MODEL.clone(qformer=silent)
  with pytest.raises(UserError, match="no text_mlp"):
    model.apply({"params": params()}, *pair, method="match")


def test_features_of_pixels_are_those_of_the_model():
  model = support_vlm.model()
  pixels = jnp.asarray(support_vlm.pixels(2, 2))
  tower = support_vlm.params()["vision"]
  given = []

  def record(params, batch, key):
    given.append((params, batch))
    return jnp.zeros(()), jnp.ones(()), {}

  loss = FromPixels(
    vision=model.vision, objective=record, normalise=model.normalise
  )
  towers = {"vision": tower, "image_text": 1}
  loss(towers, {"pixels": pixels, "tokens": 2}, None)
  [(params, batch)] = given
  assert params == 1
  assert sorted(batch) == ["features", "tokens"]
  patches = vit.patchify(pixels[:, 0] / 127.5 - 1, 4)
  at = jnp.broadcast_to(vit.grid_coordinates(4, 4), (2, 16, 2))
  expected = model.encode_patches({"vision": tower}, patches, at)
  np.testing.assert_allclose(batch["features"], expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(UserError, match="found views of 2 x 4 patches"):
    loss(towers, {"pixels": pixels[:, :, :8]}, None)


@pytest.mark.parametrize(
  ("preprocessor", "words"),
  [
    (Preprocessor(Square(16, 4), CLIP), r"FromPixels\.normalise: found"),
    (Preprocessor(InternVL(16, patch=4)), "makes 10 views of 64 x 64"),
    (
      Preprocessor(NaFlex(16, patch=4)),
      "NaFlex, which keeps each image's size",
    ),
    (Preprocessor(Square(32, 4)), "found views of 8 x 8 patches"),
  ],
  ids=["normalise", "views", "native", "size"],
)
def test_a_preprocessor_that_does_not_fit_the_encoder_is_refused(
  preprocessor, words
):
  """A run asks before its first step; the encoder sees 4 x 4 patches."""
  loss = FromPixels(
    vision=support_vlm.model().vision, objective=ImageText(), normalise=HALF
  )
  assert isinstance(loss, experiment.NormalisesPixels)
  loss.check_preprocessor(support_vlm.PREPROCESSOR)
  with pytest.raises(UserError, match=words):
    loss.check_preprocessor(preprocessor)
