"""Workdirs: experiment ownership and recorded versions."""

import json
import resource

import pytest

from research.io import folders
from research.training.checkpoints import versions
from research.training.checkpoints.workdir import (
  LENGTH_AND_MESH_LINES,
  claim_workdir,
)
from research.typing import UserError

CONFIG = "adamw.learning_rate = 0.1\nSTEPS = 5\n"


def test_versions_are_recorded_once(tmp_path, capsys):
  for _ in range(3):
    workdir = claim_workdir(tmp_path / "run", CONFIG)
  (found,) = json.loads((workdir / "versions.json").read_text())
  assert found == versions.current()
  assert {"jax", "code", "devices", "python"} < set(found)
  assert "none" not in found.values()
  assert capsys.readouterr().err == ""


def test_other_versions_are_warned_of_and_added(tmp_path, capsys):
  workdir = claim_workdir(tmp_path, CONFIG)
  path = workdir / "versions.json"
  (now,) = json.loads(path.read_text())
  path.write_text(json.dumps([now | {"jax": "0.11.0", "code": "abc"}]))
  claim_workdir(tmp_path, CONFIG)
  said = capsys.readouterr().err
  assert f"jax 0.11.0 -> {now['jax']}, code abc -> {now['code']}." in said
  assert said.startswith("warning: ") and said.count("\n") == 2
  assert [x["jax"] for x in json.loads(path.read_text())] == [
    "0.11.0",
    now["jax"],
  ]
  claim_workdir(tmp_path, CONFIG)  # said once
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "{", "3", "[3]"])
def test_an_unreadable_record_stops_nothing(tmp_path, capsys, text):
  (tmp_path / "versions.json").write_text(text)
  claim_workdir(tmp_path, CONFIG)
  assert "cannot be read; it will be rewritten" in capsys.readouterr().err
  assert len(json.loads((tmp_path / "versions.json").read_text())) == 1


def test_the_code_is_known_by_its_content(tmp_path, monkeypatch):
  """Any changed, added or renamed source file changes the version."""
  package = tmp_path / "research" / "training" / "checkpoints"
  package.mkdir(parents=True)
  (package / "versions.py").write_text("a = 1\n")
  monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
  seen = {versions.code()}
  (package / "versions.py").write_text("a = 2\n")
  seen.add(versions.code())
  (package / "b.py").write_text("")
  seen.add(versions.code())
  (package / "b.py").rename(package / "c.py")
  seen.add(versions.code())
  assert len(seen) == 4 == len({x for x in seen if len(x) == 12})


