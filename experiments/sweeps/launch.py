"""Launchers: functions from units of work to exit statuses.

So far there is `local`, which runs them here. One for a cluster is another
function of this type, and nothing else changes.
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
"""What a run exits with that was asked to stop, and has saved."""

CUT = (-signal.SIGINT, INTERRUPTED_EXIT)
"""What one exits with that Ctrl-C ended, the terminal's own, as it began."""

RETRIES = 20
"""How often a preempted run is started again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A run to be made.

  Attributes:
    name: for people.
    config: a gin file, whole in itself.
    workdir: the run's; going on where it stands, if it exists.
    log: gets what the run says.
    options: further flags of the run.
  """

  name: str
  config: pathlib.Path
  workdir: pathlib.Path
  log: pathlib.Path
  options: tuple[str, ...] = ()

  @property
  def command(self) -> list[str]:
    """What runs it, and runs it again after a preemption."""
    train = [sys.executable, "-m", "experiments.train"]
    files = f"--config={self.config}", f"--workdir={self.workdir}"
    return [*train, *files, *self.options]


Launcher = Callable[[Sequence[Work]], Mapping[str, int]]
"""Names' exit statuses; what was not started is missing."""


def local(
  work: Sequence[Work],
  *,
  parallel: int = 1,
  on_end: Callable[[Work, int, float], None] = lambda *_: None,
  interval: float | int = 0.1,
) -> dict[str, int]:
  """Runs everything here, `parallel` at a time, in order.

  One that is preempted is started again. A SIGTERM to this process, or Ctrl-C,
  goes on to all that are running, and nothing is started after it.

  Args:
    work: what to run.
    parallel: processes at a time.
    on_end: called with each that ends, its exit status and its seconds.
    interval: seconds between looks at what is running.

  Returns:
    Exit statuses; `PREEMPTED` is of what has to be run again.
  """
  waiting = collections.deque((w, 0) for w in work)
  running: dict[str, tuple[Work, int, float, subprocess.Popen]] = {}
  statuses: dict[str, int] = {}
  told = False
  with _asked_to_stop() as stopped:
    try:
      while running or (waiting and not stopped()):
        if stopped() and not told:
          told = True
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
  # Appended: a run that goes on tells where the one before left it.
  with unit.log.open("ab") as log:
    return subprocess.Popen(
      unit.command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
    )


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
  """Catches SIGTERM and Ctrl-C; yields whether there was one.

  Raises:
    KeyboardInterrupt: a second Ctrl-C.
  """
  asked: list[float] = []

  def handle(number: int, frame: Any) -> None:
    now = time.monotonic()
    if asked and number == signal.SIGINT and now - asked[0] > SIGINT_DEBOUNCE:
      raise KeyboardInterrupt
    asked.append(now)

  numbers = signal.SIGTERM, signal.SIGINT
  before = [signal.signal(number, handle) for number in numbers]
  try:
    yield lambda: bool(asked)
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen], patience: float = 30.0) -> None:
  """Ends what an interrupted launcher leaves running; a run saves first."""
  for process in processes:
    process.terminate()
  for process in processes:
    try:
      process.wait(patience)
    except subprocess.TimeoutExpired:
      process.kill()
