"""A process that fails ends the run: nobody waits for it for minutes."""

import re
import time

import pytest

from tests.multiprocess.launcher import launch
from tests.research.training.checkpoints.test_run_lock import locked_by_another

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


LOCK = """
import contextlib, sys
from experiments.core import cli, runtime
from research.io import folders
from research.training.checkpoints import run_lock
FLAGS = cli.new_flags(cluster=True)
def main(argv):
  def act():
    with run_lock.locked(folders.folder({folder!r})):
      return 1
  with runtime.cluster(cli.cluster(FLAGS)):
    runtime.first_process_first(act)
cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_run_that_waits_for_a_lock_is_preempted_at_once(tmp_path, number):
  """The first process waits for another machine, the second one for it."""
  ended = []

  def during(running):
    # Its warning comes once JAX has connected the processes.
    assert "waits up to" in running[0].stderr.readline()
    begin = time.monotonic()
    running[number].terminate()
    for process in running:
      process.wait(60)
    ended.append(time.monotonic() - begin)

  with locked_by_another(tmp_path, "elsewhere"):
    done = launch(["-c", LOCK.format(folder=str(tmp_path))], during=during)
  assert [x.status for x in done] == [42, 42], done[0].err + done[1].err
  assert all("nothing had to be saved" in x.err for x in done)
  # JAX tells processes of a signal within a second; two cores are busy.
  assert ended[0] < 20
