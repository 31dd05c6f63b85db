"""Runs of tasks with a verifier start, as their files have them.

Model, data, files' hashes and verifier are those of the command; `loop.fit`,
which other tests cover, takes its first batch or judges answers, and ends.
"""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest

from experiments.core import config, train_eval
from research.training import loop
from research.training.alignment import rewarded_task
from research.training.checkpoints import workdir
from research.training.rollouts import Rollouts

TINY = pathlib.Path(__file__).parents[1] / "golden/models/gguf_f32/model.gguf"
SMALL = dict(PROBLEMS=8, HELDOUT=2, WIDTH=16)
PRETRAINED = {"experiment.Pretrained.name": f"'{TINY}'"}
CHANGED = {
  "prm/countdown_attack": PRETRAINED
  | {"TASK": "@train/reasoning_tasks.VerifiedTask()"},
  "search/grpo_chain_sum_smollm2": PRETRAINED,
  "data/rewarded": PRETRAINED
  | {"FILES": f"'{config.CONFIGS / 'data/ten_questions.jsonl'}'"},
}
"""What a run starts with in place of other runs, and of a large model."""


@functools.cache
def text_of(path):
  """Returns the text of a gin file, and of all that it includes."""
  text = path.read_text("utf-8")
  included = re.findall(r"^include '(.*)'", text, re.MULTILINE)
  return text + "".join(text_of(config.CONFIGS / name) for name in included)


WITHOUT = r"pipeline|Experiment\.answers = None"
"""In runs of several commands, and those that leave the verifier out."""

RUNS = [
  str(path.relative_to(config.CONFIGS / "runs").with_suffix(""))
  for path in sorted(config.CONFIGS.glob("runs/**/*.gin"))
  if "VerifiedTask" in text_of(path) and not re.search(WITHOUT, text_of(path))
]


class Started(Exception):
  """What `loop.fit` would train on has come."""


def first_batch(objective, optimizer, start, training, *args, **fields):
  """In place of `loop.fit`."""
  del optimizer, args, fields
  if isinstance(training, Rollouts):
    judge(training.task, training.task.sample(np.random.default_rng(0), 2))
  else:
    batch = next(iter(training))
    jax.eval_shape(objective, start.params, batch, jax.random.key(0))
  raise Started


def judge(task, prompts):
  """Judges an answer to each prompt, of which none need be right."""
  rewards, _ = rewarded_task.judged(task, prompts, [[2, 3]] * len(prompts))
  assert len(rewards) == len(prompts) and np.isfinite(rewards).all()


def test_all_are_found():
  assert {"search/countdown_policy", "tour/text"} <= set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_verified_task_starts(name, tmp_path, monkeypatch):
  if "gym" in text_of_run(name):
    pytest.importorskip("reasoning_gym")
  settings = CHANGED.get(name, {})
  settings |= {k: x for k, x in SMALL.items() if f"%{k}" in text_of_run(name)}
  lines = [f"{key}={value}" for key, value in settings.items()]
  run, text = config.read(f"runs/{name}.gin", lines)
  monkeypatch.setattr(loop, "fit", first_batch)
  with pytest.raises(Started):
    train_eval.train(run, workdir.claim_workdir(tmp_path / "run", text))
  if run.answers is not None:
    judge(run.answers.task, run.answers._prompts())


def text_of_run(name):
  return text_of(config.CONFIGS / "runs" / f"{name}.gin")
