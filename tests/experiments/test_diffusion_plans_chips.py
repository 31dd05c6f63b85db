"""LLaDA-8B's training and sampling, compiled by XLA for pods of TPUs.

Numbers are those of the table in research/diffusion/RESULTS.md.
"""

import numpy as np
import pytest

from experiments.core import config
from experiments.planning import calls, plan_sampling, plan_training
from kernels_pallas.masks import Mask, intervals
from research.planning import chips

TRAINING = {  # run, topology -> GiB of a device
  ("pretrain_8b", "v5p:4x4x4"): 45.3,
  ("pretrain_8b", "v5e:16x16"): 11.06,
  ("sft_8b", "v5p:2x2x4"): 37.6,
  ("sft_8b", "v5e:8x8"): 11.01,
  ("block_8b", "v5p:4x4x4"): 41.18,
  ("block_8b", "v5e:16x16"): 11.18,
}
SAMPLING = {"v5p:2x2x1": 4, "v5e:2x4": 8}  # topology -> its devices


@pytest.mark.chips
@pytest.mark.parametrize(("run", "topology"), TRAINING)
def test_training_fits(run, topology):
  experiment = config.read(f"runs/llada/{run}.gin").experiment
  found = plan_training.plan(experiment, chips.topology(topology))
  assert found["fits"] and found["total_parameters"] == 8_015_581_184
  predicted = found["predicted_argument_bytes"]
  assert found["argument_bytes"] == pytest.approx(predicted, rel=0.05)
  assert 0.5 < found["mfu_bound"] <= 1
  gib = found["total_bytes"] / 2**30
  assert gib == pytest.approx(TRAINING[run, topology], rel=0.05)


@pytest.mark.chips
@pytest.mark.parametrize(("topology", "devices"), SAMPLING.items())
def test_sampling_fits_and_a_block_is_cheaper_than_a_row(topology, devices):
  changes = ["FSDP=1", f"TENSOR={devices}"]
  experiment = config.read("runs/llada/pretrain_8b.gin", changes).experiment
  rows = calls.rows("16x1024+256")
  found = plan_sampling.plan(experiment, chips.topology(topology), rows)
  first, again = found["first"], found["again"]
  assert first["fits"] and again["fits"]
  # A block of 32 has a fortieth of a row's tokens; weights are read by both.
  assert again["seconds"] < 0.5 * first["seconds"]


@pytest.mark.parametrize(
  ("tile", "share"), [(128, 0.265625), (512, 0.3125), (1024, 0.375)]
)
def test_tiles_that_the_mask_of_both_halves_has(tile, share):
  """Of 4,096 tokens in blocks of 32: a quarter and the diagonals' tiles."""
  mask = Mask.block_diffusion(4096, 32)
  found = intervals.mask_intervals(mask, 8192, 8192)
  classes = intervals.tile_classes(found, 8192, 8192, tile, tile)
  assert np.mean(classes != intervals.EMPTY) == share
  n = 4096 // tile  # two triangles, and the diagonal of noisy blocks
  assert share == (n * (n + 1) + n) / (2 * n) ** 2
