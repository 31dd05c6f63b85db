"""The quantized matmul through XLA's compiler for absent TPUs."""

import dataclasses

import pytest

from kernels_pallas.inspect.chips import CHIPS
from kernels_pallas.quantized_matmul.tpu.tile_sizes import Config
from tests.kernels_pallas import chips_quantized
from tests.kernels_pallas.chips_quantized import Case

pytestmark = pytest.mark.chips

CASES = (  # way, kind, group, rows, offset
  ("few", "int4", 128, 1, False),
  ("few", "int4", 32, 8, True),
  ("few", "int4", 16, 3, False),
  ("few", "nf4", 64, 8, False),
  ("few", "int8", 512, 8, True),
  ("few", "w8a8", 64, 40, False),
  ("many", "int4", 64, 512, True),
  ("many", "nf4", 64, 500, False),
  ("many", "int8", 16, 512, False),
  ("gradient", "int4", 256, 512, True),
  ("gradient", "nf4", 32, 130, False),
  ("gradient", "int8", 512, 512, False),
)
REFUSED = {("v4", "w8a8"), ("v4", "nf4")}
"""v4 has no matmul of int8, and no look-up in a register's rows."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("way", "kind", "group", "rows", "offset"), CASES)
@pytest.mark.parametrize("target", CHIPS)
def test_compiles(tmp_path, target, way, kind, group, rows, offset, dtype):
  case = Case(
    target, way, kind, group, rows, (128, 256, 256), dtype, offset, size=512
  )
  problem = chips_quantized.compile_to(case, tmp_path)
  if (target, kind) in REFUSED:
    assert problem is not None
    return
  assert problem is None
  # The matrix units have work: mostly of padding, if rows are few.
  found = chips_quantized.read(case, tmp_path)
  assert found.macs > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("way", ["few", "many", "gradient"])
@pytest.mark.parametrize("target", CHIPS)
def test_default_tiles_fit(tmp_path, target, way, dtype):
  tile = dataclasses.astuple(getattr(Config(), way))
  rows = 128 if way == "few" else 2048
  case = Case(target, way, "int4", 128, rows, tile, dtype, size=8192)
  assert chips_quantized.compile_to(case, tmp_path) is None


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("way", ["many", "gradient"])
def test_matrix_work_is_that_of_the_product(tmp_path, target, way):
  case = Case(target, way, "int4", 128, 512, (512, 512, 512), size=1024)
  assert chips_quantized.compile_to(case, tmp_path) is None
  found = chips_quantized.read(case, tmp_path)
  assert found.macs == pytest.approx(512**3, rel=0.01)


@pytest.mark.parametrize("target", ["v5e", "v5p"])
def test_decoding_is_bound_by_memory(tmp_path, target):
  """Fewer bundles than the cycles in which memory delivers the weights."""
  case = Case(target, "few", "int4", 128, 8, (8, 2048, 1024))
  assert chips_quantized.compile_to(case, tmp_path) is None
  chip = CHIPS[target]
  memory = case.bytes / (chip.bandwidth / chip.cores / chip.clock)
  assert chips_quantized.read(case, tmp_path).bundles < memory
