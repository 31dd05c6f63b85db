"""The products with packed weights through the compiler for an H100."""

import pytest

from kernels_pallas.inspect import gpu
from tests.kernels_pallas import chips_quantized_gpu
from tests.kernels_pallas.chips_quantized_gpu import Case

pytestmark = [
  pytest.mark.chips,
  pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing())),
]

CASES = (
  *chips_quantized_gpu.TABLE,
  Case(dtype="float16"),
  Case(bits=8, group=16, offset=True, rows=100),
  Case(direction="gradient", group=16, offset=True, rows=60),
  Case(size=384, group=64, direction="gradient"),  # one warpgroup
  Case(operand="shared", rows=64),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_for_hopper_without_a_spill(case):
  found = chips_quantized_gpu.measure(case)
  # 16 inputs each: of a block of words forward, of 64 outputs back.
  operands = 4 if case.bits == 8 else 8
  assert found.loop["wgmma"] == operands
  assert found.total["copy"] >= 3  # noqa: PLR2004
  assert found.spills == 0 and not found.warnings
  assert found.shared <= 232_448  # noqa: PLR2004
  # Nothing travels between threads until results leave.
  assert not found.loop.get("shuffle")
