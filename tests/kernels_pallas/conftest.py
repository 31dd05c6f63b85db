"""Fixtures shared by tests of several kernels."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import cpu_library


@pytest.fixture(name="cxx", scope="session")
def _cxx():
  """Returns the path of a C++ compiler; skips where there is none."""
  try:
    return cpu_library.compiler()
  except cpu_library.LibraryUnavailable as error:
    pytest.skip(str(error))


@pytest.fixture(name="tpu_interpreter")
def _tpu_interpreter():
  """Two cores with race detection, over memory initialized to NaN."""
  yield pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    random_seed=3,
    num_cores_or_threads=2,
  )
  pltpu.reset_tpu_interpret_mode_state()
