"""A process that fails ends the run: nobody waits for it for minutes."""

import re
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


FIRST = """
import sys, time
from experiments.core import cli, runtime
flags = cli.new_flags(cluster=True)
flags(sys.argv)
with runtime.cluster(cli.cluster(flags)):
  def act():
    time.sleep({seconds} if runtime.is_first_process() else 0)
    print("acted", time.time(), flush=True)
  runtime.first_process_first(act)
"""


@pytest.mark.slow
def test_others_wait_for_the_first_process_as_long_as_it_takes():
  """Longer than collectives on CPUs do, such as for a lock on NFS."""
  done = launch(["-c", FIRST.format(seconds=45)])
  assert [x.status for x in done] == [0, 0], done[0].err + done[1].err
  # Gloo writes to the same stream, behind the first one's.
  first, second = (
    float(re.search(r"^acted (\S+)$", x.out, re.M)[1]) for x in done
  )
  assert first < second
