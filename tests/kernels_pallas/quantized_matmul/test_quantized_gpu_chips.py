"""The products with packed weights through the compiler for GPUs.

The PTX of the `mma` kernels is run in NumPy: decoding, registers, copies and
waits.
"""

import dataclasses
import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.inspect import gpu
from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.activations import quantize_rows
from tests.kernels_pallas import chips_quantized_gpu as chips
from tests.kernels_pallas.chips_quantized_gpu import Case

pytestmark = [
  pytest.mark.chips,
  pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing())),
]

CASES = (
  *(c for c in chips.TABLE if c.target == "h100" and not c.codes),
  Case(dtype="float16"),
  Case(bits=8, group=16, offset=True, rows=100),
  Case(direction="gradient", group=16, offset=True, rows=60),
  Case(size=384, group=64, direction="gradient"),  # one warpgroup
  Case(operand="shared", rows=64),
)

measure = functools.cache(chips.measure)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_for_hopper_without_a_spill(case):
  found, _ = measure(case)
  # 16 inputs each: of a block of words forward, of 64 outputs in the gradient.
  operands = 4 if case.bits == 8 else 8
  assert found.loop["wgmma"] == operands
  assert found.total["copy"] >= 3  # noqa: PLR2004
  assert found.spills == 0 and not found.warnings
  assert found.shared <= 232_448  # noqa: PLR2004
  # No communication between threads until results are stored.
  assert not found.loop.get("shuffle")


OTHERS = (
  *(c for c in chips.TABLE if c.target != "h100" or c.codes),
  Case(dtype="float16", target="a100"),
  Case(bits=8, group=16, offset=True, rows=100, target="b200"),
  Case(direction="gradient", group=16, offset=True, rows=60, target="a100"),
)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_compiles_for_others_without_a_spill(case):
  found, _ = measure(case)
  p, t, names = chips.planned(case)
  pieces = t.groups * p.num_halves  # of 64 x 64 weights
  size = 1 if case.codes else 2  # bytes of a row's number
  assert found.loop["mma"] == pieces * 2 * size * t.rows // 8
  # A warp's four matrices of 8 x 8 at a time: forward each half of a block has
  # its own; the gradient's serve both, and scales of neighbours come in pairs.
  forward = case.direction == "forward"
  # A row of 64 codes has 64 bytes: two matrices at a time.
  read = (p.num_halves if forward else 1) * 4 * t.rows // 16
  scales = 0 if forward else 2 * t.groups * p.scales * (len(names) - 2)
  assert found.loop["matrix"] == read + scales
  copies = t.rows * p.depth * size // 2048 + t.groups * len(names)
  assert found.loop["copy"] == copies
  assert found.loop["barrier"] == 1 and not found.loop.get("shuffle")
  assert found.spills == 0 and not found.warnings
  assert found.shared <= chips.SHARED


SMALL = {
  "symmetric": Case(rows=20, size=256, target="a100"),
  "blackwell": Case(rows=20, size=256, target="b200", group=64),
  # A ring buffer that is refilled, and splits of the summed axis.
  "ring": Case(rows=20, size=896, target="a100", group=32, offset=True),
  "runs": Case(rows=20, size=1024, target="b200", group=64),
  "gradient_runs": Case(direction="gradient", rows=20, size=640, target="a100",
                        group=32, offset=True),
  "offsets": Case(rows=33, size=256, target="a100", group=32, offset=True),
  "half": Case(rows=20, size=256, target="a100", dtype="float16",
               scales="float16"),
  "wide": Case(rows=20, size=256, target="a100", group=32, offset=True,
               scales="float32"),
  "wide_blackwell": Case(rows=20, size=256, target="b200", scales="float32"),
  "bytes": Case(bits=8, group=16, rows=20, size=256, target="a100"),
  "nf4": Case(rows=20, size=256, target="a100", group=64, codebook="nf4"),
  "nf4_wide": Case(rows=20, size=256, target="b200", group=64, codebook="nf4",
                   scales="float32"),
  "nf4_gradient": Case(direction="gradient", rows=20, size=256, target="a100",
                       group=64, codebook="nf4", dtype="float16"),
  "codes": Case(bits=8, group=256, rows=40, size=256, target="a100",
                codes=True, scales="float32"),
  "codes_blackwell": Case(bits=8, group=256, rows=8, size=256, target="b200",
                          codes=True, scales="float32"),
  "gradient": Case(direction="gradient", rows=100, size=256, target="a100"),
  "gradient_offsets": Case(direction="gradient", group=16, offset=True, rows=8,
                           size=256, target="b200"),
  "gradient_bytes": Case(direction="gradient", bits=8, rows=20, size=256,
                         dtype="float16", target="b200"),
}  # fmt: skip


def error(case, text, **how):
  """The emulated result's error, relative to the rounding bound."""
  x, w = chips.operands(case)
  if case.codes:
    codes, unit = quantize_rows(x)
    x = codes.astype(jnp.float32) * unit
  found = chips.emulated(case, text, **how)
  # Entries are rounded to the type of the rows.
  entries = np.asarray(jnp.asarray(w.codebook, case.dtype), np.float64)
  w = dataclasses.replace(w, codebook=tuple(map(float, entries)))
  matrix = np.asarray(planar.dense(w), np.float64)
  matrix = matrix if case.direction == "forward" else matrix.T
  x = np.asarray(x, np.float64)
  exact, size = x @ matrix, np.abs(x) @ np.abs(matrix)
  # Weights and results are rounded, to 8 bits or 11; sums are of float32.
  unit = 2.0 ** (-11 if case.dtype == "float16" else -8)
  if case.codes:
    unit = 0.0  # sums of integers are exact, and scaled in float32
  bound = unit * (size + np.abs(exact)) + 2.0**-20 * size
  return np.max(np.abs(found - exact) / bound)


@pytest.mark.parametrize(
  ("name", "splits"), [("ring", 1), ("runs", 2), ("gradient_runs", 2)]
)
def test_ring_buffers_are_refilled(name, splits):
  p, t, _ = chips.planned(SMALL[name])
  assert p.steps // t.splits + (p.steps > t.stages) > t.stages
  assert t.splits == splits


@pytest.mark.parametrize("late", [True, False], ids=["late", "at_once"])
@pytest.mark.parametrize("name", SMALL)
def test_the_instructions_compute_the_product(name, late):
  found, text = measure(SMALL[name])
  assert found.spills == 0
  assert error(SMALL[name], text, late=late) <= 1


@pytest.mark.parametrize(
  ("instruction", "late"),
  [
    (r"bar\.sync %r\d+, 128", True),
    (r"bar\.sync %r\d+, 128", False),
    (r"cp\.async\.wait_group.*", True),
  ],
)
def test_a_missing_wait_is_detected(instruction, late):
  """Immediate copies are too early for pending readers, late ones too late."""
  case = SMALL["ring"]
  text, count = re.subn(instruction + ";", "", measure(case)[1])
  assert count
  assert not error(case, text, late=late) <= 1
