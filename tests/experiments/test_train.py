"""The whole path on the real model, with very little data.

One small shape throughout, so that the compile cache serves every run.
"""

import json
import shutil
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from experiments import train
from experiments.core import cli, config, train_eval
from research import tree
from research.interop import load
from research.lora import wrap
from research.training.checkpoints.workdir import claim_workdir
from research.training.reports import metrics
from research.typing import UserError

SMALL = [
  "BATCH=2",
  "LENGTH=64",
  "EVAL_BATCHES=1",
  "EVAL_EVERY=2",
  "WARMUP=1",
  "experiment.Experiment.prompt=None",
]


def _run(workdir, *bindings):
  read = config.read("runs/quickstart.gin", [*SMALL, *bindings])
  folder = claim_workdir(workdir, read.text)
  return train_eval.train(read.experiment, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "quick"
  begin = time.monotonic()
  result = _run(workdir, "STEPS=4")
  # Of this run: its process, which also ran other tests, is older.
  assert result["seconds_to_first_step"] < time.monotonic() - begin
  return workdir, result


def test_result_has_what_the_command_line_promises(finished):
  workdir, result = finished
  assert result["trainable_parameters"] == 2_442_240
  assert result["total_parameters"] == 134_515_008 + 2_442_240
  assert result["perplexity_after"] < result["perplexity_before"]
  for name in ("tokens_per_s", "peak_memory_bytes", "seconds", "workdir"):
    assert result[name], name
  kept = json.loads((workdir / "result.json").read_text())
  assert kept["perplexity_after"] == result["perplexity_after"]


def test_workdir_holds_what_the_readme_says(finished):
  workdir, _ = finished
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  losses = {r["step"] for r in records if "train/loss" in r}
  assert losses == {1, 2, 3, 4}
  assert (workdir / "loss.png").read_bytes()[:4] == b"\x89PNG"
  table = (workdir / "parameters.txt").read_text()
  assert "run0/layer0/mlp/up/trained/a" in table
  assert config.read(str(workdir / "config.gin")).experiment.plan.steps == 4


@pytest.mark.slow
def test_adapter_is_the_trained_one(finished):
  workdir, result = finished
  loaded = load.load_model(workdir)
  adapters, _ = tree.partition(loaded.params, wrap.TRAINABLE)
  assert tree.count(adapters) == result["trainable_parameters"]
  again = train_eval.evaluate(
    config.read(str(workdir / "config.gin")).experiment, workdir, 4
  )
  assert np.exp(again["heldout/loss"]) == pytest.approx(
    result["perplexity_after"], rel=1e-6
  )


@pytest.mark.slow
def test_operative_config_rebuilds_a_bitwise_equal_run(finished, tmp_path):
  workdir, first = finished
  read = config.read(str(workdir / "config.gin"))
  folder = claim_workdir(tmp_path / "again", read.text)
  again = train_eval.train(read.experiment, folder)
  assert again["perplexity_after"] == first["perplexity_after"]
  weights = [
    tree.partition(load.load_model(w).params, wrap.TRAINABLE)[0]
    for w in (workdir, folder)
  ]
  chex.assert_trees_all_equal(*weights)


@pytest.mark.slow  # of a small model: test_resume.py
def test_resuming_is_bitwise_the_undisturbed_run(finished, tmp_path):
  _, first = finished
  # Optimizer and schedule must be those of the longer run: stop it early.
  short = "loop.TrainConfig.steps=2"
  _run(tmp_path / "halves", "STEPS=4", short)
  resumed = _run(tmp_path / "halves", "STEPS=4")
  assert resumed["perplexity_after"] == first["perplexity_after"]


def _contents(folder):
  files = (path for path in folder.rglob("*") if path.is_file())
  return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_the_same_command_on_a_finished_run_changes_nothing(finished, capsys):
  """On another mesh, for fewer steps, or without its configuration as well.

  The model is not loaded.
  """
  workdir, first = finished
  before = _contents(workdir)
  given = [f"--set={x}" for x in (*SMALL, "STEPS=4")]
  given.append("--config=runs/quickstart.gin")
  for arguments in (
    given,
    [*given, "--set=FSDP=2"],
    [x.replace("STEPS=4", "STEPS=3") for x in given],
    [],
  ):
    status = cli.call(train.main, ["train", f"--workdir={workdir}", *arguments])
    out = capsys.readouterr()
    assert status == 0, out.err
    kept = json.loads((workdir / "result.json").read_text())
    assert json.loads(out.out) == cli.plain(kept)  # and no other line
    assert "this run has finished, after 4 steps" in out.err
    assert "loading" not in out.err
  assert _contents(workdir) == before
  assert first["tokens_per_s"] and "validation/loss" in first


@pytest.mark.slow
def test_a_result_that_was_not_written_is_whole(finished, tmp_path):
  """As if the process died after its last checkpoint."""
  workdir, first = finished
  shutil.copytree(workdir, tmp_path / "copy")
  (tmp_path / "copy" / "result.json").unlink()
  again = _run(tmp_path / "copy", "STEPS=4")
  assert again["tokens_per_s"] is None
  assert {k: v for k, v in again.items() if k.startswith("validation/")} == {
    k: v for k, v in first.items() if k.startswith("validation/")
  }
  assert again["perplexity_after"] == first["perplexity_after"]


def test_a_rate_below_zero_is_refused_before_a_model_is_loaded():
  with pytest.raises(UserError, match="schedule.peak: found -1, expected a"):
    config.read("runs/quickstart.gin", ["LEARNING_RATE=-1"])


def test_another_experiment_is_refused(finished):
  workdir, _ = finished
  with pytest.raises(UserError, match="holds another experiment") as error:
    _run(workdir, "STEPS=4", "RANK=4", "DTYPE='bfloat16'")
  assert str(error.value).split("\n")[1] == (
    "-DTYPE = 'float32'  +DTYPE = 'bfloat16'  -RANK = 8  +RANK = 4"
  )


def test_a_workdir_without_a_run_needs_a_configuration(tmp_path, capsys):
  assert cli.call(train.main, ["train", f"--workdir={tmp_path}"]) == 1
  said = capsys.readouterr().err
  assert "found no config.gin there" in said
  assert "--config=FILE starts one" in said
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_packed_base_trains_with_no_further_code(tmp_path):
  result = _run(tmp_path / "packed", "STEPS=4", "PACKED=True")
  assert result["perplexity_after"] < result["perplexity_before"]
  # However many numbers it is packed in.
  assert result["trainable_parameters"] == 2_442_240
  assert result["total_parameters"] == 134_515_008 + 2_442_240


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "status", "message"),
  [
    (["--config=runs/none.gin", "--workdir=x"], 1, "no such file"),
    pytest.param(
      ["--config=runs/quickstart.gin"],
      1,
      "--workdir",
      marks=pytest.mark.slow,
    ),
    (["--confg=runs/quickstart.gin"], 2, "confg"),
    (["--config=runs/quickstart.gin", "--workdir=x", "--set=A"], 1, "NAME=V"),
  ],
)
@pytest.mark.sample(5)
def test_command_line_errors(arguments, status, message, tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.train", *arguments],
    capture_output=True,
    text=True,
  )
  assert done.returncode == status
  assert message in done.stderr
  assert len(done.stderr.strip().splitlines()) <= 3
