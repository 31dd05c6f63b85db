"""L2: what fine-tuning Llama-2-7B takes, by XLA's account for TPUs."""

import pytest

from experiments.core import config
from experiments.planning import plan_training
from research.planning import chips

pytestmark = pytest.mark.chips

CASES = {  # run -> topology of one chip
  "qlora": "v5e:1x1",
  "lora": "v6e:1x1",
  "full": "v5p:1x1x1",
}


@pytest.mark.parametrize("name", CASES)
def test_within_a_tenth_of_the_arithmetic(name):
  run = config.read(f"runs/lora/llama2_7b_{name}.gin").experiment
  found = plan_training.plan(run, chips.topology(CASES[name]))
  assert found["total_bytes"] == pytest.approx(
    found["predicted_bytes"], rel=0.1
  )
  assert found["fits"] == (name != "full")
