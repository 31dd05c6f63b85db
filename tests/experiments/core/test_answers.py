"""Answers of a run: reported alike by training and by the command after it."""

import json

import pytest

from experiments import evaluate, train
from experiments.core import cli

SMALL = (
  *("WIDTH=16", "DEPTH=1", "HEADS=2", "HEAD_DIM=8", "HIDDEN=16"),
  *("PATCH=16", "GRID=4", "LENGTH=48", "BATCH=4", "HELDOUT_SAMPLES=9"),
  *("STEPS=2", "WARMUP=1"),
)


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
  """Returns a run's folder after its two steps."""
  folder = tmp_path_factory.mktemp("answers") / "run"
  flags = ["--config=runs/vlm/shapes.gin", f"--workdir={folder}"]
  flags += [f"--set={x}" for x in SMALL]
  assert cli.call(train.main, ["train", *flags]) == 0
  return folder


def test_both_commands_report_the_same_answers(run, capsys):
  trained = json.loads((run / "result.json").read_text())["answers"]
  assert set(trained) >= {"all", "count", "exists", "colour"}
  assert set(trained["exists"]["systems"]) >= {
    *("real", "blind", "shuffled", "majority", "both somewhere")
  }
  real = trained["count"]["systems"]["real"]
  assert real["n"] == 3 and 0 <= real["low"] <= real["score"] <= real["high"]
  capsys.readouterr()
  assert cli.call(evaluate.main, ["evaluate", f"--workdir={run}"]) == 0
  said = capsys.readouterr()
  assert json.loads(said.out.splitlines()[-1])["answers"] == trained
  assert "blind  shuffled  majority" in said.err
