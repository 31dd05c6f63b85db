"""The table of plans: its lines, its verdicts, and cells that are left out."""

import dataclasses

import pytest

from experiments.core import config
from experiments.studies import protocol
from experiments.studies.planning import cells, plan_table
from experiments.studies.planning.plan_table import Bound, Cell, PlanTable
from kernels_pallas.common import chips as chips_table
from research import weights
from research.typing import UserError

CELL = Cell(
  model="small",
  method="full",
  config="runs/plan/small.gin",
  topology="cpu:1",
)
ROW = {
  "fits": True,
  "bytes": 30e9,
  "limit_bytes": 80e9,
  "seconds": 0.5,
  "seconds_without_overlap": 0.75,
  "tokens_per_s": 1999.6,
  "mfu_bound": 0.6,
  "devices": 8,
  "compile_seconds": 3.4,
  "cpu_seconds": 2.6,
}


def test_a_line_has_gigabytes_and_whole_tokens():
  found = plan_table.line(CELL, ROW)
  assert found == {
    "model": "small",
    "method": "full",
    "devices": "cpu:1",
    "fits": "yes",
    "GB a device": 30.0,
    "of GB": 80.0,
    "s at best": 0.5,
    "s without overlap": 0.75,
    "tokens/s at most": 2000,
    "MFU at most": 0.6,
    "s to compile": 3,
    "CPU s to compile": 3,
  }
  assert plan_table.line(CELL, {})["fits"] == "not compiled"


@pytest.mark.parametrize(
  ("least", "most", "holds"),
  [(24e9, None, True), (None, 24e9, False), (24e9, 40e9, True)],
)
def test_a_claim_is_decided_by_the_cell(least, most, holds):
  bound = Bound(
    claim="c", cell=CELL.name, field="bytes", least=least, most=most
  )
  assert bound.verdict({CELL.name: ROW}).holds == holds
  # What was not compiled decides nothing.
  assert bound.verdict({CELL.name: {}}).holds is None


@pytest.mark.parametrize(
  ("row", "why"), [({}, "not compiled"), ({"fits": False}, "does not fit")]
)
def test_a_claim_says_why_its_cell_decides_nothing(row, why):
  """A program that does not fit has no times."""
  found = Bound(claim="c", cell=CELL.name, field="mfu_bound").verdict(
    {CELL.name: row}
  )
  assert found.holds is None and found.found == f"{CELL.name}: {why}"


def test_cells_that_are_skipped_are_not_compiled(monkeypatch):
  monkeypatch.setattr(plan_table, "compiled", lambda cell: ROW)
  study = PlanTable(cells=(CELL,), skipped="small, full")
  assert study.run(CELL.name, {}, None) == {}
  every = dataclasses.replace(study, skipped=None)
  assert every.run(CELL.name, {}, None) == ROW
  # A row that was left out is not taken for one that was compiled.
  assert study.settings(CELL.name) != every.settings(CELL.name)


def test_a_claim_about_no_cell():
  bound = Bound(claim="c", cell="large", field="bytes")
  with pytest.raises(UserError, match="'large' is no cell"):
    PlanTable(cells=(CELL,), bounds=(bound,))


def test_calls_have_the_seconds_of_a_step_and_the_bytes_of_the_largest():
  first = {"fits": True, "total_bytes": 9, "seconds": 5.0}
  step = {"fits": True, "total_bytes": 7, "seconds": 1.0, "mfu_bound": 0.1}
  found = {"devices": 8, "prefill": first, "decode": step, "tokens_per_s": 3.0}
  row = plan_table._of_calls(found, "decode")
  assert (row["seconds"], row["bytes"], row["fits"]) == (1.0, 9, True)
  assert row["tokens_per_s"] == 3.0 and row["devices"] == 8
  # A step is not planned where the first call does not fit.
  row = plan_table._of_calls({"devices": 8, "first": {"fits": False}}, "again")
  assert not row["fits"] and row["bytes"] is None


def test_every_cell_is_a_run_for_a_topology_that_there_is():
  read = config.read("runs/plan/table.gin", root=protocol.Run)
  assert list(read.experiment.study.arms) == [c.name for c in cells.CELLS]
  for cell in cells.CELLS:
    run = plan_table._experiment(cell.config, cell.set, cell.stage)
    assert run.plan.steps
    kind, _, _ = cell.topology.partition(":")
    assert kind in chips_table.CHIPS
    if cell.verifier is not None:
      plan_table._experiment(cell.verifier, cell.set)


@pytest.mark.parametrize(
  ("path", "billions"),
  [
    ("llama31_8b_full", 8.030),
    ("llama31_70b_full", 70.554),
    ("qwen3_30b_a3b_full", 30.532),
  ],
)
def test_shapes_have_the_published_number_of_weights(path, billions):
  run = config.read(f"runs/plan/{path}.gin").experiment
  loaded = run.load_abstract()
  assert weights.count(loaded.params) / 1e9 == pytest.approx(billions, abs=1e-3)
