"""Signal handling of processes in different states."""

import dataclasses
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import multihost_utils

from research.training import preemption, state
from research.training.checkpoints import checkpoint, writers
from research.typing import UserError


@pytest.fixture(scope="module")
def ended():
  done = subprocess.run(
    [sys.executable, "-m", "tests.research.training.signalled"],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["term", "int"])
@pytest.mark.sample(2)
def test_with_nothing_to_save_it_ends_at_once(ended, name):
  """Not as an error of the interrupted work; while compiling, in seconds."""
  for doing in ("idle", "compiling"):
    status, seconds, said = ended[f"{doing} {name}"]
    assert status == preemption.Preempted.exit_status == 42
    assert seconds < preemption.GRACE_SECONDS + 5
    assert "asked to stop; nothing had to be saved" in said
  assert ended["swallowing int"][0] == ended["finishing term"][0] == 42


@pytest.mark.parametrize("name", ["term", "int", "both"])
def test_with_steps_to_save_it_saves_them(ended, name):
  status, _, said = ended[f"training {name}"]
  assert status == 7  # saved
  assert ("Ctrl-C again ends it at once" in said) == (name == "int")


def test_a_second_ctrl_c_ends_it_at_once(ended):
  status, seconds, said = ended["computing int int"]
  assert (status, said.strip().splitlines()[-1]) == (130, "interrupted")
  assert seconds < 5
  assert ended["computing term term int int"][0] == 130
  # One that a parent passes on is the same one: killed in the end.
  assert ended["computing int, bounced"][0] == -signal.SIGKILL


def test_nothing_is_left_behind():
  before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with preemption.handling_signals():
    inside = signal.getsignal(signal.SIGINT)
    assert isinstance(inside, preemption.StopRequest)
    with pytest.raises(preemption.Preempted), preemption.handling_signals():
      signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is inside
  found = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  assert found == before


@pytest.mark.parametrize("alone", [False, True])
def test_a_signal_while_processes_meet_waits_for_how_many_they_are(
  monkeypatch, alone
):
  """Others would wait for one that left: JAX's handler tells them instead."""
  told = []
  before = signal.signal(signal.SIGTERM, lambda *_: told.append(1))
  try:
    with preemption.handling_signals() as request:
      signal.signal(signal.SIGTERM, lambda *_: told.append(1))  # JAX's

      def meet():
        signal.raise_signal(signal.SIGINT)
        return alone

      monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
      monkeypatch.setattr(preemption, "_is_alone", meet)
      if alone:
        with pytest.raises(preemption.Interrupted):
          request.connected()
      else:
        request.connected()
      assert told == [1] and request.requested and request.alone == alone
  finally:
    signal.signal(signal.SIGTERM, before)


class SyncManager:
  """What JAX's manager of sync points does, in its C++.

  A notice makes a sync point of the number after the last that it was asked
  about, by any process; it is reached when it is asked about that very number.
  """

  def __init__(self):
    self.last, self.sync_point = 0, -1

  def notice(self):
    self.sync_point = self.last + 1

  def reached(self, number):
    self.last = number
    return number == self.sync_point


@pytest.fixture
def manager(monkeypatch):
  made, name = SyncManager(), "reached_preemption_sync_point"
  monkeypatch.setattr(multihost_utils, name, made.reached)
  return made


def test_a_notice_between_the_loops_of_stages_stops_the_next_one(manager):
  points = preemption.StopPoints()
  assert not any(points.reached() for _ in range(9))
  manager.notice()
  assert preemption.StopPoints().reached()


def test_a_wait_with_nothing_to_save_ends_on_a_notice(manager):
  """Only while the others wait as well: else they are at other stop points."""
  last = preemption.last_stop_point()
  preemption.leave_if_asked()
  assert preemption.last_stop_point() == last
  with preemption.others_waiting():
    preemption.leave_if_asked()
    manager.notice()
    with pytest.raises(preemption.Preempted, match="nothing had to be saved"):
      preemption.leave_if_asked()
  # What comes within the wait and is not seen there stops the loops of all.
  with preemption.others_waiting():
    preemption.leave_if_asked()
  manager.notice()
  assert preemption.StopPoints().reached()


@pytest.mark.parametrize("step", [3, 5000])
def test_a_notice_within_a_save_stops_the_run_after_it(
  step, manager, tmp_path, monkeypatch
):
  """Orbax asks JAX, too, in each save; the steps of a run that resumes are
  larger than the numbers of its stop points."""
  wait = writers.wait

  def notice(*arguments):
    manager.notice()
    return wait(*arguments)

  monkeypatch.setattr(writers, "wait", notice)
  points = preemption.StopPoints()
  assert not any(points.reached() for _ in range(9))
  made = state.create({"a": jnp.ones(3)}, "a", optax.sgd(1.0))
  made = dataclasses.replace(made, step=jnp.int32(step))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(made)
  assert points.reached()


def test_a_save_that_takes_too_long_is_announced(monkeypatch):
  monkeypatch.delenv(preemption.GRACE_VARIABLE, raising=False)
  assert preemption.SaveTimes(10**15).too_long(True) is None
  monkeypatch.setenv(preemption.GRACE_VARIABLE, "30")
  times = preemption.SaveTimes(10 * 10**9)  # at 100 MB/s
  said = times.too_long(False)
  assert "about 100 s, by its size; a launcher kills a run 30 s after" in said
  # Once while nobody asks the run to stop; then whenever it matters.
  assert times.too_long(False) is None and times.too_long(True) == said
  times.measured(29.0)
  assert times.too_long(True) is None
  times.measured(31.0)
  assert "about 31 s, as long as the last one" in times.too_long(True)
  assert preemption.SaveTimes(10**9).too_long(True) is None
  monkeypatch.setenv(preemption.GRACE_VARIABLE, "soon")
  with pytest.raises(UserError, match="HEPTAD_GRACE_SECONDS=soon: expected"):
    preemption.SaveTimes(1)
