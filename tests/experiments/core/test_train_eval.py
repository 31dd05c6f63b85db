"""Training an experiment uses all of its fields."""

import dataclasses

import chex
import jax.numpy as jnp

from experiments.core import config, train_eval
from research.training.checkpoints.workdir import claim_workdir
from research.training.reports import metrics
from tests.experiments.core import test_from_scratch


def _mark(state, values):
  return state, values | {"marked": jnp.float32(7)}


class _Report:
  """What a model's answers are worth."""

  def __str__(self):
    return "a table"

  def to_json(self):
    return {"right": 0.5}


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
  assert result["answers"] == {"right": 0.5}
  assert "a table" in capsys.readouterr().err
  built = experiment.build()
  _, trained = train_eval.restore_checkpoint(experiment, built, workdir)
  chex.assert_trees_all_equal(*asked, trained.params)
