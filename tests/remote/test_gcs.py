"""A run whose workdir is a bucket: gs://, by epath and by TensorStore."""

import chex
import jax
import jax.numpy as jnp
import pytest

from research.io import folders
from research.training import loop
from research.training.checkpoints import checkpoint
from research.training.checkpoints.workdir import claim_workdir
from research.training.reports import metrics
from research.typing import UserError
from tests.crash import run
from tests.remote import fake_gcs

WORKDIR = "gs://a-bucket/runs/one"


@pytest.fixture
def objects(monkeypatch):
  with fake_gcs.bucket(monkeypatch) as made:
    yield made


def names(objects):
  start = len("a-bucket/runs/one/")
  return {name[start:] for name in objects.found}


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(objects, tmp_path, capsys):
  local = run.fit(tmp_path / "run", save_every=0, eval_every=4)
  run.fit(WORKDIR, steps=4, save_every=0, eval_every=4)
  found = run.fit(WORKDIR, save_every=0, eval_every=4)
  assert found.start == 4 and found.best == local.best
  chex.assert_trees_all_equal(found.state, local.state)
  remote = folders.folder(WORKDIR)
  assert run.numbers(remote) == run.numbers(tmp_path / "run")
  here = {
    str(p.relative_to(tmp_path / "run")).split("/state/")[0]
    for p in (tmp_path / "run").rglob("*")
    if p.is_file()
  }
  assert here == {name.split("/state/")[0] for name in names(objects)}
  # Nothing was appended line by line: that would be an upload a step.
  assert objects.uploads.count("a-bucket/runs/one/metrics.jsonl") <= 9

  # A damaged object: the one before it is used, and nothing is deleted.
  place = "a-bucket/runs/one/checkpoints/12/data/place.json"
  objects.put(place, objects.found[place][0].replace(b"12", b"13"))
  capsys.readouterr()
  with checkpoint.Checkpoints(remote / "checkpoints", sweep=True) as kept:
    target = jax.tree.map(jnp.zeros_like, found.state)
    state, step = kept.restore_latest(target)
    assert step == int(state.step) == 8
  assert "12: damaged checkpoint, not used: data/place.json" in (
    capsys.readouterr().err
  )
  assert "checkpoints/12.damaged/data/place.json" in names(objects)


def test_lines_wait_for_a_checkpoint(objects):
  path = folders.folder(WORKDIR) / "metrics.jsonl"
  writer = metrics.JsonlWriter(path)
  writer.scalars(1, {"a": 1.0})
  assert metrics.read_jsonl(path) == []
  writer.flush()
  writer.scalars(2, {"a": 2.0})
  assert [r["step"] for r in metrics.read_jsonl(path)] == [1]
  writer.close()
  again = metrics.JsonlWriter(path, resume_step=1)
  again.close()
  assert metrics.read_jsonl(path) == [{"step": 1, "a": 1.0}]


def test_another_experiment_is_refused(objects):
  workdir = claim_workdir(WORKDIR, "a = 1\n")
  assert str(workdir) == WORKDIR
  assert names(objects) == {"config.gin", "versions.json"}
  # A run that took a step; before, another may take its place.
  (workdir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
  with pytest.raises(UserError, match="gs://.*another experiment"):
    claim_workdir(WORKDIR, "a = 2\n")


def test_local_files_are_copied(objects):
  with folders.locally(folders.folder(WORKDIR)) as place:
    (place / "adapter").mkdir()
    (place / "adapter" / "weights").write_bytes(b"12")
    (place / "loss.png").write_bytes(b"3")
  assert names(objects) == {"adapter/weights", "loss.png"}


def test_stores_that_cannot_be_written_to():
  with pytest.raises(UserError, match="found s3://, expected a local path or"):
    claim_workdir("s3://bucket/run", "a = 1\n")
  with pytest.raises(UserError, match="needs gcsfs; pip install"):
    claim_workdir("gs://bucket/run", "a = 1\n")
  assert loop.TrainConfig(steps=1).keep_every == 0
