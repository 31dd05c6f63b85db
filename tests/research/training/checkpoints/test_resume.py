"""A run that resumes after every step is bitwise the uninterrupted run."""

import json

import chex
import pytest

from research.training.checkpoints.checkpoint import Checkpoints
from tests.crash import run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, run.fit(workdir, eval_every=1, keep=run.STEPS)


def place(workdir, step):
  path = workdir / "checkpoints" / str(step) / "data" / "place.json"
  return json.loads(path.read_text())


@pytest.mark.slow
def test_stopping_after_every_step_changes_nothing(whole, tmp_path):
  folder, expected = whole
  with Checkpoints(folder / "checkpoints") as checkpoints:
    states = {
      step: checkpoints.restore(expected.state, step=step)
      for step in checkpoints.steps
    }
  assert list(states) == list(range(1, run.STEPS + 1))
  for step in states:
    found = run.fit(tmp_path, steps=step, eval_every=1)
    assert found.start == step - 1
    # Step, parameters, optimizer state and moving average.
    chex.assert_trees_all_equal(found.state, states[step])
    # Every line so far, `order` among them: which tokens each step saw.
    lines = [x for x in run.numbers(folder) if x["step"] <= step]
    assert run.numbers(tmp_path) == lines
    assert place(tmp_path, step) == place(folder, step)
  assert found.evaluation == expected.evaluation
  assert found.best == expected.best


@pytest.mark.slow
def test_the_order_tells_batches_apart(whole):
  folder, _ = whole
  seen = [x["train/order"] for x in run.numbers(folder) if "train/order" in x]
  assert len(seen) == run.STEPS == len(set(seen))
