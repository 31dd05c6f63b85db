"""Every attention kernel through XLA's compiler for TPUs that are not here."""

import itertools
import os

import pytest

from kernels_pallas.inspect import build
from kernels_pallas.inspect.build import Job
from kernels_pallas.inspect.chips import CHIPS

pytestmark = pytest.mark.chips
CELLS = list(itertools.product(CHIPS, (64, 128, 256), ("bfloat16", "float32")))


@pytest.mark.parametrize(("target", "head_dim", "dtype"), CELLS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles(tmp_path, target, head_dim, dtype, direction):
  job = Job(
    "ours", target, direction, 1024, head_dim, dtype, (512, 512, 256, 128)
  )
  assert build.compile_to(job, tmp_path) is None
  kernel = {"forward": "forward", "backward": "fused"}[direction]
  dumps = [f for f in os.listdir(tmp_path) if f"attention_{kernel}" in f]
  assert any(f.endswith("-final_bundles.txt") for f in dumps)


@pytest.mark.parametrize("target", CHIPS)
def test_split_backward_compiles(tmp_path, target):
  job = Job(
    "ours", target, "backward", 1024, 128, "bfloat16", (512, 512, 256, 256),
    "split",
  )  # fmt: skip
  assert build.compile_to(job, tmp_path) is None
