"""Advice, with a compiler whose answers are arithmetic."""

import dataclasses

import pytest

from experiments.planning import advice
from kernels_pallas.common.chips import Chip
from research.planning import chips
from research.quant.quantize import Quantize
from research.sharding import Layout
from research.typing import UserError
from tests import support, support_plan

WEIGHT = {"none": 100, "names": 50, "layer": 20}
SLOWER = {"none": 1.0, "names": 1.1, "layer": 1.3}


@pytest.fixture
def planned(monkeypatch):
  """Runs that were planned; activations shrink as they are told to."""
  seen = []

  def plan(experiment, topology, quiet):
    assert quiet
    seen.append(experiment)
    remat, rows = experiment.model.remat, 8 / experiment.plan.accumulate
    total = WEIGHT[remat] * rows / experiment.mesh.mesh(topology.devices).size
    return {
      "fits": total <= topology.chip.memory,
      "total_bytes": int(total),
      "seconds": SLOWER[remat] + 0.1 * experiment.plan.accumulate,
      "tokens_per_s": 1.0,
    }

  monkeypatch.setattr(advice.plan_training, "plan", plan)
  # Arguments are left out of account but for what test says of them.
  monkeypatch.setattr(advice.sharding, "bytes_per_device", lambda *_: 0)
  return seen


def _topology(memory, devices=1):
  found = chips.topology(f"cpu:{devices}")
  return dataclasses.replace(found, chip=Chip(name="c", memory=memory))


def _run(layout=Layout(data=1), **changes):
  found = support_plan.experiment(layout, **changes)
  model = dataclasses.replace(found.model, remat="none")
  return dataclasses.replace(found, model=model)


def test_what_does_not_fit_climbs_until_it_does(planned):
  found = advice.advise(_run(), _topology(90.0))
  # 800 of 90: names 400, layer 160, then two microbatches 80.
  best = found["ranked"][0]
  assert best["set"] == ["REMAT=layer", "loop.TrainConfig.accumulate=2"]
  assert best["fits"] and best["total_bytes"] == 80
  assert not found["fits_as_it_is"]
  assert found["tried"] == len(planned) == 4
  # What does not fit comes after what does, the smallest first.
  assert [x["total_bytes"] for x in found["ranked"][1:]] == [160, 400, 800]


def test_what_fits_is_tried_with_less_recomputation(planned):
  run = _run()
  run = dataclasses.replace(
    run, model=dataclasses.replace(run.model, remat="layer")
  )
  found = advice.advise(run, _topology(500.0))
  assert found["fits_as_it_is"]
  # 160 fits as it is; names take 400 and are faster; none would take 800.
  assert [x["set"] for x in found["ranked"]] == [
    ["REMAT=names"],
    [],
    ["REMAT=none"],
  ]
  assert [x["fits"] for x in found["ranked"]] == [True, True, False]


@pytest.mark.parametrize("memory, fits", [(300.0, True), (100.0, False)])
def test_a_run_that_is_no_rung_is_tried_as_it_is(planned, memory, fits):
  """Microbatches, and nothing recomputed: 200 bytes; the first rung has 800."""
  run = _run()
  run = dataclasses.replace(
    run, plan=dataclasses.replace(run.plan, accumulate=4)
  )
  assert all(advice.ladder(run))
  found = advice.advise(run, _topology(memory))
  assert found["fits_as_it_is"] == fits
  assert planned[0] == run
  assert [x["total_bytes"] for x in found["ranked"] if not x["set"]] == [200]


@pytest.mark.slow
def test_meshes_and_packed_weights_are_tried_too(planned):
  sizes = dataclasses.replace(
    support.SIZES, width=64, head_dim=16, hidden=128
  )  # of whole blocks of 64
  whole = support_plan.adapted(_run(Layout(data=4), sizes=sizes))
  found = advice.advise(whole, _topology(1e9, 4), compiles=100)
  tried = {tuple(x["set"]) for x in found["ranked"]}
  assert ("DATA=1 FSDP=4 TENSOR=1",) in tried
  assert ("DATA=1 FSDP=2 TENSOR=2",) in tried
  packed = [x for x in planned if Quantize in map(type, x.transforms)]
  assert len(packed) == len(planned) / 2
  # Adapters come after what they adapt is packed.
  assert all(type(x.transforms[-1]).__name__ == "Adapt" for x in packed)


def test_no_more_programs_than_asked_for(planned):
  found = advice.advise(_run(Layout(data=4)), _topology(1.0, 4), compiles=3)
  assert found["tried"] == len(planned) == 3
  assert found["left_out"] >= 1
  assert not any(x["fits"] for x in found["ranked"])


def test_arguments_that_do_not_fit_are_not_compiled(planned, monkeypatch):
  monkeypatch.setattr(advice.sharding, "bytes_per_device", lambda *_: 2e9)
  found = advice.advise(_run(), _topology(1e9))
  # The run itself is, whatever it holds; nothing of it can be saved.
  assert found["tried"] == len(planned) == 1


@pytest.mark.slow
def test_microbatches_have_a_row_for_each_device(planned):
  found = advice.advise(_run(Layout(data=4)), _topology(1.0, 4), compiles=99)
  most = [e.plan.accumulate for e in planned if e.mesh == Layout(data=4)]
  assert max(most) == 2  # 8 rows, 4 devices
  assert found["left_out"]


def test_an_error_of_the_run_itself_is_raised(planned):
  with pytest.raises(UserError, match="needs 16 devices, found 2"):
    advice.advise(_run(Layout(data=16)), _topology(1e9, 2))


@pytest.mark.slow
def test_rungs_take_less_and_less_memory(monkeypatch):
  """By XLA's account, of a real program."""
  monkeypatch.setattr(advice.sharding, "bytes_per_device", lambda *_: 0)
  sizes = dataclasses.replace(support.SIZES, depth=8)
  found = advice.advise(_run(sizes=sizes, length=128), _topology(1.0), 4)
  totals = {tuple(x["set"]): x["total_bytes"] for x in found["ranked"]}
  assert list(sorted(totals, key=totals.__getitem__)) == [
    ("REMAT=layer", "loop.TrainConfig.accumulate=2"),
    ("REMAT=layer",),
    ("REMAT=names",),
    (),
  ]
