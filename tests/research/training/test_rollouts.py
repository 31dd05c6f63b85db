"""Runs whose batches depend on their parameters resume bitwise, at any step."""

import dataclasses
import json

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.training import loop, rollouts, state
from research.training.reports import metrics
from research.training.rollouts import OnPolicy, Round
from research.typing import UserError
from tests.research.training.conftest import (
  Line,
  Numbers,
  Positioned,
  line_batch,
)

STEPS = 6


@dataclasses.dataclass
class Guesses:
  """Batches around what the parameters say: any other policy has others."""

  updates: int = 1
  calls: list = dataclasses.field(default_factory=list)

  def sample_round(self, params, step):
    self.calls.append(step)
    found = [line_batch(7 * step + i) for i in range(self.updates)]
    own = {k: np.stack([x[k] for x in found]) for k in ("x", "y")}
    own["y"] += np.asarray(params["w"]).sum() * np.float32(0.1)
    common = {"weights": found[0]["weights"], "marked": np.arange(8) > step}
    return Round(common, own, {"mean": float(own["y"].mean())})


def fit(workdir, updates, steps=STEPS, **more):
  tx = optax.adam(0.1)
  params = {"w": jnp.zeros(3), "base": jnp.float32(0.5)}
  source = Guesses(updates)
  config = loop.TrainConfig(steps=steps, **more)
  made = state.create(params, "w", tx)
  return loop.fit(Line(), tx, made, source, config, workdir=workdir), source


def numbers(workdir):
  """Returns the training metrics of each step, but for times."""
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  names = ("loss", "grad_norm", "error", "mean", "weight")
  return [
    {name: r[f"train/{name}"] for name in names}
    for r in records
    if "train/loss" in r
  ]


@pytest.mark.parametrize(
  "updates",
  [
    pytest.param(1, marks=pytest.mark.slow),
    2,
    pytest.param(4, marks=pytest.mark.slow),
  ],
)
def test_three_steps_and_three_are_six(updates, tmp_path):
  """In the middle of a round the checkpoint has what is left of it."""
  whole, source = fit(tmp_path / "whole", updates)
  assert source.calls == list(range(0, STEPS, updates))
  fit(tmp_path / "parts", updates, steps=3)
  found, source = fit(tmp_path / "parts", updates)
  assert found.start == 3
  chex.assert_trees_all_equal(found.state, whole.state)
  assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
  # Nothing is sampled again from parameters that are gone.
  assert source.calls == [s for s in range(3, STEPS) if s % updates == 0]
  place = tmp_path / "parts" / "checkpoints" / "3" / "data" / "place.json"
  position = json.loads(place.read_text())
  assert position["step"] == 3
  assert (position["round"] is None) == (3 % updates == 0)


@pytest.mark.slow
def test_another_policy_has_other_data(tmp_path):
  """The test above can fail: data of the first parameters end elsewhere."""
  whole, _ = fit(tmp_path / "whole", 1)
  source = Guesses()
  source.sample_round = lambda params, step: Guesses.sample_round(
    source, {"w": np.zeros(3)}, step
  )
  tx = optax.adam(0.1)
  made = state.create({"w": jnp.zeros(3), "base": jnp.float32(0.5)}, "w", tx)
  other = loop.fit(
    Line(), tx, made, source, loop.TrainConfig(steps=STEPS), workdir=tmp_path
  )
  gap = other.state.trainable["w"] - whole.state.trainable["w"]
  assert float(abs(gap).max()) > 1e-3


def test_a_round_of_another_length_is_no_round_of_this_run(tmp_path):
  fit(tmp_path, 1, steps=3)
  with pytest.raises(UserError, match="update 3 is 1 after its round began"):
    fit(tmp_path, 2)


def test_positions_come_back_with_all_their_arrays(tmp_path):
  source = OnPolicy(Guesses(2), None)
  made = state.create({"w": jnp.zeros(3)}, ".", optax.sgd(0.1))
  [first] = source.shapes(made)
  taken = source.next(made, 0)
  for name, value in first.items():
    np.testing.assert_array_equal(taken[name], value)
  other = OnPolicy(Guesses(2), None)
  other.set_state(json.loads(json.dumps(source.get_state())))
  ours, theirs = source.next(made, 1), other.next(made, 1)
  assert ours.keys() == theirs.keys() == {"x", "y", "weights", "marked"}
  for name, value in ours.items():
    np.testing.assert_array_equal(theirs[name], value)
    assert theirs[name].dtype == value.dtype
  assert dict(other.metrics) == dict(source.metrics)
  assert other.get_state() == {"step": 2, "round": None}


def test_mistakes():
  with pytest.raises(UserError, match="Guesses.updates: found 0, expected"):
    OnPolicy(Guesses(0), None)
  with pytest.raises(UserError, match="x is float64, expected one of bool"):
    rollouts._encode("x", np.zeros(2))


@pytest.mark.parametrize(
  "made",
  [Numbers, lambda: iter(Numbers()), lambda: iter(Positioned())],
  ids=["iterable", "iterator", "iterator with a position"],
)
def test_no_batch_of_data_is_lost_to_find_its_shape(made):
  stream = rollouts.batch_source(made(), None)
  start = state.TrainState(0, None, None, None)
  [shape] = stream.shapes(start)
  for number in (1, 2):
    batch = stream.next(start, number)
    chex.assert_trees_all_equal(batch, line_batch(number))
    chex.assert_trees_all_equal_shapes(batch, shape)
