"""Contrastive runs: zero-shot answers, reported by the commands."""

import dataclasses
import json

import pytest

from experiments import evaluate, train
from experiments.core import cli
from research.interop.loaded import Loaded
from research.sharding import Layout
from research.typing import UserError
from research.vlm import contrastive
from research.vlm.encoders import EncoderSizes, siglip, siglip_text
from research.vlm.images.normalise import CLIP
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.square import Square
from tests import support_plan

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


@dataclasses.dataclass(frozen=True)
class Towers:
  """A source of two towers whose images CLIP's preprocessor makes."""

  def load(self, shardings=None):
    sizes = EncoderSizes(width=8, depth=1, heads=1, hidden=8, patch=4, grid=4)
    model = contrastive.DualEncoder(
      image=siglip(sizes, head=True), text=siglip_text(sizes, vocab=9, length=5)
    )
    images = Preprocessor(Square(16, patch=4), CLIP)
    return Loaded(model, {}, None, {}, preprocessor=images)


def test_training_sees_the_pixels_that_evaluations_see():
  made = dataclasses.replace(
    support_plan.experiment(Layout(data=1)),
    model=Towers(),
    objective=contrastive.Contrastive(),
  )
  with pytest.raises(UserError, match=r"Contrastive\.normalise: found"):
    made.build()
  same = contrastive.Contrastive(normalise=CLIP)
  assert dataclasses.replace(made, objective=same).build().objective.model


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
