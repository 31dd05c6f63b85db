"""Training an experiment uses all of its fields."""

import dataclasses

import jax.numpy as jnp

from experiments.core import config, train_eval
from research.training.checkpoints.workdir import claim_workdir
from research.training.reports import metrics
from tests.experiments.core import test_from_scratch


def _mark(state, values):
  return state, values | {"marked": jnp.float32(7)}


def test_state_transforms_run_after_each_step(tmp_path):
  bindings = [*test_from_scratch.SMALL, "STEPS=3"]
  read = config.read("runs/pretrain_tiny.gin", bindings)
  experiment = dataclasses.replace(
    read.experiment, state_transforms=(_mark,), validation=None, heldout=None
  )
  workdir = claim_workdir(tmp_path / "run", read.text)
  train_eval.train(experiment, workdir)
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  marked = [r["train/marked"] for r in records if "train/loss" in r]
  assert marked == [7.0, 7.0, 7.0]
