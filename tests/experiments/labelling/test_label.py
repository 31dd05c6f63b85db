"""From a policy to labelled steps to a reward model, by the commands' parts.

Tiny: three numbers, one step of training.
"""

import dataclasses
import json
import time

import pytest

from experiments.core import config, train_eval
from experiments.labelling import label_run
from research.interop import rewards
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from research.prm import formats, judge
from research.prm.labelled import LabelledSolution
from research.prm.policy_samples import with_exact_labels
from research.reasoning.segmentation import SEMICOLON, steps_of
from research.reasoning.tasks import Countdown
from research.training.checkpoints.workdir import claim_workdir
from research.typing import UserError
from tests import support

SMALL = ["NUMBERS=3", "VALUES=(1, 4)"]
TASK = Countdown(numbers=3, values=(1, 4), count=200000)


def run(path, workdir, *bindings):
  given = ["STEPS=1", "WARMUP=0", "BATCH=4", "LENGTH=21", *bindings]
  read = config.read(path, given)
  return train_eval.train(read.experiment, claim_workdir(workdir, read.text))


def labels(*bindings):
  given = [*SMALL, "LAST=8", "COPIES=2", *bindings]
  read = config.read(
    "runs/prm/countdown_labels.gin", given, root=label_run.LabelRun
  )
  return read.experiment


class Oracle:
  """A sampler that solves what is left, or gives up; one in four is cut."""

  def prompt(self, problem, steps=()):
    return problem, tuple(steps)

  def __call__(self, prompts, key):
    return [
      None if i % 4 == 3 else self._text(*prompt)
      for i, prompt in enumerate(prompts)
    ]

  def _text(self, problem, steps):
    return "".join(steps_of(SEMICOLON, TASK.oracle(problem))[len(steps) :])


def test_a_verifier_that_raises_or_hangs_does_not_end_a_run(monkeypatch):
  monkeypatch.setattr(
    label_run.LabelRun, "_sampler", lambda self, problems: Oracle()
  )
  calls = []

  def verify(self, problem, text):
    calls.append(text)
    if len(calls) == 2:
      raise ZeroDivisionError("of no number")
    if len(calls) == 3:
      time.sleep(20)
    return verdict(self, problem, text)

  verdict = Countdown.verify
  monkeypatch.setattr(Countdown, "verify", verify)
  lines = []
  with pytest.warns(UserWarning, match="Countdown: not judged"):
    made, _ = labels("label_run.LabelRun.timeout=0.5").run(lines.append)
  assert [one.final_correct for one in made].count(False) == 2
  assert len(made) == 12 and lines[1:] == [
    "1 texts or steps not judged: ZeroDivisionError",
    "1 texts or steps not judged: timeout",
  ]


def test_a_run_labels_what_its_policy_writes(monkeypatch):
  monkeypatch.setattr(
    label_run.LabelRun, "_sampler", lambda self, problems: Oracle()
  )
  lines = []
  made, cut = labels("ROLLOUTS=4", "SEED=3").run(lines.append)
  assert lines == ["12 solutions of 8 problems"]
  assert (len(made), cut) == (12, 4)
  assert {one.prompt for one in made} <= {x.prompt for x in TASK[:8]}
  for one in made:
    assert one.final_correct and set(one.labels) == {1}
    assert [tuple(x) for x in one.mc] == [(3, 4), (1, 1)]
    assert one.segmenter_id == "semicolon"


def test_solutions_come_from_a_pool(tmp_path):
  problem = TASK[0]
  step = {"text": TASK.oracle(problem)}
  trace = {"problem_id": problem.id, "steps": [step]}
  line = {
    "problem": problem.to_json(),
    "samples": [
      {"trace": trace | {"finish": x}, "verdict": {"correct": False}}
      for x in ("eos", "length")
    ],
  }
  pool = tmp_path / "pool.jsonl"
  pool.write_text(json.dumps(line) + "\n")
  taken = labels(f"label_run.LabelRun.pool={pool}")
  made, cut = taken.run(lambda text: None)
  assert (len(made), cut) == (1, 1)
  # The search had one step; the oracle of steps knows those of the task.
  assert made[0].steps == tuple(steps_of(SEMICOLON, step["text"]))
  assert made[0].labels == (1,) * (TASK.numbers - 1)
  pool.write_text(json.dumps(line | {"samples": 3}) + "\n")
  with pytest.raises(UserError, match=r"pool.jsonl:1.*samples"):
    taken.run(lambda text: None)


