"""Plans compiled by XLA for TPUs that are not here; see `make test-chips`."""

import pytest

from experiments.planning import plan_training
from research.planning import chips
from research.sharding import Layout
from tests import support_plan

pytestmark = pytest.mark.chips


def _smollm2(layout):
  return support_plan.experiment(
    layout, support_plan.SMOLLM2, batch=32, length=256, dtype="bfloat16"
  )


def _llama3(layout):
  return support_plan.experiment(
    layout, support_plan.LLAMA3_8B, batch=16, length=256, dtype="bfloat16"
  )


CASES = {
  "adapters": (
    "v5e:4x4",
    support_plan.adapted(_smollm2(Layout(data=4, fsdp=4))),
  ),
  "full": ("v5p:2x2x4", _smollm2(Layout(data=2, fsdp=8))),
  "8B": ("v5p:2x2x4", _llama3(Layout(data=1, fsdp=8, tensor=2))),
  "8B of v5e": ("v5e:4x4", _llama3(Layout(data=1, fsdp=8, tensor=2))),
}


@pytest.fixture(scope="module", params=list(CASES))
def planned(request):
  topology, whole = CASES[request.param]
  return whole, plan_training.plan(whole, chips.topology(topology))


def test_bytes_of_a_device_are_within_a_twentieth_of_the_table(planned):
  _, found = planned
  # The table does not know of tiles: 576/8 columns are padded to 128.
  predicted = found["predicted_argument_bytes"]
  assert found["argument_bytes"] == pytest.approx(predicted, rel=0.05)
  assert found["total_bytes"] >= found["argument_bytes"]


def test_no_stack_of_weights_travels(planned):
  whole, found = planned
  depth = whole.model.sizes.depth
  moved = {s for row in found["collectives"] for s in row["shapes"]}
  assert not [s for s in moved if f"[{depth}," in s]


def test_collectives_are_those_of_the_mesh(planned):
  whole, found = planned
  rows = found["collectives"]
  assert {axis for row in rows for axis in row["axes"]} <= set(found["mesh"])
  depth = whole.model.sizes.depth
  # Weights are gathered or passed round in each layer, forward and backward.
  passed = [
    row["count"]
    for row in rows
    if row["kind"] in ("all-gather", "collective-permute")
    and row["axes"] == ["fsdp"]
  ]
  assert sum(passed) >= 2 * 7 * depth
  assert found["unknown_loops"] == 0


def test_seconds_and_utilisation_are_bounds(planned):
  _, found = planned
  parts = found["seconds_by_part"]
  assert set(parts) == {"arithmetic", "memory", "links"}
  assert found["seconds"] == max(parts.values())
  assert 0 < found["mfu_bound"] < 1
  assert 0.4 < found["useful_flops"] < 1.02
