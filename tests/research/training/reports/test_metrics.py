"""Metric writers: file contents after a crash and a resumption."""

import json
import pathlib
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from research.training.reports import metrics
from research.typing import UserError


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_resume_drops_what_will_be_repeated(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = metrics.JsonlWriter(path)
  for step in range(1, 6):
    writer.scalars(step, {"train/loss": float(step)})
  writer.close()
  with path.open("a") as file:
    file.write('{"step": 6, "train/lo')  # torn by a crash
  assert [r["step"] for r in metrics.read_jsonl(path)] == [1, 2, 3, 4, 5]
  writer = metrics.JsonlWriter(path, resume_step=3)
  writer.scalars(4, {"train/loss": 40.0})
  writer.close()
  assert [(r["step"], r["train/loss"]) for r in records(path)] == [
    (1, 1), (2, 2), (3, 3), (4, 40)
  ]  # fmt: skip


def test_a_new_run_starts_a_new_file(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n')
  metrics.JsonlWriter(path).close()
  assert path.read_text() == ""


def test_lines_are_json_whatever_the_number(tmp_path):
  path = tmp_path / "m.jsonl"
  writer = metrics.JsonlWriter(path)
  writer.scalars(
    1, {"a": float("nan"), "b": np.float32(0.5), "c": 7, "d": float("inf")}
  )
  writer.close()
  lines = [{"step": 1, "a": None, "b": 0.5, "c": 7, "d": None}]
  assert records(path) == lines
  metrics.JsonlWriter(path, resume_step=1).close()
  assert records(path) == lines


@pytest.mark.parametrize(
  "line", [b"{}", b"[1]", b"\xff\xfe", b'{"step": "x"}', b"nonsense"]
)
def test_a_foreign_file_is_an_error(tmp_path, line):
  path = tmp_path / "m.jsonl"
  path.write_bytes(b'{"step": 1}\n' + line + b"\n")
  with pytest.raises(UserError, match="line 2 is not a record"):
    metrics.read_jsonl(path)


def test_a_file_that_cannot_grow(tmp_path):
  writer = metrics.JsonlWriter(tmp_path / "m.jsonl")
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
  try:
    with pytest.raises(UserError, match="cannot be written .File too large"):
      for step in range(8):
        writer.scalars(step, {"train/loss": 1.0})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_folder_that_is_none(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    metrics.JsonlWriter(tmp_path / "file" / "m.jsonl")


def test_one_step_late():
  seen = []
  late = metrics.OneStepLate(lambda step, values: seen.append((step, values)))
  late.push(1, {"loss": jnp.float32(1)})
  assert seen == []
  late.push(2, {"loss": jnp.float32(2)})
  assert seen == [(1, {"loss": 1.0})]
  late.flush()
  late.flush()
  assert seen == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]
  assert all(type(v["loss"]) is float for _, v in seen)


@pytest.mark.parametrize(
  "writer,package",
  [(metrics.TensorBoardWriter, "tensorboardX"), (metrics.WandbWriter, "wandb")],
)
def test_missing_packages_are_named(tmp_path, writer, package, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, package, None)
  with pytest.raises(UserError, match=rf"{package} is not installed"):
    writer(tmp_path, None)


class Wandb:
  """W&B's server, as its documentation has `resume` (guides/runs/resuming)."""

  def __init__(self):
    self.logged = {}

  def init(self, *, id, dir, resume, **_):
    if resume == {True: "never", False: "must"}[id in self.logged]:
      raise ValueError(f"resume={resume}, id={id}")
    (pathlib.Path(dir) / "wandb").mkdir(exist_ok=True)
    self._now = self.logged.setdefault(id, [])
    return self

  def log(self, values, step):
    self._now.append(step)

  def finish(self):
    pass


def test_a_run_of_wandb_is_that_of_its_folder(tmp_path, monkeypatch):
  """Of a run that has saved nothing, and of stages of two runs alike."""
  server = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", server)
  for run in ("a", "b"):
    folder = tmp_path / run / "align"
    folder.mkdir(parents=True)
    for resumed, step in ((None, 1), (None, 2), (2, 3)):
      writer = metrics.WandbWriter(folder, resumed)
      writer.scalars(step, {"train/loss": 0.5})
      writer.close()
  assert list(server.logged.values()) == [[1, 2, 3], [1, 2, 3]]
  # One whose id was its name; and one that W&B is new to.
  for name, begun in (("old", True), ("late", False)):
    folder = tmp_path / name
    folder.mkdir()
    if begun:
      (folder / "wandb").mkdir()
      server.logged[name] = [1]
    metrics.WandbWriter(folder, 1).scalars(2, {"train/loss": 0.5})
  assert server.logged["old"] == [1, 2] and "late" not in server.logged


def test_tensorboard_events(tmp_path):
  pytest.importorskip("tensorboardX")
  writer = metrics.TensorBoardWriter(tmp_path)
  writer.scalars(1, {"train/loss": 0.5})
  writer.close()
  assert list(tmp_path.glob("events*"))


def test_peak_memory_remembers_what_was_freed():
  # A process of its own: here, something larger may have been held before.
  code = """
import numpy as np
from research.training import memory
block = np.ones(2**27)
del block
memory.release()
print(memory.peak_memory_bytes())
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  # One GiB was held. Linux counts the parent's memory in, so no upper bound.
  assert int(done.stdout) > 2**30
