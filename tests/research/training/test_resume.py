"""A run that stops after any step and goes on is bitwise the whole run."""

import json

import chex
import pytest

from tests.crash import run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, run.fit(workdir, eval_every=1)


def places(workdir):
  """Returns step -> where the data stood, of the checkpoints that are kept."""
  return {
    path.parent.parent.name: json.loads(path.read_text())
    for path in (workdir / "checkpoints").glob("*/data/place.json")
  }


@pytest.mark.parametrize("stop", range(1, run.STEPS))
def test_stopping_after_any_step_changes_nothing(whole, tmp_path, stop):
  folder, expected = whole
  run.fit(tmp_path, steps=stop, eval_every=1)
  found = run.fit(tmp_path, eval_every=1)
  assert found.start == stop
  # Step, parameters, optimizer state and moving average.
  chex.assert_trees_all_equal(found.state, expected.state)
  assert found.evaluation == expected.evaluation
  assert found.best == expected.best
  # Every line, `order` among them: which tokens each step saw.
  assert run.numbers(tmp_path) == run.numbers(folder)
  assert places(tmp_path) == places(folder)


def test_the_order_tells_batches_apart(whole):
  folder, _ = whole
  seen = [x["train/order"] for x in run.numbers(folder) if "train/order" in x]
  assert len(seen) == run.STEPS == len(set(seen))
