"""Runs that are killed, saves included, end as if nothing had happened.

`make test` kills ten times, by seed; `make soak` two hundred times, on tmpfs
and on disk. Each restart must succeed, nothing that was saved may be lost, and
the end must be bitwise the undisturbed run's.
"""

import os
import pathlib
import random
import signal
import tempfile
import time

import pytest

from tests.crash import kills, soak

KILLS = 10
TMPFS = pathlib.Path("/dev/shm")


@pytest.fixture(scope="module")
def server():
  with kills.server() as started:
    yield started


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
  """The undisturbed run: its result, and its seconds once it is compiled."""
  folder = tmp_path_factory.mktemp("whole")
  first, _ = kills.undisturbed(server, folder / "0")
  second, seconds = kills.undisturbed(server, folder / "1")
  assert first == second
  assert first["steps"] == [5, 10, 11, 12]
  return first, seconds


@pytest.mark.parametrize("place", ["disk", "tmpfs"])
@pytest.mark.slow
def test_drawn_kills(server, whole, tmp_path, place, capsys):
  if place == "tmpfs" and not TMPFS.is_dir():
    pytest.skip("needs /dev/shm")
  folder = TMPFS if place == "tmpfs" else tmp_path
  with tempfile.TemporaryDirectory(dir=folder) as scratch:
    tally = soak.run(
      server, pathlib.Path(scratch), *whole, kills=KILLS // 2, seed=1
    )
  assert tally.kills == KILLS // 2 and tally.runs >= 1
  with capsys.disabled():
    print(f"\n{place}: {soak.describe(tally)}")


@pytest.mark.slow
def test_a_kill_within_a_large_save_loses_nothing(server, tmp_path):
  """8 MB, killed at several moments between a draft and its renaming."""
  big = 500
  expected, seconds = kills.undisturbed(server, tmp_path / "whole", big)
  workdir, torn = tmp_path / "run", 0
  for pause in (0.0, 0.02, 0.05):
    pid = server.start(workdir, big)
    begun, end = len(kills.steps(workdir)), time.monotonic() + 60
    while time.monotonic() < end:
      if len(kills.steps(workdir)) > begun and kills.drafts(workdir):
        break
      time.sleep(0.0005)
    before = kills.steps(workdir)
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
    if server.wait() == 0:
      break  # it was faster
    torn += bool(kills.drafts(workdir))
    assert kills.steps(workdir)[-1] >= before[-1]
  assert torn >= 1
  tally = kills.Tally()
  draw = random.Random(0)
  kills.kill_until_done(
    server, workdir, expected, seconds, draw, tally, big=big, most=0
  )
  assert tally.runs == 1


def test_the_harness_notices(server, whole, tmp_path):
  """What a run loses or gets wrong is not overlooked."""
  expected, seconds = whole
  draw, tally = random.Random(0), kills.Tally()
  with pytest.raises(AssertionError, match="state: .* is not 0"):
    kills.kill_until_done(
      *(server, tmp_path / "a", expected | {"state": "0"}, seconds),
      *(draw, tally),
      most=0,
    )
  (tmp_path / "b" / "checkpoints" / "1").mkdir(parents=True)
  (tmp_path / "b" / "config.gin").write_text("another = 1\n")
  with pytest.raises(AssertionError, match="holds another experiment"):
    kills.kill_until_done(
      server, tmp_path / "b", expected, seconds, draw, tally, most=0
    )
