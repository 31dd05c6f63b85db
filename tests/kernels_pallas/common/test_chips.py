"""The table of chips, against the arithmetic of their units."""

import pathlib
import re

import pytest

from kernels_pallas.common import chips
from kernels_pallas.inspect import chips as inspected
from kernels_pallas.inspect import gpu

UNITS = 4
"""Matrix units of a TPU core, of every version (Cloud TPU's documentation)."""


def test_schedules_are_of_all_tpus():
  assert {x: y.spec for x, y in inspected.CHIPS.items()} == chips.TPUS


@pytest.mark.parametrize("name", inspected.CHIPS)
def test_a_peak_is_that_of_all_matrix_units(name):
  """2 FLOPs for each element of a unit and cycle, to a TFLOP/s."""
  chip = inspected.CHIPS[name]
  places = chip.cores * UNITS * chip.mxu**2
  assert chip.peak / 1e12 == round(2 * places * chip.clock / 1e12)


# Multiprocessors, FLOPs of one per cycle (bfloat16, dense), boost clock in Hz.
GPUS = {
  "a100": (108, 2048, 1.41e9),
  "h100": (132, 4096, 1.83e9),
  "h200": (132, 4096, 1.83e9),
  "b200": (148, 8192, 1.85e9),
}


@pytest.mark.parametrize("name", GPUS)
def test_a_peak_is_that_of_all_tensor_cores(name):
  count, flops, clock = GPUS[name]
  # Data sheets round B200's 2,243 to 2,250.
  assert chips.CHIPS[name].flops == pytest.approx(
    count * flops * clock, rel=4e-3
  )


@pytest.mark.parametrize("name", gpu.TARGETS)
def test_bandwidths_are_those_that_xla_compiles_for(name):
  file = pathlib.Path(gpu.__file__).parent / f"{name}.textproto"
  (found,) = re.findall(r"memory_bandwidth: (\d+)", file.read_text())
  assert chips.CHIPS[name].bandwidth == pytest.approx(float(found), rel=1e-3)


def test_a_chip_is_found_by_the_kind_that_jax_gives():
  for chip in chips.CHIPS.values():
    assert chips.find_by_kind(chip.kind) is chip
  assert chips.find_by_kind("NVIDIA H100 PCIe") is None
