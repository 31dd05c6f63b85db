"""A step's memory by arithmetic, against XLA's account of it."""

import dataclasses

import pytest

from experiments.planning import plan_training
from research.planning import chips
from research.sharding import Layout
from tests import support, support_plan


@pytest.mark.parametrize("accumulate", [1, 4])
def test_sums_of_gradients_are_counted(accumulate):
  """As much as the gradients of a microbatch, a fifth of this step."""
  sizes = dataclasses.replace(
    support.SIZES, width=256, hidden=1024, head_dim=64, depth=4
  )
  run = support_plan.experiment(
    Layout(data=1), sizes=sizes, accumulate=accumulate
  )
  found = plan_training.plan(run, chips.topology("cpu:1"), quiet=True)
  assert found["predicted_bytes"] == pytest.approx(
    found["total_bytes"], rel=0.06
  )
