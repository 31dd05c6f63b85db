"""Every attention kernel through XLA's compiler for TPUs that are not present.

The cells are {chips} x {head dims} x {dtypes} x {directions}. Each is compiled
at a tile that compiles quickly, for a full mask here and a causal one there;
with `--slow`, also at the kernels' default tiles, for a causal mask (whose
kernels also hold the code for fully visible tiles), with every feature at once,
and at the smallest tile, for which the registers suffice. Every cell compiles.
"""

import itertools

import pytest

from kernels_pallas.inspect import build, programs, report
from kernels_pallas.inspect.build import Job
from kernels_pallas.inspect.chips import CHIPS

pytestmark = pytest.mark.chips
CELLS = list(itertools.product(CHIPS, (64, 128, 256), ("bfloat16", "float32")))
QUICK = (512, 512, 256, 128)
SMALL = (128, 128, 128, 128)
SPILLS = {
  ("v4", 64, "bfloat16", "forward"): 7,
  ("v4", 64, "float32", "forward"): 5,
  ("v4", 128, "bfloat16", "forward"): 9,
  ("v4", 128, "float32", "forward"): 11,
  ("v4", 256, "bfloat16", "forward"): 12,
  ("v4", 256, "float32", "forward"): 6,
  ("v4", 256, "bfloat16", "backward"): 51,
  ("v4", 256, "float32", "backward"): 21,
  ("v6e", 256, "float32", "backward"): 25,
}
"""Registers a step that the smallest tile spills, where it does."""

every_cell = pytest.mark.parametrize(("target", "head_dim", "dtype"), CELLS)
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def compiles(job, folder):
  """Compiles a job, and checks that each of its kernels is dumped."""
  assert build.compile_to(job, folder) is None
  names = {f.name for f in folder.glob("*-final_bundles.txt")}
  blocks = job.blocks or QUICK
  for step in programs.flash_attention_steps(
    Job(**{**vars(job), "blocks": blocks})
  ):
    assert any(step.name in name for name in names)


@every_cell
@both_directions
def test_compiles(tmp_path, target, head_dim, dtype, direction):
  job = Job(
    "flash_attention", target, direction, 1024, head_dim, dtype, QUICK,
    features="causal" if dtype == "bfloat16" else "full",
  )  # fmt: skip
  compiles(job, tmp_path)


@pytest.mark.parametrize("target", CHIPS)
def test_split_backward_compiles(tmp_path, target):
  job = Job(
    "flash_attention", target, "backward", 1024, 128, "bfloat16",
    (512, 512, 256, 256), "split",
  )  # fmt: skip
  compiles(job, tmp_path)


@pytest.mark.slow
@every_cell
@both_directions
def test_the_smallest_tile_spills_nothing(target, head_dim, dtype, direction):
  """Its matrix work adds up, too; larger tiles spill but cost less."""
  cell = target, head_dim, dtype, direction
  job = Job("flash_attention", target, direction, 1024, head_dim, dtype, SMALL)
  assert report.measure(job).spills <= SPILLS.get(cell, 0)


@pytest.mark.slow
@every_cell
@both_directions
def test_the_tiles_of_the_table_compile(
  tmp_path, target, head_dim, dtype, direction
):
  """At 4096 tokens, so that no tile is shrunk."""
  job = Job(
    "flash_attention", target, direction, 4096, head_dim, dtype, (),
    features="causal",
  )  # fmt: skip
  compiles(job, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", CHIPS)
@both_directions
def test_every_feature_at_once_compiles(tmp_path, target, direction):
  job = Job(
    "flash_attention", target, direction, 2048, 128, "bfloat16", (),
    features="everything",
  )  # fmt: skip
  compiles(job, tmp_path)
