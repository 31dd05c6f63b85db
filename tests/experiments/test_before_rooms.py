"""A run from before modules moved goes on as if nothing had happened.

`tests/golden/before_rooms` is what `experiments.train` left of
`tests/multiprocess/tiny.gin` with `SAVE_EVERY=4`, eight steps of which the last
checkpoint is kept, in the commit before the first move.
"""

import json
import pathlib
import shutil

import pytest

from experiments import train
from experiments.core import cli, config
from research.training.checkpoints.workdir import claim_workdir
from research.training.reports import metrics
from research.typing import UserError

BEFORE = pathlib.Path(__file__).parents[1] / "golden" / "before_rooms"


@pytest.fixture
def workdir(tmp_path):
  return shutil.copytree(BEFORE, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_is_resumed_from_its_checkpoint(workdir):
  """By its workdir alone, which has its configuration."""
  done = json.loads((workdir / "result.json").read_text())["steps"]
  command = ["train", f"--workdir={workdir}", f"--set=STEPS={done + 4}"]
  assert cli.call(train.main, command) == 0
  found = metrics.read_jsonl(workdir / "metrics.jsonl")
  losses = {r["step"]: r["train/loss"] for r in found if "train/loss" in r}
  assert sorted(losses) == list(range(1, done + 5))
  assert losses[done + 1] < losses[1] - 0.3


def test_it_is_resumed_by_the_run_file_of_today(workdir):
  """Whose imports have other names, and so have its bindings."""
  run = pathlib.Path(__file__).parents[1] / "multiprocess" / "tiny.gin"
  read = config.read(str(run), ["SAVE_EVERY=4"])
  assert "from_scratch.FromScratch.sizes" in read.text
  assert "fresh.Fresh.sizes" in (workdir / "config.gin").read_text()
  assert claim_workdir(workdir, read.text) == workdir


def test_another_experiment_is_refused_as_ever(workdir):
  read = config.read(str(workdir / "config.gin"), ["LEARNING_RATE=0.5"])
  with pytest.raises(UserError, match="holds another experiment"):
    claim_workdir(workdir, read.text)


def test_a_file_that_includes_one_of_before_is_told_what_to_say(tmp_path):
  inner = tmp_path / "inner.gin"
  inner.write_text(
    "from __gin__ import dynamic_registration\n"
    "from research.training import optim\n"
  )
  outer = tmp_path / "outer.gin"
  outer.write_text(
    f"from __gin__ import dynamic_registration\ninclude '{inner}'\n"
  )
  with pytest.raises(UserError, match="optim is now research.optim.optim"):
    config.read(str(outer))
