"""Decoding through the compiler for absent GPUs; its PTX in NumPy.

Errors in addresses, swizzles, fragments, waits and barriers are detected, as
the tests with left-out instructions show.
"""

import functools
import re

import numpy as np
import pytest

from kernels_pallas.inspect import gpu
from tests.kernels_pallas import chips_decode_gpu as chips
from tests.kernels_pallas.chips_decode_gpu import Case

pytestmark = [
  pytest.mark.chips,
  pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing())),
]

measure = functools.cache(chips.measure)


@pytest.mark.parametrize("case", chips.TABLE, ids=str)
def test_compiles_without_a_spill(case):
  found, _ = measure(case)
  _, _, H, Hv = case.heads
  size = 1 if case.code else 2
  keys, mine = 64 if size * (H + Hv) <= 512 else 32, 16
  # Per warp: scores of its keys, and the products with their values.
  matmuls = mine // 8 * (H // 16) + mine // 16 * (Hv // 8)
  assert found.loop["mma"] == matmuls
  copies = keys * (H + Hv) * size / (16 * 128)
  assert found.loop["copy"] == copies + (case.code is not None)
  # Operands by `ldmatrix`, four at a time, except keys in rows of 64 bytes,
  # two at a time; one barrier, for the tile.
  loads = H // 16 + matmuls // 4 * size + 2 * (H * size < 128)
  assert found.loop["matrix"] == loads
  assert found.loop["barrier"] == 1
  assert found.spills == 0 and not found.warnings
  # An Ada has 101,376 bytes.
  assert found.shared <= 101_376


ROWS = {"lens": (150, 0, 12, 200), "new": (1, 1, 12, 3), "queries": 8}
CASES = {
  "cache": Case(),
  "each_its_own": Case("h100", heads=(2, 2, 128, 64)),
  "groups_of_three": Case(heads=(6, 2, 64, 64), splits=4, window=70),
  "groups_of_eight": Case(
    "h100", heads=(16, 2, 64, 64), page=16, splits=4, window=70
  ),
  "wide": Case(
    heads=(6, 2, 256, 256), lens=(150, 0, 130), page=128, softcap=3.0
  ),
  "two_parts": Case(
    "h100", heads=(24, 1, 64, 64), lens=(150, 0, 30), dtype="float16"
  ),
  "one_part": Case(
    heads=(40, 1, 64, 64), lens=(150, 0, 30), dtype="float16", splits=2
  ),
  "neither": Case(
    heads=(4, 2, 64, 128), page=96, window=60, splits=2, **ROWS
  ),
  "int8": Case(heads=(8, 2, 64, 128), page=16, window=70, code="int8"),
  "int8_wide": Case(
    "h100", heads=(8, 2, 256, 64), page=128, code="int8"
  ),
  "float8": Case(
    "h100", page=96, splits=2, softcap=5.0, code="float8_e4m3fn"
  ),
  "float8_prompts": Case(
    heads=(16, 2, 128, 256), page=128, code="float8_e4m3fn",
    **ROWS,
  ),
  "prompts": Case("h100", heads=(16, 2, 128, 128), page=16, splits=2, **ROWS),
  "blackwell": Case(
    "b200", heads=(16, 2, 128, 64), page=16, splits=2, window=70, softcap=5.0,
  ),
  "blackwell_float8": Case("b200", page=128, code="float8_e4m3fn"),
}  # fmt: skip


@pytest.mark.parametrize("late", [True, False], ids=["late", "at_once"])
@pytest.mark.parametrize("name", CASES)
def test_the_instructions_compute_attention(name, late):
  """With NaN in invisible places, which are not even read."""
  case = CASES[name]
  found, text = measure(case)
  assert found.spills == 0
  (o, lse), copied = chips.emulated(case, text, late=late)
  exact, exact_lse = chips.exact(case)
  assert copied == chips.least(case)
  np.testing.assert_allclose(lse, exact_lse, rtol=2e-6, atol=2e-6)
  # Probabilities are rounded to 8 bits, or 11, of values up to 4.
  bound = 4 * 2.0 ** (-11 if case.dtype == "float16" else -8)
  assert np.abs(o - exact).max() <= bound and np.abs(exact).max() > 0.3


@pytest.mark.parametrize(
  "instruction", [r"bar\.sync %r\d+, 128", r"cp\.async\.wait_group.*"]
)
def test_a_missing_wait_is_detected(instruction):
  case = CASES["cache"]
  text, count = re.subn(instruction + ";", "", measure(case)[1])
  assert count
  (o, _), _ = chips.emulated(case, text)
  exact, _ = chips.exact(case)
  assert not np.abs(o - exact).max() < 0.1
