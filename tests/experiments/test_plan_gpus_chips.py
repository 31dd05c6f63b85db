"""Plans compiled by XLA for GPUs that are not here; see `make test-chips`."""

import pytest

from experiments.planning import plan_training
from kernels_pallas.common.chips import GPUS
from kernels_pallas.inspect import gpu
from research.planning import chips
from research.sharding import Layout
from tests import support_plan

pytestmark = [
  pytest.mark.chips,
  pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing())),
]


@pytest.mark.parametrize("topology", ["h100:2x4", "a100:2x4", "b200:2x4"])
def test_a_step_on_two_hosts(topology):
  whole = support_plan.experiment(
    Layout(data=2, fsdp=4),
    support_plan.SMOLLM2,
    batch=32,
    length=256,
    dtype="bfloat16",
  )
  found = plan_training.plan(whole, chips.topology(topology))
  predicted = found["predicted_argument_bytes"]
  assert found["argument_bytes"] == pytest.approx(predicted, rel=0.01)
  # Attention's kernels state their FLOPs: without them it would be 1.08.
  assert 0.9 < found["useful_flops"] < 1.02
  assert found["fits"] and found["unknown_loops"] == 0
  chip = GPUS[topology.partition(":")[0]]
  for row in found["collectives"]:
    within = row["sent_bytes"] / chip.link
    if row["axes"] == ["fsdp"]:  # of one host
      assert row["seconds"] == pytest.approx(within)
    else:
      assert row["seconds"] >= within
  data = [r for r in found["collectives"] if r["axes"] == ["data"]]
  # Pairs of two hosts: each device sends its half of twice the array.
  for row in data:
    seconds = row["count"] * row["payload_bytes"] / chip.network
    assert row["kind"] != "all-reduce" or row["seconds"] == pytest.approx(
      seconds
    )
  assert data