def test_another_experiment_writes_nothing(tmp_path):
  workdir = claim_workdir(tmp_path, CONFIG)
  (workdir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
  before = {p.name: p.read_bytes() for p in workdir.iterdir()}
  with pytest.raises(UserError, match="holds another experiment"):
    claim_workdir(tmp_path, CONFIG.replace("0.1", "0.2"))
  assert {p.name: p.read_bytes() for p in workdir.iterdir()} == before


def test_a_mistake_before_the_first_step_does_not_cost_the_workdir(tmp_path):
  workdir = claim_workdir(tmp_path, CONFIG)
  (workdir / "checkpoints").mkdir()
  (workdir / "metrics.jsonl").write_text('{"step": 0, "goodput/init": 2.0}\n')
  other = CONFIG.replace("0.1", "0.2")
  claim_workdir(tmp_path, other)
  assert (workdir / "config.gin").read_text() == other


@pytest.mark.parametrize(
  "path, remote", [("a/b", False), ("/a:b", False), ("gs://a/b", True)]
)
def test_what_is_remote(path, remote):
  assert folders.is_remote(path) == remote
  if not remote:  # a bucket's are tested in tests/remote
    found = folders.folder(path)
    assert str(found).endswith(path) and not folders.is_remote(found)


@pytest.mark.parametrize(
  "length",
  [
    "STEPS = 5\nloop.TrainConfig.steps = %STEPS\n",
    "loop.TrainConfig.steps = 5\n",
    "optim.cosine.steps = 5\n",
    "Plan.steps = 5\n",  # before it was renamed
  ],
)
def test_workdir_belongs_to_one_experiment(length, tmp_path):
  config = f"adamw.learning_rate = 0.1\n{length}"
  workdir = claim_workdir(tmp_path / "run", config)
  assert (workdir / "config.gin").read_text() == config
  (workdir / "checkpoints" / "3").mkdir(parents=True)
  longer = config.replace("5", "9")
  claim_workdir(workdir, longer)
  assert (workdir / "config.gin").read_text() == longer
  with pytest.raises(UserError, match="another experiment") as caught:
    claim_workdir(workdir, config.replace("0.1", "0.2"))
  assert "-adamw.learning_rate = 0.1  +adamw.learning_rate = 0.2" in str(
    caught.value
  )
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    claim_workdir(tmp_path / "file", config)


def _operative(rank, method="lora", targets=("q", "v")):
  """Returns what gin prints: imports, macros, then parameters."""
  wrapped = f"\\\n    {targets!r}"
  return f"""from __gin__ import dynamic_registration
from research.lora import adapt
from research.lora.methods import {method}

# Macros:
# ======
RANK = {rank}
STEPS = 5

# Parameters for adapt.Adapt:
# ===========================
adapt.Adapt.method = @{method}.{method}()
adapt.Adapt.targets = {wrapped}

# Parameters for {method}.{method}:
# ===========================
{method}.{method}.rank = %RANK
"""


def test_what_differs_begins_with_macros_and_imports_are_left_out(tmp_path):
  workdir = claim_workdir(tmp_path, _operative(8))
  (workdir / "checkpoints" / "3").mkdir(parents=True)
  with pytest.raises(UserError) as caught:
    claim_workdir(tmp_path, _operative(4, "dora", ("q", "up")))
  first, changes, _ = str(caught.value).split("\n")
  assert changes.startswith(
    "-RANK = 8  +RANK = 4  -adapt.Adapt.method = @lora.lora()  +adapt.Adapt."
  )
  assert "-adapt.Adapt.targets = ('q', 'v')" in changes
  assert "import" not in changes and "#" not in changes


def test_the_same_bindings_of_another_module_are_another_run(tmp_path):
  workdir = claim_workdir(tmp_path, _operative(8))
  (workdir / "checkpoints" / "3").mkdir(parents=True)
  other = _operative(8).replace("research.lora.methods", "mine")
  with pytest.raises(UserError, match="\\+from mine import lora"):
    claim_workdir(tmp_path, other)


def test_an_import_that_nothing_uses_is_no_difference(tmp_path):
  workdir = claim_workdir(tmp_path, _operative(8))
  (workdir / "checkpoints" / "3").mkdir(parents=True)
  more = _operative(8).replace("from ", "from mine import unused\nfrom ", 1)
  assert claim_workdir(tmp_path, more) == workdir


LONG = """a.first = \\
    'x'
a.second = \\
    'y'
a.parts = \\
    (@one/a.part(),
     @two/a.part(),
     @three/a.part(),
     @four/a.part())
files = 'sharding/1'
"""


@pytest.mark.parametrize(
  "one, other",
  [("'x'", "'y'"), ("@two", "@three"), ("sharding/1", "sharding/2")],
)
def test_values_that_change_places_are_another_run(tmp_path, one, other):
  """Of two bindings, or in a list; a file is no mesh, whatever its name."""
  changed = LONG.replace(one, "?").replace(other, one).replace("?", other)
  claim_workdir(tmp_path, LONG, LENGTH_AND_MESH_LINES)
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  claim_workdir(tmp_path, LONG, LENGTH_AND_MESH_LINES)
  with pytest.raises(UserError, match="another experiment"):
    claim_workdir(tmp_path, changed, LENGTH_AND_MESH_LINES)


def test_a_full_disk_leaves_the_mark(tmp_path):
  claim_workdir(tmp_path, "steps = 1\n")
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
  try:
    with pytest.raises(UserError, match="cannot be written"):
      claim_workdir(tmp_path, "steps = 2\n")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert (tmp_path / "config.gin").read_text() == "steps = 1\n"
