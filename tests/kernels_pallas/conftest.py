"""What tests of several kernels share."""

import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture(name="tpu_interpreter")
def _tpu_interpreter():
  """Two cores that find races, over memory that starts as NaN."""
  yield pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    random_seed=3,
    num_cores_or_threads=2,
  )
  pltpu.reset_tpu_interpret_mode_state()
