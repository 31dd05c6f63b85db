"""Watchdog of a run of several processes: names the one that hangs.

A process that hangs, in a file system say, stops all others at their next
collective, where they would wait for it for ever. So each process writes what
it does to a file of its own in the working directory, with a count that grows
with each activity, and a thread of each reads the files of all others. If none
has changed for `patience`, those with the lowest count have stopped the rest:
every process says which, what they were doing and their last collective, and
ends.

No clock is compared with that of another machine: a process notes, by its own,
when it last saw a file change.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from research.io import folders
from research.io.folders import Folder

EXIT_STATUS = 43
"""Exit status of a run that a watchdog ended; to launchers it has failed."""

FOLDER = "watchdog"

INTERVAL = 10.0
"""Seconds between two looks at all files."""


def clear(workdir: Folder) -> None:
  """Removes what processes of an earlier run have left.

  The first process does, before any process trains: another one that hangs
  until then would count as being as far as it came in that run.
  """
  with folders.writing(workdir / FOLDER):
    for path in (workdir / FOLDER).glob("*.json"):
      path.unlink()


@dataclasses.dataclass(frozen=True)
class Activity:
  """What a process does.

  Attributes:
    count: number of activities so far, this one included.
    doing: description in a few words.
    collective: the last one that it entered; empty before the first.
  """

  count: int = 0
  doing: str = "starting"
  collective: str = ""


class Watchdog:
  """Watches the processes of a run; a context manager."""

  def __init__(
    self,
    workdir: Folder,
    process: int,
    processes: int,
    patience: float | int | None,
    end: Callable[[int], Any] = os._exit,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts nothing yet.

    Args:
      patience: seconds without any progress; None never ends a run.
      end: is called with `EXIT_STATUS`.
    """
    self.activity = Activity()
    self._folder = workdir / FOLDER
    self._process, self._patience = process, patience
    self._processes, self._end, self._clock = processes, end, clock
    self._seen: dict[int, Activity] = {}
    self._changed = clock()
    self._written: Activity | None = None
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    if self._patience is not None and self._processes > 1:
      with folders.writing(self._folder):
        self._folder.mkdir(parents=True, exist_ok=True)
      self._write()  # in the place of what an earlier run has left
      self._thread.start()
    return self

  def __exit__(self, kind, error, trace):
    self._over.set()
    if self._thread.is_alive():
      self._thread.join()

  def doing(self, what: str, collective: str | None = None) -> None:
    last = self.activity
    self.activity = Activity(
      count=last.count + 1,
      doing=what,
      collective=last.collective if collective is None else collective,
    )

  def tick(self) -> str | None:
    """Writes this process's file and reads all; returns who hangs, if any."""
    self._write()
    now = self._clock()
    activities = {
      i: self.activity if i == self._process else self._read(i)
      for i in range(self._processes)
    }
    if activities != self._seen:
      self._seen, self._changed = activities, now
    if now - self._changed < self._patience:
      return None
    return self._verdict(now - self._changed)

  def _verdict(self, seconds: float) -> str:
    lowest = min(x.count for x in self._seen.values())
    named = [
      f"process {i} of {self._processes}: {x.doing}; its last collective:"
      f" {x.collective or 'none'}"
      for i, x in self._seen.items()
      if x.count == lowest
    ]
    return "\n".join(
      [f"no process has made progress for {seconds:.0f} s.", *named]
    )

  def _watch(self) -> None:
    interval = min(INTERVAL, self._patience / 4)
    while not self._over.wait(interval):
      if text := self.tick():
        print(f"stalled: {text}", file=sys.stderr, flush=True)
        if self._process == 0:
          # JAX ends the others as soon as it is gone, before they say this.
          time.sleep(2 * interval)
        self._end(EXIT_STATUS)
        return

  def _write(self) -> None:
    if self.activity == self._written:
      return
    activity = self.activity
    # A disk that is full for a while is no reason to end a run.
    with contextlib.suppress(OSError):
      text = json.dumps(dataclasses.asdict(activity))
      folders.write_text(self._folder / f"{self._process}.json", text)
      self._written = activity

  def _read(self, process: int) -> Activity:
    try:
      text = (self._folder / f"{process}.json").read_text("utf-8")
      return Activity(**json.loads(text))
    except (OSError, ValueError, TypeError):
      return self._seen.get(process, Activity())
