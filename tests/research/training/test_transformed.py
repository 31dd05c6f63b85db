"""`transformed` parameters: no gradient, no moments, in every checkpoint."""

import dataclasses
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from research import tree
from research.optim import optim
from research.training import aot, loop, state, step
from research.training.checkpoints.checkpoint import Checkpoints
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
BEFORE = GOLDEN / "before_transformed"


def drift(after, metrics):
  """Adds one to the transformed parameters in every second step."""
  moved = jax.tree.map(lambda x: x + (after.step % 2 == 0), after.transformed)
  return dataclasses.replace(after, transformed=moved), metrics


def test_they_have_no_gradient_and_no_optimizer_state(line):
  objective, params, numbers = line
  tx = optim.adamw(1e-2)
  made = state.create(params, "w", tx, transformed="base")
  assert tree.count(made.frozen) == 0 and tree.count(made.transformed) == 1
  assert tree.count(made.opt_state) == 2 * 3 + 3
  chex.assert_trees_all_equal(made.params, params)
  kept = made.transformed["base"].unsafe_buffer_pointer()
  assert kept != params["base"].unsafe_buffer_pointer()
  plain = state.create(params, "w", tx)
  update = step.make_train_step(objective, tx)
  batch = next(iter(numbers()))
  one, metrics = update(made, batch, jax.random.key(0))
  two, same = update(plain, batch, jax.random.key(0))
  chex.assert_trees_all_equal((one.params, metrics), (two.params, same))


@pytest.mark.slow
def test_they_resume_bitwise(line, tmp_path):
  objective, params, numbers = line
  tx = optim.adamw(1e-2)

  def fit(name, steps):
    start = state.create(params, "w", tx, transformed="base")
    plan = loop.TrainConfig(steps=steps)
    where = tmp_path / name
    return loop.fit(
      objective,
      tx,
      start,
      numbers(),
      plan,
      workdir=where,
      state_transforms=(drift,),
    ).state

  whole = fit("whole", 6)
  assert whole.transformed["base"] == 0.5 + 3
  fit("parts", 3)
  parts = fit("parts", 6)
  chex.assert_trees_all_equal(parts.transformed, whole.transformed)


def test_they_may_be_whole_numbers(line):
  """For example sparse indices; trained arrays may not be integers."""
  _, params, _ = line
  tx, more = optim.adamw(1e-2), {"fixed": {"places": jnp.arange(3)}}
  made = state.create(params | more, "w", tx, transformed="fixed/")
  chex.assert_trees_all_equal(made.transformed["fixed"], more["fixed"])
  with pytest.raises(UserError, match="'places' matches fixed/places of type"):
    state.create(params | more, "places", tx)


def test_they_must_match_and_frozen_stays_refused(line):
  objective, params, numbers = line
  tx = optim.adamw(1e-2)
  with pytest.raises(
    UserError, match="transformed: 'nothing' matches none of 2"
  ):
    state.create(params, "w", tx, transformed="nothing")
  start = state.create(params, "w", tx)

  def melt(after, metrics):
    other = {**after.frozen, "base": jnp.float32(0)}
    return dataclasses.replace(after, frozen=other), metrics

  update = step.make_train_step(objective, tx)
  with pytest.raises(UserError, match="`trainable` or `transformed`"):
    aot.lower_step(
      update, start, next(iter(numbers())), jax.random.key(0), (melt,)
    )


def test_a_checkpoint_that_calls_them_held_is_restored(tmp_path):
  """Written by the commit before they got their name of today.

  It is of `state.create(params, "w", optax.adam(0.1), held="base")`, at step 0.
  """
  params = {"w": jnp.arange(3.0), "base": jnp.full(2, 0.5)}
  params["frozen"] = jnp.ones(1)
  want = state.create(params, "w", optax.adam(0.1), transformed="base")
  other = jax.tree.map(lambda x: x + 1, want)
  folder = shutil.copytree(BEFORE, tmp_path / "checkpoints")
  with Checkpoints(folder) as kept:
    found = kept.restore(other)
    chex.assert_trees_all_equal(
      found, dataclasses.replace(want, frozen=other.frozen)
    )
    kept.save(dataclasses.replace(found, step=jnp.int32(1)))
    again = kept.restore(other)
  chex.assert_trees_all_equal(again.transformed, want.transformed)
  assert "held" not in (folder / "1/state/_METADATA").read_text()