def test_a_task_without_an_oracle_has_labels_of_outcomes(tmp_path):
  """Solutions of a pool become one step; excluded questions are left out."""
  pytest.importorskip("reasoning_gym")
  asked = [
    config.read(
      "runs/prm/chain_sum_labels_smollm2.gin",
      [f"POOL={tmp_path}/pool.jsonl", *bindings],
      root=label_run.LabelRun,
    ).experiment
    for bindings in ((), ("label_run.LabelRun.excluding=None",))
  ]
  unused = {problem.prompt for problem in asked[0].excluding}
  allowed = next(x for x in asked[0].task if x.prompt not in unused)
  problems = [allowed, asked[0].excluding[0]]
  lines = [
    {
      "problem": problem.to_json(),
      "samples": [
        {
          "trace": {
            "problem_id": problem.id,
            "steps": [{"text": " 1"}, {"text": "2."}],
            "finish": "eos",
          },
          "verdict": {"correct": correct, "extracted": "12", "canonical": "12"},
        }
        for correct in (True, False)
      ],
    }
    for problem in problems
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "pool.jsonl").write_text(text)
  (some, cut), (every, _) = (one.run(lambda text: None) for one in asked)
  assert cut == 0 and len(every) == 4
  assert [one.prompt for one in some] == [problems[0].prompt] * 2
  assert [one.labels for one in some] == [(1,), (0,)]
  assert {one.steps for one in some} == {(" 12.",)}
  with pytest.raises(UserError, match="has no oracle of steps"):
    dataclasses.replace(asked[0], segmenter="newline")


def test_settings_are_checked():
  with pytest.raises(UserError, match="LabelRun.problems: found 5 to 5"):
    labels("FIRST=5", "LAST=5")
  with pytest.raises(UserError, match="LabelRun.segmenter: found 'line'"):
    labels("label_run.LabelRun.segmenter=line")


def test_a_policy_that_fills_in_masks_is_an_error():
  class Masked:
    def load(self):
      return Loaded(support.model(), {}, None, {}, Spec(mask_id=3))

  run = dataclasses.replace(labels(), policy=Masked())
  with pytest.raises(
    UserError, match="LabelRun.policy: a masked diffusion model"
  ):
    run._sampler(TASK[:1])


def reward_model(folder):
  """Trains a policy and its reward model, of one step each.

  In the folders `policy` and `prm`; returns the latter's result, and the
  labelled solutions.
  """
  policy, prm, file = (folder / x for x in ("policy", "prm", "labels.jsonl"))
  none = [f"experiment.Experiment.{x}=None" for x in ("answers", "validation")]
  small = [*SMALL, "WIDTH=16", "PROBLEMS=32", *none]
  run("runs/search/countdown_policy.gin", policy, *small)
  problems = TASK[:8]
  texts = [
    (problem, text)
    for problem in problems
    for text in (TASK.oracle(problem), TASK.mutated(problem))
  ]
  made = [
    LabelledSolution(
      prompt=problem.prompt,
      steps=tuple(steps_of(SEMICOLON, text)),
      labels=(None,) * 2,
      final_correct=TASK.verify(problem, text).correct,
    )
    for problem, text in texts
  ]
  made = with_exact_labels(made, TASK, problems)
  formats.write(str(file), made, formats.FORMATS["native"])
  given = [f"POLICY={policy}", f"LABELS={file}", f"TEST={file}"]
  result = run("runs/prm/countdown_prm.gin", prm, *given)
  return result, made


@pytest.mark.slow
def test_a_policy_becomes_a_reward_model(tmp_path):
  result, made = reward_model(tmp_path)
  prm = tmp_path / "prm"
  names = {"f1", "accuracy_error", "accuracy_correct", "auc", "threshold"}
  assert names <= result.keys()
  assert result["step_report"]["base_rate"] == 0.75
  assert json.loads((prm / "result.json").read_text())["auc"] == result["auc"]
  # What it wrote gives the same scores as what it trained.
  loaded = rewards.PretrainedReward(name=str(prm)).load()
  assert loaded.model.backbone.width == 16
  scores = judge.score_solutions(
    loaded.model, loaded.params, loaded.tokenizer, made, batch_size=4
  )
  assert judge.evaluate_steps(made, scores).auc == pytest.approx(result["auc"])
