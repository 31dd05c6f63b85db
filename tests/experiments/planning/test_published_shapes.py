"""Run files of published models: their shapes, and devices that there are."""

import pytest

from experiments.core import config
from experiments.studies import protocol
from kernels_pallas.common import chips
from research import weights

TABLE = "runs/plan/table.gin"


def test_every_plan_of_the_table_is_for_chips_that_there_are():
  steps = config.read(TABLE, root=protocol.Run).experiment.study.steps
  for step in steps:
    (found,) = (x for x in step.set if x.startswith("--topology="))
    kind, _, _ = found.partition("=")[2].partition(":")
    assert kind in chips.CHIPS, step.name


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
