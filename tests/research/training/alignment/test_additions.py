"""The run file of GRPO from scratch, stopped and gone on with."""

import chex
import numpy as np
import pytest

from experiments.core import config, train_eval
from research.interop import load
from research.training.alignment.additions import Additions
from research.training.checkpoints.workdir import claim_workdir
from research.training.reports import metrics

SMALL = ["PROMPTS=2", "GROUP=4", "rewarded_task.GreedyReward.count=8"]


def run(workdir, steps, *bindings):
  read = config.read(
    "runs/search/grpo_additions.gin", [*SMALL, f"STEPS={steps}", *bindings]
  )
  folder = claim_workdir(workdir, read.text)
  return train_eval.train(read.experiment, folder)


@pytest.mark.slow
def test_three_steps_and_three_are_six(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  result = run(whole, 6)
  run(parts, 3)
  again = run(parts, 6)
  assert result["answers"] == again["answers"]
  assert result["answers"]["count"] == 8
  names = "train/loss", "train/reward", "train/divergence", "train/grad_norm"
  steps = [
    [
      [record[name] for name in names]
      for record in metrics.read_jsonl(folder / "metrics.jsonl")
      if names[0] in record
    ]
    for folder in (whole, parts)
  ]
  assert steps[0] == steps[1] and len(steps[0]) == 6
  found = []
  for folder in (whole, parts):
    loaded = load.load_model(folder)
    found.append(loaded.params)
  chex.assert_trees_all_equal(*found)


def test_a_sum_is_judged_exactly_and_splits_are_apart():
  task = Additions()
  prompt = task.prompt(7, 5)
  assert task.reward(prompt, [12, task.end]) == 1
  for wrong in ([12], [12, 12], [11, task.end], [], [task.end, 12]):
    assert task.reward(prompt, wrong) == 0
  splits = [
    {
      p.problem
      for p in Additions(split=split).sample(np.random.default_rng(0), 5000)
    }
    for split in ("train", "heldout")
  ]
  assert not splits[0] & splits[1] and len(splits[0] | splits[1]) == 100
  assert 10 <= len(splits[1]) <= 20
