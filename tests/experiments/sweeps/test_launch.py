"""The local launcher: order, retries, failures, being asked to stop."""

import errno
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.sweeps import launch, work
from research.typing import UserError


class Script(work.Work):
  """Runs its configuration as Python instead of training it."""

  @property
  def command(self):
    return [sys.executable, "-S", str(self.config), str(self.workdir)]


def script(folder: pathlib.Path, name: str, text: str) -> Script:
  config = folder / f"{name}.gin"
  config.write_text("import pathlib, sys, time\n" + text)
  log = folder / f"{name}.log"
  return Script(name=name, config=config, workdir=folder / name, log=log)


class Recorded(work.Events):
  def __init__(self):
    self.ends, self.said = [], []

  def started(self, unit):
    self.said.append(("started", unit.name))

  def retried(self, unit, status):
    self.said.append((f"failed {status}", unit.name))

  def ended(self, unit, status, seconds):
    self.ends.append((unit.name, status))


def run(units, events=None, **more):
  events = events or Recorded()
  found = launch.local(units, interval=0.01, events=events, **more)
  assert dict(events.ends) == found
  return events.ends


def test_a_failure_stops_nobody(tmp_path):
  """It is run again after all others, once."""
  units = [
    script(tmp_path, name, f"print('out {name}'); sys.exit({code})")
    for name, code in [("a", 0), ("b", 3), ("c", 0)]
  ]
  events = Recorded()
  assert run(units, events) == [("a", 0), ("c", 0), ("b", 3)]
  assert (tmp_path / "b.log").read_text() == "out b\n" * 2
  assert events.said == [
    ("started", "a"),
    ("started", "b"),
    ("failed 3", "b"),
    ("started", "c"),
    ("started", "b"),
  ]


def test_a_failure_may_pass(tmp_path):
  text = """
path = pathlib.Path(sys.argv[1])
if not path.exists():
  path.mkdir()
  sys.exit(1)
"""
  assert run([script(tmp_path, "a", text)]) == [("a", 0)]


PREEMPTED = """
path = pathlib.Path(sys.argv[1])
path.mkdir(exist_ok=True)
print("life", len(list(path.iterdir())))
(path / str(time.time())).touch()
sys.exit(0 if len(list(path.iterdir())) > 2 else 42)
"""


def test_a_preempted_run_is_started_again(tmp_path):
  unit = script(tmp_path, "a", PREEMPTED)
  assert run([unit]) == [("a", 0)]
  assert unit.log.read_text() == "life 0\nlife 1\nlife 2\n"


UNREADY = """
import os, signal
path = pathlib.Path(sys.argv[1])
if not path.exists():
  path.touch()
  os.kill(os.getpid(), signal.SIGTERM)
"""


def test_so_is_one_that_was_asked_before_it_could_listen(tmp_path):
  assert run([script(tmp_path, "a", UNREADY)]) == [("a", 0)]


def test_but_not_for_ever(tmp_path, monkeypatch):
  monkeypatch.setattr(launch, "PREEMPTIONS", 2)
  unit = script(tmp_path, "a", "print('x'); sys.exit(42)")
  assert run([unit]) == [("a", 42)]
  assert unit.log.read_text() == "x\n" * 3


MEET = """
here = pathlib.Path(sys.argv[1])
here.touch()
end = time.time() + 20
while not (here.parent / OTHER).exists():
  time.sleep(0.01)
  assert time.time() < end
"""


def test_parallel_units_run_at_the_same_time(tmp_path):
  """Each waits for the other to begin."""
  units = [
    script(tmp_path, name, f"OTHER = {other!r}\n" + MEET)
    for name, other in (("a", "b"), ("b", "a"))
  ]
  assert sorted(run(units, parallel=2)) == [("a", 0), ("b", 0)]


SAVES = """
import signal
def stop(*_):
  print("saved")
  sys.exit(42)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).touch()
time.sleep(20)
"""


def when_exists(path, act):
  def wait():
    for _ in range(2000):
      if path.exists():
        return act()
      threading.Event().wait(0.01)

  threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_asks_to_stop_is_passed_on(tmp_path, number):
  """And nothing is started after it."""
  units = [script(tmp_path, name, SAVES) for name in "ab"]
  before = signal.getsignal(number)
  when_exists(units[0].workdir, lambda: os.kill(os.getpid(), number))
  assert run(units) == [("a", 42)]
  assert units[0].log.read_text() == "saved\n"
  assert not units[1].log.exists()
  assert signal.getsignal(number) == before


STAYS = """
import signal
asked = []
def stop(*_):
  asked.append(1)
  if len(asked) == 2:
    print("left")
    sys.exit(42)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).touch()
time.sleep(20)
"""


def test_a_second_interrupt_waits_for_nobody(tmp_path, monkeypatch):
  monkeypatch.setattr(launch, "SIGINT_DEBOUNCE", 0.1)
  unit = script(tmp_path, "a", STAYS)

  def interrupt():
    for pause in (0, 0.5):
      threading.Event().wait(pause)
      os.kill(os.getpid(), signal.SIGINT)

  when_exists(unit.workdir, interrupt)
  with pytest.raises(KeyboardInterrupt):
    run([unit])
  assert unit.log.read_text() == "left\n"


ENDED = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(0.5)
sys.exit(130)
"""


def test_one_that_the_terminal_ends_as_it_begins_is_run_again(tmp_path):
  """Ctrl-C reaches all of the terminal's processes."""
  unit = script(tmp_path, "a", ENDED)
  when_exists(unit.workdir, lambda: os.kill(os.getpid(), signal.SIGINT))
  assert run([unit]) == [("a", 42)]


# As long as a checkpoint takes: the folder stays locked for all of it.
SAVES_SLOWLY = SAVES.replace("  print", "  time.sleep(1)\n  print")

SWEEP = """
import os, pathlib, sys
from experiments.sweeps import launch, work
from tests.experiments.sweeps.test_launch import SAVES_SLOWLY, script
folder = pathlib.Path(sys.argv[1])
with work.lock(folder) as lock:
  launch.local([script(folder, "a", SAVES_SLOWLY)], lock=lock)
"""


def wait_for(condition, seconds=30):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs util-linux")
def test_a_killed_sweep_leaves_no_orphan(tmp_path):
  """Its unit saves and ends; until then nobody else may run units there."""
  sweep = subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path)])
  try:
    wait_for((tmp_path / "a").exists)
    with (
      pytest.raises(UserError, match=f"process {sweep.pid} runs this sweep"),
      work.lock(tmp_path),
    ):
      pass
  finally:
    sweep.kill()
    sweep.wait()

  def free():
    try:
      with work.lock(tmp_path):
        return True
    except UserError:
      return False

  wait_for(free)
  assert (tmp_path / "a.log").read_text() == "saved\n"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
  """Nobody else runs the sweep: the error must not say so."""

  def unsupported(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", unsupported)
  with (
    pytest.raises(UserError, match="cannot be locked .No locks"),
    work.lock(tmp_path),
  ):
    pass
