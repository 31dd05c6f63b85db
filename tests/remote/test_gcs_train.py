"""The training and evaluating commands' work, with a bucket for a workdir."""

import json
import pathlib

import pytest

from experiments.core import config, train_eval
from research.io import folders
from research.training.checkpoints.workdir import claim_workdir
from tests.remote import fake_gcs

MODEL = pathlib.Path(__file__).parents[1] / "golden/models/gguf_f32/model.gguf"
WORKDIR = "gs://a-bucket/runs/one"


@pytest.fixture
def objects(monkeypatch):
  with fake_gcs.bucket(monkeypatch) as made:
    yield made


@pytest.mark.slow
def test_everything_that_a_run_leaves(objects, capsys):
  read = config.read(
    "runs/quickstart.gin",
    [
      *("BATCH=2", "LENGTH=64", "EVAL_BATCHES=1", "EVAL_EVERY=2"),
      *("WARMUP=1", "STEPS=2", "experiment.Experiment.prompt=None"),
      f"experiment.Pretrained.name='{MODEL}'",
    ],
  )
  workdir = claim_workdir(WORKDIR, read.text)
  result = train_eval.train(read.experiment, workdir)
  said = capsys.readouterr().err
  assert result["workdir"] == WORKDIR and f"--workdir={WORKDIR}" in said
  kept = json.loads((workdir / "result.json").read_text())
  assert kept["perplexity_after"] == result["perplexity_after"]
  assert (workdir / "loss.png").read_bytes()[:4] == b"\x89PNG"
  found = {name.removeprefix("a-bucket/runs/one/") for name in objects.found}
  assert {
    *("config.gin", "versions.json", "parameters.txt", "metrics.jsonl"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    *("checkpoints/base.json", "checkpoints/2/commit_success.txt"),
  } <= found
  again = config.parse((workdir / "config.gin").read_text()).experiment
  measured = train_eval.evaluate(again, folders.folder(WORKDIR))
  assert measured["step"] == 2
  assert measured["heldout/perplexity"] == pytest.approx(
    result["perplexity_after"], rel=1e-6
  )
