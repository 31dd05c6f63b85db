"""From a policy to labelled steps to a reward model, by the commands' parts.

Tiny: two numbers, a few steps of training.
"""

import json

import pytest

from experiments.core import config, train_eval
from experiments.labelling import label_run
from research.interop import rewards
from research.prm import formats, judge
from research.reasoning.tasks import Countdown
from research.training.checkpoints.workdir import claim_workdir
from research.typing import UserError

SMALL = ["NUMBERS=3", "VALUES=(1, 4)", "WARMUP=1", "BATCH=16"]
LABELS = ["NUMBERS=3", "VALUES=(1, 4)", "LAST=16", "COPIES=2"]
LABELS += ["label_run.LabelRun.rows=32"]


def run(path, workdir, bindings):
  read = config.read(path, bindings)
  return train_eval.train(read.experiment, claim_workdir(workdir, read.text))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("ladder") / "policy"
  sizes = ["WIDTH=16", "HELDOUT=16", "SAMPLES=1", "PROBLEMS=64", "STEPS=40"]
  return workdir, run(
    "runs/search/countdown_policy.gin", workdir, [*SMALL, *sizes]
  )


def labels(workdir, *bindings):
  read = config.read(
    "runs/prm/countdown_labels.gin",
    [*LABELS, f"POLICY={workdir}", *bindings],
    root=label_run.LabelRun,
  )
  return read.experiment.run(lambda text: None)


def test_a_policy_becomes_labels_and_these_a_reward_model(policy, tmp_path):
  workdir, result = policy
  assert set(result["answers"]) == {"greedy", "sampled", "count", "samples"}
  assert result["validation/loss"] < 5.34  # log 208: it has learned
  made, cut = labels(workdir, "ROLLOUTS=2")
  assert len(made) + cut == 32
  assert made
  task = Countdown(numbers=3, values=(1, 4), count=200000)
  for one in made:
    assert one.mc is not None
    assert one.labels[0] in (0, 1)
    assert one.prompt in {problem.prompt for problem in task[:16]}
  file = tmp_path / "labels.jsonl"
  formats.write(str(file), made, formats.FORMATS["native"])
  again = formats.read(str(file), formats.FORMATS["native"])
  assert again == made
  settings = [f"POLICY={workdir}", f"LABELS={file}", f"TEST={file}"]
  settings += ["STEPS=2", "WARMUP=1", "BATCH=16", "LENGTH=40"]
  prm = tmp_path / "prm"
  result = run("runs/prm/countdown_prm.gin", prm, settings)
  names = {"f1", "accuracy_error", "accuracy_correct", "auc", "threshold"}
  assert names <= set(result)
  assert json.loads((prm / "result.json").read_text())["f1"] == result["f1"]
  loaded = rewards.PretrainedReward(name=str(prm)).load()
  found = judge.score_solutions(
    loaded.model, loaded.params, loaded.tokenizer, made, batch_size=16
  )
  assert judge.evaluate_steps(made, found).auc == pytest.approx(result["auc"])


def test_solutions_come_from_a_pool(policy, tmp_path):
  workdir, _ = policy
  task = Countdown(numbers=3, values=(1, 4), count=200000)
  problem = task[0]
  step = {"text": task.oracle(problem)}
  pool = tmp_path / "pool.jsonl"
  line = {
    "problem": problem.to_json(),
    "samples": [
      {
        "trace": {
          "problem_id": problem.id,
          "steps": [step],
          "finish": finish,
        },
        "verdict": {"correct": False},
      }
      for finish in ("eos", "length")
    ],
  }
  pool.write_text(json.dumps(line) + "\n")
  made, cut = labels(workdir, f"label_run.LabelRun.pool={pool}")
  assert (len(made), cut) == (1, 1)
  assert made[0].steps == (step["text"],)
  pool.write_text(json.dumps(line | {"samples": 3}) + "\n")
  with pytest.raises(UserError, match=r"pool.jsonl:1.*samples"):
    labels(workdir, f"label_run.LabelRun.pool={pool}")


def test_settings_are_checked():
  with pytest.raises(UserError, match="LabelRun.problems: found 5 to 5"):
    labels("x", "FIRST=5", "LAST=5")
  with pytest.raises(UserError, match="LabelRun.segmenter: found 'line'"):
    labels("x", "label_run.LabelRun.segmenter=line")
