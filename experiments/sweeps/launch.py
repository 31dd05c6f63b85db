"""Launchers: functions from units of work to exit statuses.

`local` runs them on this machine. A launcher for a cluster is another function
of this type, and nothing else changes.
"""

import collections
import contextlib
import dataclasses
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from research.training.preemption import (
  INTERRUPTED_EXIT,
  SIGINT_DEBOUNCE,
  Preempted,
)

PREEMPTED = Preempted.exit_status
"""Exit status of a run that stopped and saved on request."""

CUT = (-signal.SIGINT, INTERRUPTED_EXIT)
"""Exit statuses of a run that Ctrl-C in the terminal ended as it began."""

RETRIES = 20
"""How often a preempted run is restarted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A run to start.

  Attributes:
    name: of the unit.
    config: a gin file that is complete.
    workdir: the run's; the run resumes if it exists.
    log: the file for the run's output.
    options: further flags of the run.
  """

  name: str
  config: pathlib.Path
  workdir: pathlib.Path
  log: pathlib.Path
  options: tuple[str, ...] = ()

  @property
  def command(self) -> list[str]:
    """The command that starts the run, and resumes it after a preemption."""
    train = [sys.executable, "-m", "experiments.train"]
    files = f"--config={self.config}", f"--workdir={self.workdir}"
    return [*train, *files, *self.options]


Launcher = Callable[[Sequence[Work]], Mapping[str, int]]
"""Units -> exit statuses by name; without those that were not started."""


def local(
  work: Sequence[Work],
  *,
  parallel: int = 1,
  on_end: Callable[[Work, int, float], None] = lambda *_: None,
  interval: float | int = 0.1,
) -> dict[str, int]:
  """Runs units on this machine, `parallel` at a time, in order.

  A preempted run is restarted. A SIGTERM to this process, or Ctrl-C, is passed
  on to all running units, and no unit starts after it.

  Args:
    work: the units.
    parallel: processes at a time.
    on_end: called with each unit that ends, its exit status and its seconds.
    interval: seconds between polls of running processes.

  Returns:
    Exit statuses; `PREEMPTED` for units that have to run again.
  """
  waiting = collections.deque((w, 0) for w in work)
  running: dict[str, tuple[Work, int, float, subprocess.Popen]] = {}
  statuses: dict[str, int] = {}
  terminated = False
  with _catching_signals() as stopped:
    try:
      while running or (waiting and not stopped()):
        if stopped() and not terminated:
          terminated = True
          for *_, process in running.values():
            process.terminate()
        while waiting and len(running) < parallel and not stopped():
          unit, tries = waiting.popleft()
          running[unit.name] = unit, tries, time.monotonic(), _start(unit)
        time.sleep(interval)
        for unit, tries, begin, process in list(running.values()):
          status = process.poll()
          if status is None:
            continue
          del running[unit.name]
          if status == -signal.SIGTERM or (stopped() and status in CUT):
            status = PREEMPTED  # before it had anything to save
          if status == PREEMPTED and tries < RETRIES and not stopped():
            waiting.appendleft((unit, tries + 1))
            continue
          statuses[unit.name] = status
          on_end(unit, status, time.monotonic() - begin)
    finally:
      _end([process for *_, process in running.values()])
  return statuses


def _start(unit: Work) -> subprocess.Popen:
  # Appended, so that a resumed run keeps its earlier output.
  with unit.log.open("ab") as log:
    return subprocess.Popen(
      unit.command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
    )


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
