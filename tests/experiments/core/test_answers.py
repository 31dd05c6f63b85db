"""Answers of a run: reported alike by training and by the command after it."""

import json

import pytest

from experiments import evaluate, train
from experiments.core import cli

SMALL = (
  *("WIDTH=16", "DEPTH=1", "HEADS=2", "HEAD_DIM=8", "HIDDEN=16"),
  *("PATCH=16", "GRID=2", "BATCH=4", "HELDOUT_SAMPLES=9"),
  *("pretrain/STEPS=2", "finetune/STEPS=2", "WARMUP=1"),
)


FLAGS = ["--config=runs/vlm/shapes.gin", *[f"--set={x}" for x in SMALL]]


def evaluated(capsys, *flags):
  """Returns what the command ends with, and what it says."""
  capsys.readouterr()
  assert cli.call(evaluate.main, ["evaluate", *flags]) == 0
  said = capsys.readouterr()
  return json.loads(said.out.splitlines()[-1]), said.err


@pytest.mark.slow
def test_answers_are_reported_beside_their_baselines(capsys):
  result, said = evaluated(capsys, *FLAGS)
  found = result["answers"]
  assert set(found) >= {"all", "count", "exists", "colour"}
  assert set(found["exists"]["systems"]) >= {
    *("real", "blind", "shuffled", "majority", "both somewhere")
  }
  real = found["count"]["systems"]["real"]
  assert real["n"] == 3 and 0 <= real["low"] <= real["score"] <= real["high"]
  assert "blind  shuffled  majority" in said
  assert result["heldout/loss"] > 0


@pytest.mark.slow
def test_training_reports_what_the_command_does_after_it(tmp_path, capsys):
  folder = tmp_path / "run"
  assert cli.call(train.main, ["train", f"--workdir={folder}", *FLAGS]) == 0
  trained = json.loads((folder / "result.json").read_text())["answers"]
  again, _ = evaluated(capsys, f"--workdir={folder}")
  assert again["answers"] == trained
