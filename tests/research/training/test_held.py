"""What only rewrites change: no gradient, no moments, and every checkpoint."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from research import tree
from research.optim import optim
from research.training import aot, loop, state, step
from research.typing import UserError


def drift(after, metrics):
  """Moves what is held by one in each second step."""
  moved = jax.tree.map(lambda x: x + (after.step % 2 == 0), after.held)
  return dataclasses.replace(after, held=moved), metrics


def test_held_has_no_gradient_and_no_optimizer_state(line):
  objective, params, numbers = line
  tx = optim.adamw(1e-2)
  made = state.create(params, "w", tx, held="base")
  assert tree.count(made.frozen) == 0 and tree.count(made.held) == 1
  assert tree.count(made.opt_state) == 2 * 3 + 3
  chex.assert_trees_all_equal(made.params, params)
  kept = made.held["base"].unsafe_buffer_pointer()
  assert kept != params["base"].unsafe_buffer_pointer()
  plain = state.create(params, "w", tx)
  update = step.make_train_step(objective, tx)
  batch = next(iter(numbers()))
  one, metrics = update(made, batch, jax.random.key(0))
  two, same = update(plain, batch, jax.random.key(0))
  chex.assert_trees_all_equal((one.params, metrics), (two.params, same))


def test_held_resumes_bitwise(line, tmp_path):
  objective, params, numbers = line
  tx = optim.adamw(1e-2)

  def fit(name, steps):
    start = state.create(params, "w", tx, held="base")
    plan = loop.TrainConfig(steps=steps)
    where = tmp_path / name
    rewrites = (drift,)
    return loop.fit(
      objective, tx, start, numbers(), plan, workdir=where, rewrites=rewrites
    ).state

  whole = fit("whole", 6)
  assert whole.held["base"] == 0.5 + 3
  fit("parts", 3)
  parts = fit("parts", 6)
  chex.assert_trees_all_equal(parts.held, whole.held)


def test_adapters_may_hold_whole_numbers(line):
  """Places of a sparse one, say; what is learned may not."""
  _, params, _ = line
  tx, more = optim.adamw(1e-2), {"fixed": {"places": jnp.arange(3)}}
  made = state.create(params | more, "w", tx, held="fixed/")
  chex.assert_trees_all_equal(made.held["fixed"], more["fixed"])
  with pytest.raises(UserError, match="'places' matches fixed/places of type"):
    state.create(params | more, "places", tx)


def test_held_must_match_and_frozen_stays_refused(line):
  objective, params, numbers = line
  tx = optim.adamw(1e-2)
  with pytest.raises(UserError, match="held: 'nothing' matches none of 2"):
    state.create(params, "w", tx, held="nothing")
  start = state.create(params, "w", tx)

  def melt(after, metrics):
    other = {**after.frozen, "base": jnp.float32(0)}
    return dataclasses.replace(after, frozen=other), metrics

  update = step.make_train_step(objective, tx)
  with pytest.raises(UserError, match="`trainable` or `held`"):
    aot.lower_step(
      update, start, next(iter(numbers())), jax.random.key(0), (melt,)
    )
