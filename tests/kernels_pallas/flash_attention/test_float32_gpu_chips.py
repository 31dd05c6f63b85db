"""Why GPU kernels do not support float32: no tensor core multiplies it.

Hopper's tensor cores use the upper 19 bits of each operand (TF32, 10 of
fraction), less than float32 requires; on the others compilation fails.
"""

import pytest

from kernels_pallas.inspect import gpu
from tests.kernels_pallas import chips_float32_gpu as chips

pytestmark = [
  pytest.mark.chips,
  pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing())),
]

REFUSALS = {
  "a100": r"operand #1 must be vector of A type .*got 'vector<128x32xf32>'",
  "b200": "Unsupported input element type: tf32",
}


@pytest.mark.parametrize("target", REFUSALS)
def test_the_compiler_rejects_float32(target):
  with pytest.raises(ValueError, match=REFUSALS[target]):
    chips.operands(target)


def test_hopper_rounds_float32():
  assert chips.operands("h100") == "tf32"
