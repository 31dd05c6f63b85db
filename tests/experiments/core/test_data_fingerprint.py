"""A run's own files are known by a hash: of other texts it is another run."""

import dataclasses
import os
import pathlib

import pytest

from experiments.core import config, data_fingerprint, runtime
from research.data.pipeline import Mixture, Pipeline
from research.data.sources import PydocTopics, TextFiles, files_sha256
from research.data.sources.arrays import Arrays
from research.data.sources.records import Chat, Texts
from research.io.folders import folder
from research.prm.rows import LabelledRows
from research.typing import UserError
from research.vlm.records import ImageRecords

RUN = pathlib.Path(__file__).parents[2] / "crash" / "command.gin"


@pytest.fixture
def files(tmp_path):
  made = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
  for path in made:
    path.write_text('{"text": "some words"}\n')
  return made


@pytest.fixture
def experiment(files):
  return config.read(str(RUN), [f"FILES={str(files[0])!r}"]).experiment


@pytest.fixture
def begun(tmp_path):
  """The workdir of a run that has a checkpoint."""
  workdir = tmp_path / "run"
  (workdir / "checkpoints" / "1").mkdir(parents=True)
  return folder(workdir)


def change(path):
  """Changes one letter; size and time stay as they were."""
  before = path.stat()
  path.write_bytes(path.read_bytes().replace(b"some", b"same"))
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_one_letter_of_the_texts_is_another_run(experiment, begun, files):
  now = data_fingerprint.claim(experiment, begun)
  assert set(now) == {"data"}
  assert data_fingerprint.claim(experiment, begun) == now
  change(files[0])
  with pytest.raises(UserError) as error:
    data_fingerprint.claim(experiment, begun)
  assert f"the texts of data ({files[0]}) have changed" in str(error.value)
  assert "Restore the files, or use another workdir" in str(error.value)


def test_a_mixture_has_the_texts_of_its_parts(experiment, begun, files):
  sources = [Texts(paths=str(path)) for path in files] + [PydocTopics()]
  parts = tuple(Pipeline(source=source) for source in sources)
  mixed = dataclasses.replace(
    experiment, data=Mixture(parts=parts, weights=(1, 1, 1))
  )
  data_fingerprint.claim(mixed, begun)
  change(files[1])
  with pytest.raises(UserError, match=str(files[1])):
    data_fingerprint.claim(mixed, begun)


def test_before_the_first_step_texts_may_be_mended(
  experiment, tmp_path, files, monkeypatch
):
  """But all processes of a run read the same."""
  workdir = folder(tmp_path)
  first = data_fingerprint.claim(experiment, workdir)
  change(files[0])
  monkeypatch.setattr(runtime, "is_first_process", lambda: False)
  with pytest.raises(UserError, match="have changed since"):
    data_fingerprint.claim(experiment, workdir)
  monkeypatch.undo()
  now = data_fingerprint.claim(experiment, workdir)
  assert now != first
  monkeypatch.setattr(runtime, "is_first_process", lambda: False)
  assert data_fingerprint.claim(experiment, workdir) == now


@pytest.mark.parametrize(
  "source",
  [
    lambda path: TextFiles(paths=path),
    lambda path: Texts(paths=(path,)),
    lambda path: Chat(paths=path),
    lambda path: Arrays(path=path),
    lambda path: ImageRecords(paths=path, folder="."),
    lambda path: LabelledRows(paths=path),
  ],
)
def test_every_source_of_files_has_a_hash(files, source):
  first, same = (source(str(path)).sha256 for path in files)
  assert first == same and len(first) == 64
  change(files[1])
  assert source(str(files[1])).sha256 != first


def test_files_are_told_apart_from_their_parts(files):
  """Two files are not the one that has the bytes of both."""
  a, b = map(str, files)
  both = files_sha256((a, b))
  assert both != files_sha256(a)
  files[0].write_bytes(files[0].read_bytes() + files[1].read_bytes())
  files[1].write_bytes(b"")
  assert files_sha256((a, b)) != both and files_sha256(a) != both


def test_a_pipe_is_not_read_for_its_hash(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  assert files_sha256(str(tmp_path / "pipe")) is None


@pytest.mark.parametrize(
  "name", ["search/countdown_policy", "search/grpo_additions"]
)
def test_a_class_among_the_settings_of_a_task_is_no_part(name):
  """A task names the class that guards its verifier; it has no files."""
  experiment = config.read(f"runs/{name}.gin").experiment
  data_fingerprint.check_files(experiment)
  assert list(data_fingerprint.sources(experiment.data)) == []
