"""Reward models: which token a score is read at, and what may be adapted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research import sharding, tree, weights
from research.lora.adapt import Adapt
from research.nn import rope
from research.prm.heads import LinearHead, MlpHead
from research.prm.model import (
  GenerativeReward,
  RewardModel,
  difference,
  log_odds,
  probability,
)
from research.typing import UserError
from tests import support

BACKBONE = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=11)
STEPS = jnp.array([[1, 3, 6], [2, 4, -1]])


def made(head=LinearHead()):
  model = RewardModel(backbone=BACKBONE, head=head)
  return model, model.with_new_head(support.params(BACKBONE), jax.random.key(1))


@pytest.mark.parametrize(
  ("logits", "want"), [([0.4], 0.4), ([0.3, 0.7], 0.4), ([-2.0, 1.0], 3.0)]
)
def test_readouts(logits, want):
  logits = jnp.array(logits)
  assert float(log_odds(logits)) == pytest.approx(want)
  two = jnp.array([0.0, want])
  p = jax.nn.softmax(two)
  assert float(probability(logits)) == pytest.approx(float(p[1]))
  assert float(difference(logits)) == pytest.approx(float(p[1] - p[0]), 1e-5)


def test_scores_are_those_of_the_steps_last_tokens():
  """What follows a step, padding included, does not change its score."""
  model, params = made(MlpHead())
  tokens = support.tokens(2, 7, 11)
  found = np.asarray(model.scores(params, tokens, STEPS))
  every = np.asarray(probability(model.logits(params, tokens)))
  want = np.take_along_axis(every, np.maximum(STEPS, 0), 1)
  np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(found[1, :2], want[1, :2], rtol=1e-5)
  assert np.isnan(found[1, 2])
  other = tokens.at[:, 4:].set(0)
  again = np.asarray(model.scores(params, other, STEPS))
  np.testing.assert_allclose(again[0, :2], found[0, :2], rtol=1e-5)
  assert abs(again[0, 2] - found[0, 2]) > 1e-4


@pytest.mark.parametrize("head", [None, LinearHead()])
def test_padding_does_not_change_how_a_text_is_rotated(head):
  """`rope.Dynamic` rotates by a text's length, from its fourth token on."""
  (block,) = BACKBONE.stack.blocks
  scaled = dataclasses.replace(
    block.attention.rope, scaling=rope.Dynamic(factor=4.0, original=4)
  )
  block = block.clone(attention=block.attention.clone(rope=scaled))
  stack = dataclasses.replace(BACKBONE.stack, blocks=(block,))
  backbone, params = BACKBONE.clone(stack=stack), made()[1]
  model = GenerativeReward(backbone=backbone, right=3, wrong=5)
  if head is not None:
    model = RewardModel(backbone=backbone, head=head)
  tokens = support.tokens(1, 7, 11)
  want = probability(model.logits(params, tokens))[0, STEPS[0]]
  for padded in (7, 8, 32):
    row = jnp.pad(tokens, ((0, 0), (0, padded - 7)))
    found = model.scores(params, row, STEPS[:1])[0]
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_two_words_are_compared_and_no_other():
  model = GenerativeReward(backbone=BACKBONE, right=3, wrong=5, rows=4)
  params, tokens = support.params(BACKBONE), support.tokens(2, 7, 11)
  hidden, _ = BACKBONE.apply({"params": params}, tokens)
  logits = BACKBONE.apply({"params": params}, hidden, method="logits")
  both = np.asarray(logits)[..., [5, 3]]
  want = np.exp(both[..., 1]) / np.exp(both).sum(-1)
  found = np.asarray(model.scores(params, tokens, STEPS))
  want = np.take_along_axis(want, np.maximum(STEPS, 0), 1)
  np.testing.assert_allclose(found[STEPS >= 0], want[STEPS >= 0], rtol=1e-4)
  with pytest.raises(UserError, match="found right 3 and wrong 11, expected"):
    GenerativeReward(backbone=BACKBONE, right=3, wrong=11)


def test_dropout_is_the_key_s_and_keeps_the_mean():
  head = LinearHead(dropout=0.1)
  hidden = jnp.ones((1, 1, 4000))
  params = {"out": jnp.ones((4000, 1)), "out_bias": jnp.zeros(1)}
  run = jax.jit(lambda key: head.apply({"params": params}, hidden, key))
  found = [float(run(jax.random.key(i))[0, 0, 0]) for i in range(8)]
  assert len(set(found)) == 8
  error = 4000 * np.sqrt(0.1 / 0.9 / 4000)  # of one sum of scaled coins
  assert abs(np.mean(found) - 4000) < 4.5 * error / np.sqrt(8)
  assert float(run(None)[0, 0, 0]) == 4000


def test_adapters_leave_the_head_or_take_it():
  _, params = made()
  count = len(weights.named_weights(params))

  def adapted(**how):
    found = Adapt(**how)(params, jax.random.key(0))
    assert len(weights.named_weights(found)) == count
    return [p for p, w in weights.named_weights(found) if weights.is_adapter(w)]

  assert not any("score" in path for path in adapted())
  assert adapted(targets=("score/out",)) == ["score/out"]
  both = adapted(targets=("score/out", "q"), exclude=("score/out",))
  assert both and not any("score" in path for path in both)


def test_every_parameter_of_a_head_has_axes():
  for head in (LinearHead(), MlpHead()):
    _, params = made(head)
    shapes = jax.eval_shape(lambda params=params: params)
    layout = sharding.Layout(data=1)
    found = layout.shardings(shapes, layout.mesh())
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(shapes))
  assert sharding.logical_axes("score/out") == ("width", None)
  assert sharding.logical_axes("trainable/score/up") == ("width", "hidden")
  assert all(x.spec == PartitionSpec() for x in jax.tree.leaves(found["score"]))
  assert tree.outer_params(params).keys() >= {"score", "embed"}


def test_a_head_of_three_logits_has_no_odds():
  with pytest.raises(UserError, match="found 3 logits a token, expected 1"):
    log_odds(jnp.zeros((2, 3)))
