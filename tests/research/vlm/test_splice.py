"""Features in the place of placeholders, whatever the language model is."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research import quant, weights
from research.data import batch_of
from research.training.objectives.objective import NextToken
from research.typing import UserError
from research.vlm import splice
from tests import support

MODEL = support.model("llama")
PARAMS = support.params(MODEL)
RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.normal(size=(2, 4, 32)), jnp.float32)
IMAGE = 66
TOKENS = jnp.asarray(
  [[3, IMAGE, IMAGE, 5, IMAGE, IMAGE, 7], [IMAGE, 9, 8, IMAGE, 4, 5, 6]]
)


def expected_embeddings(table):
  rows = np.asarray(table)[np.asarray(TOKENS)].copy()
  for i, tokens in enumerate(np.asarray(TOKENS)):
    places = np.flatnonzero(tokens == IMAGE)
    rows[i, places] = np.asarray(FEATURES)[i, : len(places)]
  return rows


def test_placeholders_get_the_features_in_order():
  table = splice.SplicedEmbedding(PARAMS["embed"], FEATURES, IMAGE)
  chex.assert_trees_all_equal(
    table.take(TOKENS), expected_embeddings(PARAMS["embed"])
  )


def test_rows_of_a_pool_share_features_in_the_order_of_their_rows():
  """As one row of features and tokens; one row of them serves any number."""
  shared = FEATURES.reshape(1, 8, 32)
  table = splice.SplicedEmbedding(PARAMS["embed"], shared, IMAGE, pool=2)
  whole = splice.SplicedEmbedding(PARAMS["embed"], shared, IMAGE)
  expected = whole.take(TOKENS.reshape(1, -1)).reshape(2, 7, 32)
  chex.assert_trees_all_equal(table.take(TOKENS), expected)
  both = whole.take(TOKENS)
  for row in range(2):
    alone = whole.take(TOKENS[row : row + 1])[0]
    chex.assert_trees_all_equal(both[row], alone)
  with pytest.raises(UserError, match="1 pools of 2 rows for 3 rows"):
    table.take(jnp.concatenate([TOKENS, TOKENS[:1]]))


def test_a_placeholder_outside_of_the_table_reads_nothing():
  """`jnp.take` returns NaN there, whose gradient would spoil all others."""
  tokens = jnp.where(TOKENS == IMAGE, 1000, TOKENS)

  def total(w):
    table = splice.SplicedEmbedding(w, FEATURES, 1000)
    return jnp.sum(table.take(tokens) ** 2)

  assert np.isfinite(jax.grad(total)(PARAMS["embed"])).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_reads_them_as_embeddings(packed):
  params = PARAMS
  if packed:
    table = quant.Quantize().pack(params["embed"], "embed")
    params = params | {"embed": table}
  spliced = splice.with_features(params, FEATURES, IMAGE)
  inputs = expected_embeddings(weights.dense(params["embed"]))
  hidden, _ = MODEL.apply({"params": spliced}, TOKENS)
  expected, _ = MODEL.apply({"params": params}, jnp.asarray(inputs))
  chex.assert_trees_all_close(hidden, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_loss_has_the_gradient_of_the_features():
  objective = NextToken(MODEL)
  batch = batch_of(TOKENS)

  def loss(features):
    spliced = splice.with_features(PARAMS, features, IMAGE)
    return objective(spliced, batch, None)[0]

  def by_hand(features):
    table = splice.SplicedEmbedding(PARAMS["embed"], features, IMAGE)
    x = table.take(TOKENS)
    mask = Mask.causal(segments=batch["segments"])
    hidden, _ = MODEL.apply({"params": PARAMS}, x, batch["positions"], mask)
    logits = MODEL.apply({"params": PARAMS}, hidden, method="logits")
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    return -jnp.sum(picked * batch["weights"])

  found, expected = (jax.value_and_grad(f)(FEATURES) for f in (loss, by_hand))
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
