"""The local launcher: runs units on this machine.

A launcher for a cluster writes what the cluster's own engine takes (`slurm`,
`jobset`), and nothing else changes.
"""

import collections
import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.sweeps.work import PREEMPTED, Events, Work
from research.training.preemption import INTERRUPTED_EXIT, SIGINT_DEBOUNCE

CUT = (-signal.SIGINT, INTERRUPTED_EXIT)
"""Exit statuses of a run that Ctrl-C in the terminal ended as it began."""

PREEMPTIONS = 20
"""How often a preempted unit is restarted."""

FAILURES = 1
"""How often a failed unit is restarted, after all others."""


class _Try:
  """A unit that waits or runs, and what has happened to it.

  Attributes:
    work: the unit.
    preempted, failed: how often it was.
    begin: when it started, in seconds of the monotonic clock.
    process: that runs it.
  """

  def __init__(self, work: Work):
    self.work = work
    self.preempted = self.failed = 0
    self.begin = 0.0
    self.process: subprocess.Popen | None = None


def local(
  work: Sequence[Work],
  *,
  parallel: int = 1,
  events: Events | None = None,
  lock: int | None = None,
  interval: float | int = 0.1,
) -> dict[str, int]:
  """Runs units on this machine, `parallel` at a time, in order.

  A preempted unit is restarted at once, a failed one when no other waits. A
  SIGTERM to this process, or Ctrl-C, is passed on to all running units, and no
  unit starts after it. Should this process be killed, Linux sends its units a
  SIGTERM.

  Args:
    lock: descriptor that units inherit, see `work.lock`.

  Returns:
    Exit statuses; `PREEMPTED` for units that have to run again.
  """
  events = Events() if events is None else events
  waiting = collections.deque(_Try(w) for w in work)
  running: list[_Try] = []
  statuses: dict[str, int] = {}
  terminated = False
  with _catching_signals() as stopped:
    try:
      while running or (waiting and not stopped()):
        if stopped() and not terminated:
          terminated = True
          for one in running:
            one.process.terminate()
        while waiting and len(running) < parallel and not stopped():
          one = waiting.popleft()
          one.process, one.begin = _start(one.work, lock), time.monotonic()
          running.append(one)
          events.started(one.work)
        time.sleep(interval)
        events.tick()
        for one in [x for x in running if x.process.poll() is not None]:
          running.remove(one)
          status = one.process.returncode
          if status == -signal.SIGTERM or (stopped() and status in CUT):
            status = PREEMPTED  # before it had anything to save
          if _should_restart(one, status, stopped()):
            if status == PREEMPTED:
              waiting.appendleft(one)
            else:
              waiting.append(one)
              events.retried(one.work, status)
            continue
          statuses[one.work.name] = status
          events.ended(one.work, status, time.monotonic() - one.begin)
    finally:
      _end([one.process for one in running])
  return statuses


def _should_restart(one: _Try, status: int, stopped: bool) -> bool:
  """Counts how a unit ended; returns whether it runs again."""
  if status == PREEMPTED:
    one.preempted += 1
    return one.preempted <= PREEMPTIONS and not stopped
  if status:
    one.failed += 1
    return one.failed <= FAILURES and not stopped
  return False


def _start(unit: Work, lock: int | None) -> subprocess.Popen:
  # Appended, so that a resumed run keeps its earlier output.
  with unit.log.open("ab") as log:
    return subprocess.Popen(
      _ends_with_this_process(unit.command),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      pass_fds=() if lock is None else (lock,),
    )


def _ends_with_this_process(command: Sequence[str]) -> list[str]:
  """Returns a command that gets SIGTERM when this process ends, on Linux."""
  setpriv = shutil.which("setpriv")  # util-linux
  tie = [] if setpriv is None else [setpriv, "--pdeathsig", "TERM"]
  return [*tie, *command]


@contextlib.contextmanager
def _catching_signals() -> Iterator[Callable[[], bool]]:
  """Catches SIGTERM and Ctrl-C; yields a function: was there one?

  Raises:
    KeyboardInterrupt: a second Ctrl-C.
  """
  times: list[float] = []

  def handle(number: int, frame: Any) -> None:
    now = time.monotonic()
    if times and number == signal.SIGINT and now - times[0] > SIGINT_DEBOUNCE:
      raise KeyboardInterrupt
    times.append(now)

  numbers = signal.SIGTERM, signal.SIGINT
  before = [signal.signal(number, handle) for number in numbers]
  try:
    yield lambda: bool(times)
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen], patience: float = 30.0) -> None:
  """Ends processes of an interrupted launcher; a run saves first."""
  for process in processes:
    process.terminate()
  for process in processes:
    try:
      process.wait(patience)
    except subprocess.TimeoutExpired:
      process.kill()
