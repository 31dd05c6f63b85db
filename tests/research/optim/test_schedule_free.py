"""Schedule-free AdamW against the paper's three sequences, and a run's end."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.optim import optim, schedule_free
from research.training import loop, state
from research.typing import UserError


def by_hand(params, grads, rates, b1, b2, eps, decay):
  """Algorithm 1 of the paper, in float64; gradients are given."""
  x = y = z = params
  v, total, top = 0.0, 0.0, 0.0
  for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
    v = b2 * v + (1 - b2) * g**2
    z = z - rate * (g / (np.sqrt(v / (1 - b2**t)) + eps) + decay * y)
    top = max(top, rate)
    total += top**2
    share = top**2 / total
    x = (1 - share) * x + share * z
    y = b1 * x + (1 - b1) * z
  return x, y


def test_the_average_is_the_papers():
  rng = np.random.default_rng(0)
  start = rng.normal(size=5)
  grads = rng.normal(size=(6, 5))
  rates = [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]
  tx = schedule_free.adamw(
    optim.constant(0.1, warmup=2), b2=0.9, weight_decay=0.2, clip=None
  )
  params = {"w": jnp.float32(start)}
  held, update = tx.init(params), jax.jit(tx.update)
  for g in grads:
    updates, held = update({"w": jnp.float32(g)}, held, params)
    params = optax.apply_updates(params, updates)
  x, y = by_hand(start, grads, rates, 0.9, 0.9, 1e-8, 0.2)
  np.testing.assert_allclose(params["w"], y, atol=1e-6)
  found = schedule_free.averages((None, held), params)
  np.testing.assert_allclose(found["w"], x, atol=1e-6)
  rate = optax.tree.get(held, "learning_rate")
  np.testing.assert_allclose(rate, 0.1)


def test_a_run_ends_at_its_average(line, tmp_path):
  objective, params, numbers = line
  tx = schedule_free.adamw(0.1)

  def fit(name, *rewrites):
    start = state.create(params, "w", tx)
    return loop.fit(
      objective,
      tx,
      start,
      numbers(),
      loop.TrainConfig(steps=5),
      workdir=tmp_path / name,
      state_transforms=rewrites,
    ).state

  ended, plain = fit("ended", schedule_free.finish(5)), fit("plain")
  x = schedule_free.averages(plain.opt_state, plain.trainable)
  chex.assert_trees_all_close(ended.trainable, x, rtol=1e-6)
  assert (np.abs(ended.trainable["w"] - plain.trainable["w"]) > 1e-4).all()
  # Where x, y and z agree, a longer run goes on from there.
  chex.assert_trees_all_close(
    schedule_free.averages(ended.opt_state, ended.trainable),
    ended.trainable,
    rtol=1e-6,
  )


def test_other_optimizers_have_no_average(line):
  _, params, _ = line
  made = state.create(params, "w", optax.adam(0.1))
  with pytest.raises(UserError, match="keeps no average"):
    schedule_free.finish(3)(made, {})
