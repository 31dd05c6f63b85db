"""Training an experiment uses all of its fields."""

import dataclasses
import json
import math

import chex
import jax.numpy as jnp
import pytest

from experiments import evaluate, train
from experiments.core import cli, config, train_eval
from experiments.core.experiment import Experiment
from experiments.stages import running, staged
from research.io.folders import folder
from research.training.checkpoints.workdir import claim_workdir
from research.training.reports import metrics
from research.typing import UserError
from tests.experiments.core import test_from_scratch


def _mark(state, values):
  return state, values | {"marked": jnp.float32(7)}


class _Report:
  """What a model's answers are worth."""

  def __str__(self):
    return "a table"

  def to_json(self):
    return {"right": 0.5, "worst": math.inf}


def test_state_transforms_run_and_the_trained_model_answers(tmp_path, capsys):
  """Transforms after each step; answers of the weights after the last."""
  bindings = [*test_from_scratch.SMALL, "STEPS=3"]
  read = config.read("runs/pretrain_tiny.gin", bindings)
  asked = []

  def answers(loaded):
    asked.append(loaded.params)
    return _Report()

  experiment = dataclasses.replace(
    read.experiment,
    state_transforms=(_mark,),
    validation=None,
    heldout=None,
    answers=answers,
  )
  workdir = claim_workdir(tmp_path / "run", read.text)
  result = train_eval.train(experiment, workdir)
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  marked = [r["train/marked"] for r in records if "train/loss" in r]
  assert marked == [7.0, 7.0, 7.0]
  assert result["answers"] == {"right": 0.5, "worst": math.inf}
  # JSON has no infinity.
  text = (workdir / "result.json").read_text()
  written = json.loads(text, parse_constant=pytest.fail)
  assert written["answers"] == {"right": 0.5, "worst": None}
  assert "a table" in capsys.readouterr().err
  built = experiment.build()
  _, trained = train_eval.restore_checkpoint(experiment, built, workdir)
  chex.assert_trees_all_equal(*asked, trained.params)
  # Trained weights on top of others than they were trained with are said so.
  words = "frozen weights came from"
  assert words not in capsys.readouterr().err
  note = workdir / "checkpoints" / "base.json"
  other = json.loads(note.read_text()) | {"fingerprint": "of others"}
  note.write_text(json.dumps(other))
  train_eval.restore_checkpoint(experiment, built, workdir)
  assert words in capsys.readouterr().err


CHAT = [{"role": "user"}, {"role": "assistant", "content": "x"}]
ASKED = {"images": ["a.png"], "question": "q", "answer": "a"}
BAD_FILES = [
  ("data/chat", {"messages": CHAT}, ":1: message 0 (user): content: found"),
  ("data/text", {}, "is absent: cannot be read"),
  ("data/text_jsonl", {"txt": "a"}, ":1: field 'text': found none among txt"),
  ("data/completions", {"prompt": "a"}, ":1: field 'completion': found none"),
  ("data/preferences", {"prompt": "a", "chosen": "b"}, "field 'rejected'"),
  ("data/images", ASKED, ":1: "),
  ("data/images", ASKED | {"question": 1}, ":1: field 'question': found int"),
  ("data/images", ASKED | {"images": "a.png"}, "expected a list of paths"),
  ("prm/chain_sum_probe_smollm2", {"prompt": "q"}, ":1: field 'step_labels'"),
]


@pytest.mark.parametrize(("run", "record", "words"), BAD_FILES)
def test_data_are_checked_before_a_model_is_loaded(
  tmp_path, capsys, monkeypatch, run, record, words
):
  """Loading fails here as no error of a user does."""
  monkeypatch.setattr(Experiment, "build", lambda *_: pytest.fail("loaded"))
  path, workdir = tmp_path / "data.jsonl", tmp_path / "run"
  path.write_text(json.dumps(record) + "\n")
  path = path if record else tmp_path / "is absent"
  name = "LABELS" if run.startswith("prm") else "FILES"
  flags = [f"--config=runs/{run}.gin", f"--set={name}={path}"]
  flags += [f"--set=FOLDER={tmp_path}"] * (run == "data/images")
  flags += [f"--set=TEST={path}"] * (name == "LABELS")
  assert cli.call(train.main, ["", f"--workdir={workdir}", *flags]) == 1
  said = capsys.readouterr().err
  assert said.startswith(f"error: {path.parent}") and words in said
  assert "split" not in said and len(said.splitlines()) <= 3
  assert not (workdir / "parameters.txt").exists()
  # Of labelled steps it reads TEST, which does not exist.
  assert cli.call(evaluate.main, ["", *flags]) == 1


def test_files_of_later_stages_are_checked_before_the_first(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(train_eval, "train", lambda *_: pytest.fail("trained"))
  text = config.read("runs/data/text.gin", [f"FILES={tmp_path / 'no.txt'}"])
  fine = config.read("runs/quickstart.gin", [])
  stages = {"one": fine.experiment, "two": text.experiment}
  run = staged.Staged(stages=stages, texts={"one": "", "two": ""})
  with pytest.raises(UserError, match=r"no.txt: cannot be read"):
    running.train(run, folder(tmp_path))


@pytest.mark.parametrize(
  ("loss", "value"),
  [(0.0, 1.0), (700.0, math.exp(700)), (710.0, math.inf), (5e4, math.inf)],
)
def test_a_run_that_diverged_has_a_perplexity(loss, value):
  """Python's exp raises OverflowError from 710 nats on."""
  assert train_eval.perplexity(loss) == value


def test_a_loss_that_is_not_a_number_stays_one():
  assert math.isnan(train_eval.perplexity(math.nan))
