"""Balance losses in objectives, and bias updates after a step."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree
from research.nn import presets
from research.nn.moe import routing
from research.nn.moe.routing import Routing
from research.training import state
from research.training.objectives import experts
from research.training.objectives.objective import NextToken
from research.training.step import make_train_step
from research.typing import UserError
from tests import support

ROUTING = Routing(experts=6, active=2, score="sigmoid", biased=True)
MODEL = support.model(
  "qwen3_moe",
  sparse=presets.Sparse(routing=ROUTING, hidden=12, dense=(0,)),
)
PLAIN = NextToken(model=MODEL)
BALANCED = NextToken(
  model=MODEL, experts=experts.Balance(loss=0.3, z=0.2, counts=True)
)
COUNTS = "counts/run1/layer0"
BIAS = "run1/layer0/mlp/router_bias"


@functools.cache
def params():
  return support.params(MODEL)


@functools.cache
def batch():
  tokens = support.tokens(4, 12)
  positions = jnp.broadcast_to(jnp.arange(12), (4, 12))
  # Rows of different lengths, so that padding and weights differ.
  real = positions < jnp.asarray([[12], [12], [7], [3]])
  return dict(
    tokens=tokens,
    targets=jnp.roll(tokens, -1, 1),
    weights=jnp.where(real, 0.5, 0.0),
    positions=jnp.where(real, positions, -1),
    segments=jnp.where(real, 0, -1),
  )


@functools.partial(jax.jit, static_argnums=0)
def evaluated(objective, params, batch, key=None):
  return objective(params, batch, key)


@pytest.mark.slow
def test_the_loss_is_the_sum_of_its_terms():
  key = jax.random.key(0)
  loss, weight, _ = evaluated(PLAIN, params(), batch(), key)
  got, same, sums = evaluated(BALANCED, params(), batch(), key)
  assert same == weight == 17.0
  added = 0.3 * sums["balance"] + 0.2 * sums["router_z"]
  np.testing.assert_allclose(got, loss + added, rtol=1e-6)
  assert sums["balance"] / weight > 1.0
  np.testing.assert_array_equal(sums[COUNTS].sum(-1), [68, 68])  # 34 tokens


def test_evaluation_reports_and_adds_nothing():
  loss, _, plain = evaluated(PLAIN, params(), batch())
  got, _, sums = evaluated(BALANCED, params(), batch())
  chex.assert_trees_all_close(got, loss, rtol=1e-6)
  assert {k for k, v in sums.items() if v.shape} == set()
  assert set(sums) - set(plain) == {"balance", "router_z", "violation"}


@pytest.mark.slow
def test_a_step_moves_each_bias_by_the_rate():
  tx, after = optax.adamw(1e-3, weight_decay=0.0), experts.rebalance(0.25)
  step = make_train_step(BALANCED, tx, accumulate=2)
  before = state.create(params(), r".", tx)
  new, metrics = jax.jit(lambda s, b, k: after(*step(s, b, k)))(
    before, batch(), jax.random.key(0)
  )
  assert not any(v.shape for v in metrics.values())
  counts = sum(
    evaluated(
      BALANCED,
      params(),
      jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch()),
      jax.random.key(0),
    )[2][COUNTS]
    for i in range(2)
  )
  old, moved = (dict(tree.flatten_paths(s.trainable)) for s in (before, new))
  want = old[BIAS] + 0.25 * np.sign(counts.mean(-1, keepdims=True) - counts)
  chex.assert_trees_all_close(moved.pop(BIAS), want, atol=1e-6)
  del old[BIAS]
  assert all(jnp.any(old[k] != moved[k]) for k in old)


@pytest.mark.slow
def test_training_balances_the_load():
  """For unbalanced experts, by the loss and by the bias."""
  skewed = tree.map_paths(
    lambda p, x: x.at[:, :2].add(0.8) if p == BIAS else x, params()
  )
  tx = optax.adam(3e-3)
  data, key = batch(), jax.random.key(0)

  def violation(params):
    _, weight, sums = evaluated(BALANCED, params, data, None)
    return float(sums["violation"] / weight)

  start = violation(skewed)
  assert start > 1
  step = make_train_step(BALANCED, tx)
  after = experts.rebalance(0.05)
  run = jax.jit(lambda s: after(*step(s, data, key)))
  now = state.create(skewed, r".", tx)
  for _ in range(40):
    now, _ = run(now)
  assert violation(now.params) < start / 3


def test_what_cannot_be_balanced_is_said():
  tx, after = optax.sgd(0.1), experts.rebalance(0.1)
  frozen = state.create(params(), "attention", tx)
  with pytest.raises(UserError, match=f"no trainable {BIAS}"):
    after(frozen, {COUNTS: jnp.ones((2, 6))})
  with pytest.raises(UserError, match="Expected Balance.counts"):
    after(frozen, {"loss": jnp.ones(())})
  dense = dataclasses.replace(BALANCED, model=support.model("llama"))
  with pytest.raises(UserError, match="the model has no experts"):
    dense(support.params(dense.model), batch(), None)


@pytest.mark.slow
def test_violation_is_what_the_metric_says():
  hidden = MODEL.apply(
    {"params": params()},
    batch()["tokens"],
    batch()["positions"],
    method="with_router_loads",
  )
  (load,) = routing.find_loads(hidden[2])
  _, weight, sums = evaluated(BALANCED, params(), batch())
  np.testing.assert_allclose(
    sums["violation"] / weight, routing.max_violation(load).mean(), rtol=1e-5
  )
