"""Expert selection against a loop over tokens in numpy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.moe import routing as routings
from research.nn.moe.routing import Routing
from research.typing import UserError

VARIANTS = {
  "mixtral": Routing(experts=8, active=2),
  "raw softmax": Routing(experts=8, active=3, normalised=False),
  "one expert": Routing(experts=8, active=1),
  "all experts": Routing(experts=5, active=5),
  "deepseek v2": Routing(
    experts=12,
    active=4,
    normalised=False,
    scale=16.0,
    groups=4,
    active_groups=2,
  ),
  "deepseek v3": Routing(
    experts=12,
    active=4,
    score="sigmoid",
    scale=2.5,
    biased=True,
    groups=3,
    active_groups=2,
    group_score="top2",
  ),
  "biased softmax": Routing(experts=6, active=2, biased=True),
}
# A few fp32 roundings of numbers below 1 (times `scale`).
CLOSE = dict(rtol=2e-6, atol=1e-6)


def logits(tokens: int, experts: int, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return 2 * rng.standard_normal((tokens, experts)).astype(np.float32)


def bias_of(routing: Routing) -> np.ndarray | None:
  if not routing.biased:
    return None
  rng = np.random.default_rng(5)
  return 0.3 * rng.standard_normal(routing.experts).astype(np.float32)


def array(x):
  return None if x is None else jnp.asarray(x)


def all_scores(routing, row):
  row = row.astype(np.float64)
  if routing.score == "sigmoid":
    return 1 / (1 + np.exp(-row))
  return np.exp(row - row.max()) / np.exp(row - row.max()).sum()


def oracle(routing, row, bias):
  """Returns one token's experts, best first, and their weights."""
  score = all_scores(routing, row)
  choice = list(score if bias is None else score + bias)
  size = routing.experts // routing.groups
  worth = []
  for g in range(routing.groups):
    best = sorted(choice[g * size : (g + 1) * size], reverse=True)
    worth.append(best[0] if routing.group_score == "max" else sum(best[:2]))
  groups = sorted(range(routing.groups), key=lambda g: -worth[g])
  allowed = [
    e
    for e in range(routing.experts)
    if e // size in groups[: routing.active_groups]
  ]
  ids = sorted(allowed, key=lambda e: -choice[e])[: routing.active]
  weights = score[ids]
  if routing.normalised:
    weights = weights / weights.sum()
  return ids, weights * routing.scale


@pytest.mark.parametrize("name", VARIANTS)
def test_choice(name):
  routing = VARIANTS[name]
  rows, bias = logits(64, routing.experts), bias_of(routing)
  ids, weights = routings.select_experts(
    routing, jnp.asarray(rows), array(bias)
  )
  want = [oracle(routing, row, bias) for row in rows]
  np.testing.assert_array_equal(ids, np.array([w[0] for w in want]))
  np.testing.assert_allclose(weights, np.array([w[1] for w in want]), **CLOSE)
  assert weights.dtype == jnp.float32


def test_groups_and_bias_matter():
  """The variants above must differ from plain top-k to be meaningful."""
  for name in ("deepseek v2", "deepseek v3"):
    routing = VARIANTS[name]
    rows = jnp.asarray(logits(64, routing.experts))
    flat = dataclasses.replace(routing, groups=1, active_groups=1)
    one = routings.select_experts(routing, rows, array(bias_of(routing)))[0]
    two = routings.select_experts(flat, rows, array(bias_of(routing)))[0]
    assert (one != two).any()
  routing = VARIANTS["biased softmax"]
  rows = jnp.asarray(logits(64, routing.experts))
  one = routings.select_experts(routing, rows, array(bias_of(routing)))[0]
  assert (one != routings.select_experts(routing, rows)[0]).any()


def test_the_bias_gets_no_gradient_and_the_logits_do():
  routing = VARIANTS["deepseek v3"]
  rows, bias = jnp.asarray(logits(16, 12)), jnp.asarray(bias_of(routing))

  def loss(rows, bias):
    return (routings.select_experts(routing, rows, bias)[1] ** 2).sum()

  to_rows, to_bias = jax.grad(loss, (0, 1))(rows, bias)
  assert jnp.abs(to_rows).max() > 0
  chex.assert_trees_all_equal(to_bias, jnp.zeros_like(bias))


def test_extreme_logits_stay_finite():
  rows = jnp.asarray([[1e4, -1e4, 0, 0], [-1e4] * 4], jnp.float32)
  for score in ("softmax", "sigmoid"):
    routing = Routing(experts=4, active=2, score=score)
    _, weights = routings.select_experts(routing, rows)
    chex.assert_tree_all_finite(weights)


