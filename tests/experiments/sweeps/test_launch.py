"""The local launcher: order, retries, failures, being asked to stop."""

import os
import pathlib
import signal
import sys
import threading

import pytest

from experiments.sweeps import launch


class Script(launch.Work):
  """Runs its configuration as Python instead of training it."""

  @property
  def command(self):
    return [sys.executable, "-S", str(self.config), str(self.workdir)]


def script(folder: pathlib.Path, name: str, text: str) -> Script:
  config = folder / f"{name}.gin"
  config.write_text("import pathlib, sys, time\n" + text)
  log = folder / f"{name}.log"
  return Script(name=name, config=config, workdir=folder / name, log=log)


def run(work, **more):
  ended = []
  found = launch.local(
    work,
    interval=0.01,
    on_end=lambda unit, status, _: ended.append((unit.name, status)),
    **more,
  )
  assert dict(ended) == found
  return ended


def test_a_failure_stops_nobody(tmp_path):
  work = [
    script(tmp_path, name, f"print('out {name}'); sys.exit({code})")
    for name, code in [("a", 0), ("b", 3), ("c", 0)]
  ]
  assert run(work) == [("a", 0), ("b", 3), ("c", 0)]
  assert (tmp_path / "b.log").read_text() == "out b\n"


PREEMPTED = """
path = pathlib.Path(sys.argv[1])
path.mkdir(exist_ok=True)
print("life", len(list(path.iterdir())))
(path / str(time.time())).touch()
sys.exit(0 if len(list(path.iterdir())) > 2 else 42)
"""


def test_a_preempted_run_is_started_again(tmp_path):
  work = script(tmp_path, "a", PREEMPTED)
  assert run([work]) == [("a", 0)]
  assert work.log.read_text() == "life 0\nlife 1\nlife 2\n"


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
  monkeypatch.setattr(launch, "RETRIES", 2)
  work = script(tmp_path, "a", "print('x'); sys.exit(42)")
  assert run([work]) == [("a", 42)]
  assert work.log.read_text() == "x\n" * 3


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
  work = [
    script(tmp_path, name, f"OTHER = {other!r}\n" + MEET)
    for name, other in (("a", "b"), ("b", "a"))
  ]
  assert sorted(run(work, parallel=2)) == [("a", 0), ("b", 0)]


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
  work = [script(tmp_path, name, SAVES) for name in "ab"]
  before = signal.getsignal(number)
  when_exists(work[0].workdir, lambda: os.kill(os.getpid(), number))
  assert run(work) == [("a", 42)]
  assert work[0].log.read_text() == "saved\n"
  assert not work[1].log.exists()
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
  work = script(tmp_path, "a", STAYS)

  def interrupt():
    for pause in (0, 0.5):
      threading.Event().wait(pause)
      os.kill(os.getpid(), signal.SIGINT)

  when_exists(work.workdir, interrupt)
  with pytest.raises(KeyboardInterrupt):
    run([work])
  assert work.log.read_text() == "left\n"


ENDED = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(0.5)
sys.exit(130)
"""


def test_one_that_the_terminal_ends_as_it_begins_is_run_again(tmp_path):
  """Ctrl-C reaches all of the terminal's processes."""
  work = script(tmp_path, "a", ENDED)
  when_exists(work.workdir, lambda: os.kill(os.getpid(), signal.SIGINT))
  assert run([work]) == [("a", 42)]
