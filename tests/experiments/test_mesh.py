"""Meshes as configurations, and the processes of a run as flags."""

import jax
import pytest

from experiments.core import cli, config, device_context, runtime
from research.sharding import Layout
from research.training.checkpoints.workdir import (
  LENGTH_AND_MESH_LINES,
  LENGTH_LINES,
  claim_workdir,
)
from research.training.preemption import Preempted
from research.typing import UserError

RUN = "include 'runs/quickstart.gin'\n"
HEAD = "from __gin__ import dynamic_registration\n"


@pytest.mark.parametrize(
  ("name", "layout"),
  [
    ("single", Layout(data=1)),
    ("data", Layout(data=-1)),
    ("fsdp", Layout(data=1, fsdp=-1)),
    ("tensor", Layout(data=1, tensor=-1)),
    ("mixed", Layout(data=1, fsdp=-1, tensor=2)),
    ("sequence", Layout(data=-1, sequence=2)),
    ("ring", Layout(data=1, ring=-1)),
    ("ulysses", Layout(data=-1, ulysses=2)),
    ("expert", Layout(data=1, expert=-1)),
  ],
)
def test_a_mesh_is_one_line_of_a_run_file(name, layout):
  read = config.parse(f"{HEAD}{RUN}include 'mesh/{name}.gin'\n")
  assert read.experiment.mesh == layout
  assert layout.mesh().size == (1 if name == "single" else 8)
  assert config.parse(read.text).experiment.mesh == layout


def test_a_size_from_the_command_line_wins():
  text = f"{HEAD}{RUN}include 'mesh/fsdp.gin'\n"
  found = config.parse(text, ["FSDP=4", "TENSOR=2"]).experiment.mesh
  assert found == Layout(data=1, fsdp=4, tensor=2)
  assert config.parse(HEAD + RUN).experiment.mesh == Layout(data=1)


def test_a_run_goes_on_over_other_devices_and_no_other_change(tmp_path):
  first = config.parse(HEAD + RUN, ["FSDP=8"]).text
  claim_workdir(tmp_path, first, LENGTH_AND_MESH_LINES)
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  for bindings in (["FSDP=4", "DATA=2"], ["SEQUENCE=2", "STEPS=80"], []):
    text = config.parse(HEAD + RUN, bindings).text
    claim_workdir(tmp_path, text, LENGTH_AND_MESH_LINES)
  other = config.parse(HEAD + RUN, ["RANK=4"]).text
  with pytest.raises(UserError, match="RANK = 8"):
    claim_workdir(tmp_path, other, LENGTH_AND_MESH_LINES)


def test_other_steps_than_updates_are_another_run(tmp_path):
  text = config.parse(f"""{HEAD}{RUN}
include 'optim/muon_linear.gin'
from research.optim import muon
muon.muon.steps = 5
""").text
  changed = text.replace("muon.muon.steps = 5", "muon.muon.steps = 4")
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  (tmp_path / "config.gin").write_text(text)
  for may_differ in (LENGTH_AND_MESH_LINES, LENGTH_LINES):
    claim_workdir(tmp_path, text, may_differ)
    with pytest.raises(UserError, match="muon.muon.steps = 4"):
      claim_workdir(tmp_path, changed, may_differ)


def test_one_device_is_no_mesh():
  with device_context.on_mesh(Layout(data=1)) as here:
    assert here.mesh is None and here.placement is None and here.batch is None
    assert here.share == (0, 1) and here.describe() == "one cpu device"
  with device_context.on_mesh(Layout(fsdp=4, data=2)) as here:
    assert here.mesh.size == 8 and here.share == (0, 1)
    assert here.describe() == "8 cpu devices: data 2 x fsdp 4"
    assert jax.sharding.get_abstract_mesh().shape["fsdp"] == 4


@pytest.mark.parametrize("layout", [Layout(fsdp=3), Layout(data=3, fsdp=3)])
def test_a_mesh_that_does_not_fit_is_said(layout):
  message = r"found 8[.]\n.*must divide the number.*\n.*--devices=N"
  with pytest.raises(UserError, match=message), device_context.on_mesh(layout):
    pass


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(processes=2), "expected all three or none"),
    (dict(coordinator="a:1", processes=2, process=2), "from 0 to 1"),
    (dict(devices=0), "--devices=0: expected at least 1"),
    (
      dict(coordinator="a:1", processes=0, process=0),
      "--processes=0: expected",
    ),
  ],
)
def test_flags_that_make_no_cluster(given, message):
  with pytest.raises(UserError, match=message):
    runtime.Cluster(**given)


def test_a_single_process_needs_no_network(monkeypatch):
  """Nothing is connected; one of several says what it could not reach."""
  calls = []

  def refuse(*arguments, **options):
    calls.append(arguments)
    raise ValueError("no cluster") if not arguments else RuntimeError("refused")

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  with runtime.cluster(runtime.Cluster()):
    assert not jax.distributed.is_initialized()
  assert [len(a) for a in calls] == [0]
  with (
    pytest.raises(UserError, match="process 1 of 2 could not connect"),
    runtime.cluster(runtime.Cluster(coordinator="x:1", processes=2, process=1)),
  ):
    pass


def test_a_process_alone_takes_its_turn():
  assert (
    runtime.is_first_process() and runtime.first_process_first(lambda: 3) == 3
  )


def _asked(argv):
  raise Preempted("run: asked to stop; step 3 is saved.")


def test_a_preempted_command_ends_with_42(capsys):
  assert cli.call(_asked, ["asked"]) == 42
  assert capsys.readouterr().err.startswith("preempted: run: asked to stop")


def test_help_lists_the_flags_of_many_devices():
  from experiments import train

  text = cli.describe(train.main)
  assert "Flags of runs on many devices" in text and "--devices=" in text