def load_of(routing, rows, real):
  ids = routings.select_experts(routing, rows, array(bias_of(routing)))[0]
  return routings.load(routing, rows, ids, jnp.asarray(real))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.sample(2)
def test_load_and_losses(name):
  """Against their definitions, over non-padding tokens."""
  routing = VARIANTS[name]
  experts, active = routing.experts, routing.active
  rows, real = logits(40, experts), np.arange(40) % 3 != 0
  load = load_of(routing, jnp.asarray(rows), real)
  counts, mean, z = np.zeros(experts), np.zeros(experts), 0.0
  for row in rows[real]:
    ids, _ = oracle(routing, row, bias_of(routing))
    counts[ids] += 1
    mean += all_scores(routing, row) / all_scores(routing, row).sum()
    z += np.log(np.exp(row.astype(np.float64)).sum()) ** 2
  n = real.sum()
  np.testing.assert_array_equal(load.counts, counts)
  assert load.tokens == n
  balance = experts * (counts / (active * n) * mean / n).sum()
  np.testing.assert_allclose(routings.balance_loss(load), balance, rtol=1e-5)
  np.testing.assert_allclose(routings.z_loss(load), z / n, rtol=1e-5)
  worst = counts.max() / counts.mean() - 1
  np.testing.assert_allclose(routings.max_violation(load), worst, rtol=1e-5)


@pytest.mark.slow
def test_loads_of_parts_add_up():
  routing = VARIANTS["deepseek v3"]
  rows, real = jnp.asarray(logits(40, 12)), np.arange(40) < 33
  parts = [load_of(routing, rows[a:b], real[a:b]) for a, b in [(0, 9), (9, 40)]]
  total = jax.tree.map(jnp.add, *parts)
  chex.assert_trees_all_close(total, load_of(routing, rows, real), rtol=1e-5)


def test_balance_loss_is_one_where_experts_are_used_alike():
  routing = Routing(experts=4, active=1)
  even = load_of(routing, 9 * jnp.eye(4), np.ones(4, bool))
  np.testing.assert_allclose(routings.balance_loss(even), 1, rtol=1e-6)
  one = load_of(routing, 9 * jnp.eye(4)[jnp.zeros(4, int)], np.ones(4, bool))
  assert routings.balance_loss(one) > 3.9  # E times P_0, almost 1
  none = load_of(routing, jnp.eye(4), np.zeros(4, bool))
  chex.assert_tree_all_finite((routings.balance_loss(none), none))


@pytest.mark.slow
def test_the_balance_loss_pulls_the_busy_experts_scores_down():
  routing = Routing(experts=4, active=1)
  rows = jnp.asarray(logits(64, 4)).at[:, 2].add(3.0)
  real = np.ones(64, bool)

  def loss(shift):
    return routings.balance_loss(load_of(routing, rows + shift, real))

  slope = jax.grad(loss)(jnp.zeros(4))
  assert slope[2] > 0 and (np.delete(slope, 2) < 0).all()


def test_nudged_biases_balance_the_load():
  routing = Routing(experts=8, active=2, score="sigmoid", biased=True)
  # Expert e is preferred the more the larger e is.
  rows = jnp.asarray(logits(512, 8)) + 0.4 * jnp.arange(8)

  @jax.jit
  def step(bias):
    ids = routings.select_experts(routing, rows, bias)[0]
    load = routings.load(routing, rows, ids, jnp.ones(512, bool))
    return routings.update_bias(
      bias, load.counts, 0.005
    ), routings.max_violation(load)

  bias, first = step(jnp.zeros(8))
  for _ in range(200):
    bias, last = step(bias)
  assert first > 0.8 and last < 0.1
  by_hand = routings.update_bias(
    jnp.zeros(3), jnp.asarray([4.0, 1.0, 1.0]), 0.5
  )
  chex.assert_trees_all_equal(by_hand, jnp.asarray([-0.5, 0.5, 0.5]))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(experts=8, active=9), "active is 9, expected 1 to 8"),
    (dict(experts=8, active=0), "active is 0"),
    (dict(experts=8, active=2, groups=3), "3 groups do not divide 8"),
    (dict(experts=8, active=2, groups=2, active_groups=3), "active_groups"),
    (dict(experts=8, active=3, groups=4), "active is 3, expected 1 to 2"),
    (dict(experts=4, active=1, groups=4, group_score="top2"), "have one each"),
  ],
)
def test_impossible_routings_are_said(fields, message):
  with pytest.raises(UserError, match=message):
    Routing(**fields)
