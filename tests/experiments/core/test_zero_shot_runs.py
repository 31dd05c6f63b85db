"""Contrastive runs: zero-shot answers, reported by the commands."""

import json

import pytest

from experiments import evaluate, train
from experiments.core import cli

SMALL = (
  *("WIDTH=16", "DEPTH=1", "HEADS=2", "HIDDEN=16", "VOCAB=350"),
  *("PATCH=16", "GRID=2", "BATCH=4", "HELDOUT_SAMPLES=12", "TEXT_SAMPLES=40"),
  *("STEPS=2", "WARMUP=1"),
)
FLAGS = [
  "--config=runs/vlm/contrastive_digits.gin",
  *[f"--set={x}" for x in SMALL],
]
pytest.importorskip("sklearn")


def evaluated(capsys, *flags):
  """Returns the command's report of answers, and what it says."""
  capsys.readouterr()
  assert cli.call(evaluate.main, ["evaluate", *flags]) == 0
  said = capsys.readouterr()
  return json.loads(said.out.splitlines()[-1])["answers"], said.err


@pytest.mark.slow
def test_names_of_digits_are_reported_beside_chance(capsys):
  found, said = evaluated(capsys, *FLAGS)
  systems = found["caption"]["systems"]
  assert {*systems} == {"real", "blind", "shuffled", "majority", "chance"}
  assert systems["chance"]["score"] == pytest.approx(0.1)
  assert systems["real"]["n"] == 12
  assert list(found["classes"].values()) == [10]
  assert len(found["templates"]) == 4
  assert "one template alone" in said


@pytest.mark.slow
def test_training_reports_what_the_command_does_after_it(tmp_path, capsys):
  folder = tmp_path / "run"
  assert cli.call(train.main, ["train", f"--workdir={folder}", *FLAGS]) == 0
  trained = json.loads((folder / "result.json").read_text())["answers"]
  again, _ = evaluated(capsys, f"--workdir={folder}")
  assert again == trained
