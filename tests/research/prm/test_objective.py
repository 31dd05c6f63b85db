"""Losses of steps against loops over single traces."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from research import tree
from research.optim import optim
from research.prm.heads import LinearHead
from research.prm.model import RewardModel
from research.prm.objective import (
  PQM,
  Hard,
  StepReward,
  every_step,
  last_step,
  outcome_everywhere,
  soft,
  squared_probability,
  squared_value,
)
from research.training import state, step
from research.training.checkpoints.checkpoint import Checkpoints
from tests import support

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(3, 8)).astype(np.float32)
W = np.zeros((3, 8), np.float32)
W[0, [1, 3, 6]], W[1, [2, 7]] = 1, (0.5, 2)
LABELS = np.where(W > 0, RNG.uniform(size=W.shape), np.nan)
LABELS[0, 1], LABELS[1, 2] = 0.0, 1.0
LABELS = LABELS.astype(np.float32)
SAFE = np.where(W > 0, LABELS, 0).astype(np.float32)


def bce(z, y):
  return -(y * special.log_expit(z) + (1 - y) * special.log_expit(-z))


@pytest.mark.parametrize(
  ("loss", "one"),
  [
    (soft, bce),
    (Hard(), lambda z, y: bce(z, y > 0)),
    (Hard(threshold=0.5), lambda z, y: bce(z, y > 0.5)),
    (squared_probability, lambda z, y: (special.expit(z) - y) ** 2),
    (squared_value, lambda z, y: (z - y) ** 2),
  ],
)
def test_losses_are_weighted_sums_over_labelled_steps(loss, one):
  total, weight = loss(*map(jnp.asarray, (Z, SAFE, W)))
  want = [
    sum(W[b, t] * one(np.float64(Z[b, t]), LABELS[b, t]) for t in steps)
    for b, steps in enumerate([(1, 3, 6), (2, 7), ()])
  ]
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(weight, [3, 2.5, 0])


def pqm(q, right, margin):
  """Returns the loss of one trace: equation 10, and a start of value 0."""
  good = [0.0, *(x for x, y in zip(q, right, strict=True) if y)]
  below = sum(
    np.exp(x + margin) for x, y in zip(q, right, strict=True) if not y
  )
  terms = [
    -np.log(np.exp(x) / (sum(map(np.exp, good[: i + 1])) + below))
    for i, x in enumerate(good)
  ]
  return np.mean(terms if below else terms[1:])


@pytest.mark.slow
def test_pqm_ranks_the_steps_of_a_trace():
  traces = [[1, 1, 0, 0], [1, 1, 1], [0], [0, 1, 0, 1]]
  z = RNG.normal(size=(5, 9)).astype(np.float32)
  w, labels = np.zeros((5, 9), np.float32), np.zeros((5, 9), np.float32)
  want = []
  for b, right in enumerate(traces):
    at = np.arange(len(right)) * 2 + 1
    w[b, at], labels[b, at] = 1, right
    want.append(pqm(np.float64(z[b, at]), right, 4.0))
  arguments = [jnp.asarray(x) for x in (z, labels, w)]
  total, weight = PQM()(*arguments)
  np.testing.assert_allclose(total, [*want, 0], rtol=1e-5)
  np.testing.assert_array_equal(weight, [1, 1, 1, 1, 0])
  grad = jax.grad(lambda z: PQM()(z, *arguments[1:])[0].sum())(arguments[0])
  assert np.isfinite(grad).all() and (np.asarray(grad)[w == 0] == 0).all()


def test_outcomes_stand_at_the_last_label_of_each_text():
  segments = jnp.array([[0, 0, 0, 1, 1, 1, 1, -1]])
  w = jnp.array([[0, 1, 2.0, 0, 1, 1, 0, 0]])
  labels = jnp.array([[9, 0.1, 0.2, 9, 0.3, 0.4, 9, 9]])
  same, kept = every_step(labels, w, segments)
  np.testing.assert_array_equal(same, labels)
  np.testing.assert_array_equal(kept, w)
  _, last = last_step(labels, w, segments)
  np.testing.assert_array_equal(last, [[0, 0, 2, 0, 0, 1, 0, 0]])
  found, kept = outcome_everywhere(labels, w, segments)
  np.testing.assert_array_equal(kept, w)
  np.testing.assert_allclose(found[w > 0], [0.2, 0.2, 0.4, 0.4])


MODEL = RewardModel(
  backbone=support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=11),
  head=LinearHead(),
)


def traces(rows=8, length=8):
  """Returns random texts: a step is right if its last token is even."""
  tokens = support.tokens(rows, length, 11)
  w = (jnp.arange(length) % 3 == 2).astype(jnp.float32)
  place = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  right = (tokens % 2 == 0).astype(jnp.float32)
  return {
    "tokens": tokens,
    "positions": place,
    "segments": jnp.zeros_like(tokens),
    "labels": jnp.where(w > 0, right, jnp.nan),
    "weights": jnp.broadcast_to(w, tokens.shape),
  }


@pytest.mark.slow
def test_eight_traces_are_learned_and_read_where_they_were_labelled():
  """Spec 6.2: labels and scores are of one position; an off-by-one fails."""
  batch, params = traces(), MODEL.init(jax.random.key(0))
  goal, tx = StepReward(model=MODEL), optim.adamw(0.02)
  update = step.make_train_step(goal, tx)

  @jax.jit
  def train(now):
    def one(now, _):
      return update(now, batch, jax.random.key(0))

    return jax.lax.scan(one, now, length=60)

  now, metrics = train(state.create(params, ".", tx))
  assert float(metrics["accuracy"][-1]) == 1 > float(metrics["accuracy"][0])
  assert float(metrics["label"][0]) == pytest.approx(
    np.nanmean(batch["labels"]), abs=1e-6
  )
  at = jnp.tile(jnp.array([2, 5, -1]), (8, 1))
  found = np.asarray(MODEL.scores(now.params, batch["tokens"], at))
  assert np.isnan(found[:, 2]).all()
  right = np.asarray(batch["labels"])[:, [2, 5]] > 0.5
  assert found[:, :2][right].min() > found[:, :2][~right].max()


@pytest.mark.slow
def test_a_step_weighs_the_same_in_any_microbatch():
  """Normalised by the whole batch: uneven rows add up exactly."""
  batch = traces()
  w = batch["weights"].at[:3].set(0).at[3, 5].set(0)
  batch |= {"weights": w}
  params, tx = MODEL.init(jax.random.key(0)), optax.sgd(1.0)
  found = []
  for parts in (1, 4):
    update = jax.jit(step.make_train_step(StepReward(model=MODEL), tx, parts))
    now, metrics = update(
      state.create(params, ".", tx), batch, jax.random.key(0)
    )
    found.append((now.trainable, metrics["loss"]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *found)


def test_a_probe_trains_and_saves_the_head_alone(tmp_path):
  params, tx = MODEL.init(jax.random.key(0)), optim.adamw(0.02)
  now = state.create(params, "^score/", tx)
  update = jax.jit(step.make_train_step(StepReward(model=MODEL), tx))
  after, _ = update(now, traces(), jax.random.key(0))
  paths = [path for path, _ in tree.flatten_paths(after.trainable)]
  assert paths == ["score/out", "score/out_bias"]
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(after)
    found = checkpoints.restore(now)
  chex.assert_trees_all_equal(found.params, after.params)
  gap = abs(found.params["score"]["out"] - params["score"]["out"]).max()
  assert float(gap) > 1e-3
  np.testing.assert_array_equal(found.params["embed"], params["embed"])
