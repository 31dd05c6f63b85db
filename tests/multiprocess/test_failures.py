"""A process that fails ends the run: nobody waits for it for minutes."""

import time

import pytest

from tests.multiprocess.launcher import launch

pytestmark = pytest.mark.multiprocess

# Those that do not fail wait for all others.
FAIL = """
from jax.experimental import multihost_utils
import jax
from experiments.core import cli, runtime
from research.typing import UserError
FLAGS = cli.new_flags(cluster=True)
def main(argv):
  with runtime.cluster(cli.cluster(FLAGS)):
    if jax.process_index() in {failing}:
      raise UserError("no luck today")
    multihost_utils.sync_global_devices("all")
cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
@pytest.mark.sample(3)
def test_an_error_in_one_process_ends_all(failing):
  begin = time.monotonic()
  done = launch(["-c", FAIL.format(failing=failing)])
  # JAX's own patience is 300 s.
  assert time.monotonic() - begin < 100
  for i, process in enumerate(done):
    assert process.status != 0
    if i in failing:
      assert (process.status, process.out) == (1, ""), process.err
      assert "error: no luck today\n" in process.err
